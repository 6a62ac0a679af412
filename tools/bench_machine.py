"""What tools/bench stands on: network name spaces where TCP has cubic, CPUs, the small programs of tests/hosts, and
facts about the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import demo
from programs import PYTHON, ROOT, WAIT, Failed

from interposer.build import native_sources

HOSTS = ROOT / "tests/hosts"
BUILT = ROOT / ".build/bench"
NATIVE = ROOT / "interposer/native"
FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror")
CLONE_NEWNET = 0x40000000
STOCK_WMEM_MAX = 212992
CUBIC = "cubic"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise Failed(f"{what}: {os.strerror(ctypes.get_errno())}")


# ---- network name spaces


class Network:
    """A fresh network name space with loopback, whose connections use cubic. Raises Failed where none can be made."""

    def __init__(self) -> None:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._file = -1
        try:
            _check(_libc.unshare(CLONE_NEWNET), "no network name space can be made")
            try:
                done = subprocess.run(["sh", "-ec", demo.PREPARE], capture_output=True, text=True, timeout=WAIT)
                control = demo.congestion_control()
                if done.returncode != 0 or control != CUBIC:
                    raise Failed(f"a network name space has {control} instead of cubic\n{done.stderr}")
                self._file = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                _check(_libc.setns(home, CLONE_NEWNET), "cannot return to the first network name space")
        finally:
            os.close(home)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This process, and what it starts, is in it."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self._file, CLONE_NEWNET), "cannot enter a network name space")
            try:
                yield
            finally:
                _check(_libc.setns(home, CLONE_NEWNET), "cannot return to the first network name space")
        finally:
            os.close(home)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def with_privilege() -> None:
    """Becomes this program again, in a user name space where it may make network name spaces. Returns where it may
    already, or where that is not possible."""
    if os.geteuid() == 0 or os.environ.get(demo.INSIDE):
        return
    # --net, because nobody may come back into a name space that belongs to the machine.
    words = ["unshare", "--user", "--map-current-user", "--keep-caps", "--net", "sh", "-ec"]
    words += ['ip link set lo up; exec "$@"', "sh"]
    try:
        if subprocess.run([*words, "true"], capture_output=True, timeout=WAIT).returncode == 0:
            os.execvpe(words[0], [*words, sys.executable, *sys.argv], os.environ | {demo.INSIDE: "1"})
    except (OSError, subprocess.TimeoutExpired):
        pass


def unprivileged() -> tuple[str, ...]:
    """Words before a program that must not have what with_privilege() brought."""
    return ("setpriv", "--ambient-caps=-all", "--inh-caps=-all") if os.environ.get(demo.INSIDE) else ()


# ---- CPUs


def two_cpus() -> tuple[int, int]:
    """Raises Failed where there is one."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Failed("there is only one CPU")
    return cpus[0], cpus[1]


def on_cpu(cpu: int) -> tuple[str, ...]:
    return "taskset", "--cpu-list", str(cpu)


# ---- limits


def many_files(wanted: int = 32768) -> tuple[int, tuple[str, ...]]:
    """The limit of open files that can be had, at most `wanted`, and the words that set it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    words = ("prlimit", f"--nofile={wanted}:{wanted}")
    if hard >= wanted or subprocess.run([*words, "true"], capture_output=True, timeout=WAIT).returncode == 0:
        return wanted, words
    return hard, ("prlimit", f"--nofile={hard}:{hard}")


def wmem_max() -> int:
    return int(Path("/proc/sys/net/core/wmem_max").read_text())


def stock_buffers() -> tuple[str, ...]:
    """Words before a program that gets no larger buffers than on an untouched kernel."""
    words: tuple[str, ...] = ()
    if os.geteuid() == 0:
        words = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    if wmem_max() > STOCK_WMEM_MAX:
        words = (*words, "env", f"LD_PRELOAD={host('bench_stock', '-shared', '-fPIC', suffix='.so')}")
    return words


# ---- the small programs


def host(name: str, *flags: str, suffix: str = "", library: bool = False) -> Path:
    """tests/hosts/NAME.c compiled, again when something has changed; `library`: with the library's objects, as
    tools/build made them. Raises Failed."""
    source = HOSTS / f"{name}.c"
    objects = [ROOT / ".build" / f"{path.stem}.o" for path in native_sources()] if library else []
    output = BUILT / f"{name}{suffix}"
    newest = max(path.stat().st_mtime_ns for path in (source, Path(__file__), *objects))
    if output.exists() and output.stat().st_mtime_ns > newest:
        return output
    BUILT.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(f".{os.getpid()}")
    command = [
        "gcc",
        *FLAGS,
        f"-I{NATIVE}",
        "-rdynamic",
        *flags,
        "-o",
        str(fresh),
        str(source),
        *map(str, objects),
        "-pthread",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise Failed(f"{source} does not compile:\n{done.stderr}")
    fresh.replace(output)
    return output


# ---- facts


def cache_line() -> float | None:
    """Nanoseconds for a cache line to go to the other CPU and back."""
    try:
        words = [str(cpu) for cpu in two_cpus()]
    except Failed:
        return None
    text = _output(str(host("bench_net")), "cacheline", *words)
    return float(text) if text else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def facts() -> dict[str, Any]:
    """Taken before anything is measured; `congestion_control` is that of a connection as the TCP side will have it."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    system = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    try:
        network = Network()
        with network.entered():
            control: str | None = demo.congestion_control()
        network.close()
    except Failed:
        control = None
    first = cache_line()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "changed_files": len(_output("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": model,
        "kernel": os.uname().release,
        "libc": os.confstr("CS_GNU_LIBC_VERSION"),
        "python": _output(PYTHON, "-c", "import platform; print(platform.python_version())"),
        "congestion_control": control,
        "system_congestion_control": system.read_text().strip(),
        "wmem_max": wmem_max(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "privileged": os.geteuid() == 0,
        "load_before": os.getloadavg()[0],
        "cache_line_ns": [] if first is None else [first],
    }
