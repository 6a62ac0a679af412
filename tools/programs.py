"""Starts real programs with and without the switch, and looks at them from outside: our counters and the kernel's
socket lists. Shared by tests/apps and tools/demo.

Every program runs in a session of its own, and only members of such sessions are ever signalled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
SANRUN = ROOT / ".venv/bin/sanrun"
SANCTL = ROOT / ".venv/bin/sanctl"
GUNICORN = ROOT / ".venv/bin/gunicorn"
UVICORN = ROOT / ".venv/bin/uvicorn"
PYTHON = "/usr/bin/python3"
LOOPBACK = "127.0.0.1"
WAIT = 10.0
"""Seconds that anything on this machine may take before it counts as hanging."""
HOLD_SIZE = 32 << 20
"""Bytes of a response that no pair of socket buffers can hold: who does not read it keeps its connection open."""

T = TypeVar("T")


class Failed(AssertionError):
    """A program did not do what it was started for."""


def wait_for(what: Callable[[], T], meaning: str, seconds: float = WAIT) -> T:
    """The first true value of `what`; raises Failed when none came in time."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"after {seconds:g} s still not: {meaning}")
        time.sleep(0.02)


def free_port() -> int:
    """A TCP port that nobody has bound on any address."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::", 0))
        port: int = probe.getsockname()[1]
        return port


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what the kernel shows


@dataclass(frozen=True)
class Socket:
    """One line of `ss`. `local` and `peer` are addresses, or names with '@' for the NUL of an abstract one."""

    kind: str
    state: str
    local: str
    peer: str
    pids: frozenset[int]


def _ss(*options: str) -> Iterator[list[str]]:
    text = subprocess.run(["ss", "-H", *options], capture_output=True, timeout=WAIT, check=True).stdout
    for line in text.decode(errors="replace").rstrip("\n").split("\n"):   # other programs' names may hold any byte
        if line:
            yield line.split()


def _pids(words: Sequence[str]) -> frozenset[int]:
    return frozenset(int(pid) for word in words for pid in re.findall(r"pid=(\d+)", word))


@dataclass(frozen=True)
class Kernel:
    """The kernel's sockets of one TCP port: TCP's own, and AF_UNIX ones whose names carry the port."""

    tcp_listeners: tuple[Socket, ...]
    tcp: tuple[Socket, ...]
    """Established, one for each end."""
    listeners: tuple[Socket, ...]
    connecting: tuple[Socket, ...]
    """Established companions of the connecting side, which bear names of their own."""
    accepted: tuple[Socket, ...]
    """Established companions of the accepting side, which bear the listener's name."""
    names: tuple[str, ...]
    """All abstract names of the port, in any state."""

    def __str__(self) -> str:
        return "\n".join(str(row) for row in (*self.tcp_listeners, *self.tcp, *self.listeners, *self.connecting,
                                              *self.accepted)) or "no socket"


def kernel(port: int) -> Kernel:
    # Named states and ports, because thousands in TIME-WAIT make a full list slow.
    mine = ("state", "listening", "state", "established", f"( sport = :{port} or dport = :{port} )")
    tcp = [Socket("tcp", words[0], words[3], words[4], _pids(words[5:])) for words in _ss("-tnp", *mine)]
    unix = [Socket(words[0], words[1], words[4], words[6], _pids(words[8:])) for words in _ss("-xap")]
    listening = re.compile(rf"@san1/[LD]/.*:{port}/\d+$")
    connecting = re.compile(rf"@san1/C/.*:{port}$")
    return Kernel(
        tuple(row for row in tcp if row.state == "LISTEN"),
        tuple(row for row in tcp if row.state == "ESTAB"),
        tuple(row for row in unix if row.state == "LISTEN" and row.kind == "u_str" and listening.match(row.local)),
        tuple(row for row in unix if row.state == "ESTAB" and connecting.match(row.local)),
        tuple(row for row in unix if row.state == "ESTAB" and row.kind == "u_str" and listening.match(row.local)),
        tuple(row.local for row in unix if listening.match(row.local) or connecting.match(row.local)),
    )


# ---- what our counters show


@dataclass(frozen=True)
class Counters:
    """Sums over the processes of one program."""

    connections: Mapping[str, int]
    listeners: Mapping[str, int]
    reasons: Mapping[str, int]
    upcalls: int
    engines: frozenset[str]


def _sanctl(verb: str) -> Any:
    run = subprocess.run([SANCTL, verb, "--json"], capture_output=True, text=True, timeout=WAIT)
    if run.returncode != 0:
        raise Failed(f"sanctl {verb} --json: status {run.returncode}\n{run.stderr}")
    answer = json.loads(run.stdout)
    if answer["schema"] != 1:
        raise Failed(f"sanctl {verb}: unknown schema {answer['schema']}")
    return answer


def counters(pids: frozenset[int]) -> Counters:
    mine = [process for process in _sanctl("stats")["processes"] if process["pid"] in pids]

    def total(key: str) -> dict[str, int]:
        names = sorted({name for process in mine for name in process[key]})
        return {name: sum(process[key].get(name, 0) for process in mine) for name in names}

    return Counters(total("connections"), total("listeners"), total("reasons"),
                    sum(process["upcalls"] for process in mine), frozenset(process["engine"] for process in mine))


def shares(pids: frozenset[int]) -> dict[int, Mapping[str, int]]:
    """The connections of each process by provider. A process without any may be absent."""
    return {process["pid"]: process["connections"] for process in _sanctl("stats")["processes"]
            if process["pid"] in pids}


def rows(pids: frozenset[int]) -> list[dict[str, Any]]:
    """The lines of `sanctl ss` that belong to `pids`."""
    return [row for row in _sanctl("ss")["sockets"] if row["pid"] in pids]


# ---- running programs


def session_members(session: int) -> frozenset[int]:
    """Pids whose session is `session`, zombies left out."""
    members = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                state, _, _, owner = file.read().rpartition(b")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state not in (b"Z", b"X"):
            members.add(int(entry))
    return frozenset(members)


def with_variable(variable: str) -> frozenset[int]:
    """Pids that were started with `variable`, NAME=VALUE, in their environment."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:
                continue
            if variable.encode() in environment.split(b"\0"):
                found.add(int(entry))
    return frozenset(found)


class Program:
    """A started program and all its children."""

    def __init__(self, argv: Sequence[str], popen: subprocess.Popen[bytes], switched: bool, errors: Path) -> None:
        self.argv = argv
        self.popen = popen
        self.pid = popen.pid
        self.switched = switched
        """Whether it runs under sanrun."""
        self.errors = errors
        """What it wrote to stderr, and to stdout unless that is a pipe."""

    @property
    def pids(self) -> frozenset[int]:
        return session_members(self.pid)

    @property
    def input(self) -> IO[bytes]:
        assert self.popen.stdin is not None
        return self.popen.stdin

    @property
    def output(self) -> IO[bytes]:
        assert self.popen.stdout is not None
        return self.popen.stdout

    def send(self, line: str) -> None:
        """Writes a line to its stdin."""
        self.input.write(line.encode() + b"\n")
        self.input.flush()

    def line(self, seconds: float = WAIT) -> str:
        """The next line of its stdout, which must be a pipe; Failed when none comes."""
        end = time.monotonic() + seconds
        read = b""
        # Byte by byte: what follows the line belongs to finish().
        while not read.endswith(b"\n"):
            if not select.select([self.output], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Failed(f"after {seconds:g} s no line from {self}\n{self.said()}")
            piece = os.read(self.output.fileno(), 1)
            if not piece:
                break
            read += piece
        return read.decode().rstrip("\n")

    def finish(self, seconds: float = WAIT * 3) -> bytes:
        """Reads its stdout to the end and waits for status 0."""
        if self.popen.stdin is not None and self.popen.stdin.closed:
            self.popen.stdin = None
        try:
            output, _ = self.popen.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self} still runs after {seconds:g} s") from None
        if self.popen.returncode != 0:
            raise Failed(f"{self}: status {self.popen.returncode}\n{self.said()}")
        return output or b""

    def said(self) -> str:
        return self.errors.read_text(errors="replace")[-4000:]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All its processes stand still, so that a look at its connections cannot come too late."""
        pids = self.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class Policy:
    name: str
    path: Path | None
    asks: bool
    """Whether a process asks the policy engine."""


class Programs:
    """Starts programs, and ends all that it started. Its directory is for every user, as servers drop privilege."""

    def __init__(self, switch: bool = True) -> None:
        self.switch = switch
        """False: nothing runs under sanrun, to see that a scenario itself is right."""
        self.directory = Path(tempfile.mkdtemp(prefix="interposer-apps-"))
        self.directory.chmod(0o755)
        self.log = self.directory / "switch.log"
        self.prefix: tuple[str, ...] = ()
        """Words before every command, sanrun's too: a program that becomes it."""
        self.running: list[Program] = []
        self.ports: list[int] = []
        self._ports_given: set[int] = set()
        self._runtime = self.directory / "run"
        self._runtime.mkdir(mode=0o755)

    def environment(self) -> dict[str, str]:
        """Of the caller, without what would steer the switch."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("INTERPOSER", "PYTHON")) and name not in ("LD_PRELOAD", "VIRTUAL_ENV")}
        return kept | {"XDG_RUNTIME_DIR": str(self._runtime), "LC_ALL": "C.UTF-8"}

    def policy(self, name: str, text: str, functions: str = "") -> Policy:
        """Writes a policy file, and site_policy.py beside it when there is a `functions` text."""
        directory = self.directory / f"policy-{name}"
        directory.mkdir(exist_ok=True)
        path = directory / "policy.toml"
        path.write_text(text)
        if functions:
            (directory / "site_policy.py").write_text(functions)
        return Policy(name, path, "python:" in text or "reactive" in text)

    def port(self) -> int:
        """A free one that no earlier program of these has had: their directories are named after it."""
        while (port := free_port()) in self._ports_given:
            pass
        self._ports_given.add(port)
        self.ports.append(port)
        return port

    def start(self, argv: Sequence[str], policy: Policy | None, *, pipes: bool = False) -> Program:
        """Starts `argv` under sanrun with `policy`, or plain when that is None. `pipes`: for its stdin and stdout."""
        switched = policy is not None and self.switch
        command = list(argv)
        if switched:
            assert policy is not None
            options = ["--policy", str(policy.path)] if policy.path else []
            command = [str(SANRUN), "--log", str(self.log), *options, "--", *argv]
        errors = self.directory / f"{len(self.running)}-{Path(argv[0]).name}.txt"
        with errors.open("wb") as file:
            popen = subprocess.Popen(
                [*self.prefix, *command],
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else file,
                stderr=file,
                env=self.environment(),
                cwd=self.directory,
                start_new_session=True,
                bufsize=0,  # communicate() does not know what a buffer already holds
            )
        program = Program(argv, popen, switched, errors)
        self.running.append(program)
        return program

    def run(self, argv: Sequence[str], policy: Policy | None, seconds: float = WAIT * 3) -> bytes:
        """Runs `argv` to its end and returns its stdout."""
        return self.start(argv, policy, pipes=True).finish(seconds)

    def serve(self, argv: Sequence[str], policy: Policy | None, port: int, *, companion: bool = True,
              processes: int = 1) -> Program:
        """Starts a server and waits until its listener is there, under the switch its companion too unless it can have
        none, and as many processes. Does not connect, as that would count."""
        program = self.start(argv, policy)
        companion = companion and program.switched

        def listens() -> bool:
            if program.popen.poll() is not None:
                raise Failed(f"{program}: status {program.popen.returncode}\n{program.said()}")
            now = kernel(port)
            return bool(now.tcp_listeners and (now.listeners or not companion)) and len(program.pids) >= processes

        try:
            wait_for(listens, f"{program} listens on port {port}" + (" with a companion" if companion else ""))
        except Failed as failure:
            raise Failed(f"{failure}\n{kernel(port)}\n{program.said()}\n{self.logged()}") from None
        return program

    def logged(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def stop(self, program: Program) -> list[str]:
        """Ends `program` as a service manager would. Returns what it left behind; that is killed."""
        program.popen.poll()
        for pipe in (program.popen.stdin, program.popen.stdout):
            if pipe is not None:
                pipe.close()
        if program.popen.returncode is None:
            program.popen.terminate()
            try:
                program.popen.wait(WAIT / 2)
            except subprocess.TimeoutExpired:
                pass
        left: list[str] = []
        try:
            wait_for(lambda: not program.pids, "", 2)
        except Failed:
            left = [f"process {pid} of {program}" for pid in sorted(program.pids)]
            for pid in program.pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        program.popen.wait(WAIT)
        return left

    def close(self) -> list[str]:
        """Ends everything, and returns what should not be there: processes, and abstract names of its ports."""
        left = [line for program in reversed(self.running) for line in self.stop(program)]
        self.running.clear()
        # Also what the switch itself started, such as the policy's helper.
        variable = f"XDG_RUNTIME_DIR={self._runtime}"
        try:
            wait_for(lambda: not with_variable(variable), "", 2)
        except Failed:
            left += [f"process {pid}, started by sanrun" for pid in with_variable(variable)]
        for port in self.ports:
            try:
                wait_for(lambda port=port: not kernel(port).names, "", 2)  # type: ignore[misc]
            except Failed:
                left += [f"abstract name {name}" for name in kernel(port).names]
        self.ports.clear()
        return left

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
