"""Directories, files and variables that somebody else made: refused or passed by; nothing waits, nothing is loaded."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from puppet import SANRUN, plain_environment
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

STRANGER = 61234
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount and to become another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can enter."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


# ---- the run-time directory

# argv: kind of file system, directory. Mounts it in a name space of its own, then becomes sanrun.
MOUNTED = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
kind, run, cached, *command = sys.argv[1:]
def ok(result):
    assert result == 0, os.strerror(ctypes.get_errno())
ok(libc.unshare(0x20000)); ok(libc.mount(b"none", b"/", None, 0x44000, None))
ok(libc.mount(b"tmpfs", run.encode(), b"tmpfs", 0, b"size=64k,mode=700"))
if cached == "cached":
    import subprocess
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
if kind == "full":
    with open(run + "/all", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
if kind == "read-only":
    ok(libc.mount(None, run.encode(), None, 33, None))
os.execv(command[0], command)
"""


def under(kind: str, run: Path, cached: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MOUNTED, kind, str(run), cached, str(SANRUN), "/bin/echo", "started"]
    return subprocess.run(
        command, env={**plain_environment(), "XDG_RUNTIME_DIR": str(run)}, capture_output=True, text=True, timeout=30
    )


@AS_ROOT
@pytest.mark.parametrize(
    ("kind", "said"),
    [("full", "No space left on device"), ("read-only", "Read-only file system")],
)
def test_file_system(place: Path, kind: str, said: str) -> None:
    """X3, X6: a run-time directory that takes nothing is told with a remedy, before the program starts; with the
    compiled policy there from before, nothing is missing."""
    done = under(kind, place, "")
    assert (done.returncode, done.stdout) == (125, "")
    assert said in done.stderr
    assert "XDG_RUNTIME_DIR" in done.stderr
    assert "Traceback" not in done.stderr
    done = under(kind, place, "cached")
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


@AS_ROOT
@pytest.mark.parametrize("kind", ["owner", "link", "mode", "file", "table"])
def test_of_a_stranger(place: Path, kind: str) -> None:
    """X3: a stranger who was first at the place of a user's run-time directory, or of a file in it, keeps the user from
    starting, or is passed by; never does the user take what is the stranger's."""
    run = place / "interposer"
    environment = {**plain_environment(), "XDG_RUNTIME_DIR": str(place)}
    command = [SANRUN, "/usr/bin/env"]
    if kind == "table":
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30)
        (table,) = run.glob("table-*")
        table.write_bytes(b"lies")
        os.chown(table, STRANGER, STRANGER)
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30)
        assert f"INTERPOSER_TABLE={table}\n" in done.stdout
        assert table.stat().st_uid == 0
        assert table.read_bytes()[:8] == b"SANTABLE"
        return
    if kind == "link":
        (place / "other").mkdir()
        run.symlink_to(place / "other")
    elif kind == "file":
        run.touch()
    else:
        run.mkdir()
    if kind == "owner":
        os.chown(run, STRANGER, STRANGER)
    if kind == "mode":
        run.chmod(0o777)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert str(run) in done.stderr
    assert not list(place.glob("*/*"))


# ---- variables


def places(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "pipe", 0o666)
    (folder / "link").symlink_to(folder / "target")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(folder / "socket"))
    names = {name: str(folder / name) for name in ("pipe", "link", "folder", "socket")}
    kernel = ("/dev/zero", "/dev/full", "/dev/tty", "/dev/ptmx", "/proc/self/mem", "/proc/self/environ", "/proc/kmsg")
    return names | {name: name for name in kernel} | {"relative": "pipe", "long": "/" + "x" * 5000, "empty": ""}


@pytest.mark.parametrize("variable", ["INTERPOSER_TABLE", "INTERPOSER_LOG", "INTERPOSER", "INTERPOSER_REQUIRE"])
def test_variables(san: World, place: Path, variable: str) -> None:
    """X3, X8: whatever a variable names, the program starts at once and its connection works; only what is sound is
    used."""
    listener, address = san.listener(backlog=64)
    for name, value in places(place).items():
        side = {**san.stage.environments["server"], variable: value}
        san.stage.environments = {**san.stage.environments, name: side}
        begun = time.monotonic()
        actor = san.stage.start(f"{variable}-{name.rpartition('/')[2]}", name, cwd=place)
        fd = actor.socket()
        assert actor.connect(fd, address) == 0, name
        assert time.monotonic() - begun < 5, name
        accepted, _ = san.server.accept(listener)
        assert actor.send(fd, b"works") == 5
        assert san.server.recv(accepted, 10) == b"works"
        assert bool(companion_name(actor, fd)) == (variable != "INTERPOSER_TABLE"), name
        if variable == "INTERPOSER_TABLE":
            assert dict(stats.process(actor.pid).reasons) in ({}, {"BAD_TABLE": 1}), name
    assert not (place / "target").exists()


# ---- what is loaded

BAIT = (
    *("libc.so.6", "libpython3.11.so.1.0", "libinterposer.so", "libinterposer-engine.so", "libdl.so.2", "python3"),
    *("interposer.py", "sitecustomize.py", "usercustomize.py", "encodings.py", "re.py", "_cffi_backend.py", "site.py"),
    *("policy.toml", "pyvenv.cfg", "python311._pth", "pybuilddir.txt", "site_policy.pyc", "env"),
)


@pytest.mark.parametrize("engine", ["embedded", "startup", "helper", "off"])
def test_nothing_by_a_relative_path(place: Path, engine: str) -> None:
    """X3: from a directory full of bait, with Python in the program or beside it, every file is opened and executed by
    an absolute path, and none of the bait."""
    bait = place / "bait"
    bait.mkdir()
    for name in BAIT:
        (bait / name).write_text("raise SystemExit('bait')\n")
        (bait / name).chmod(0o755)
    policy = place / "policy" / "policy.toml"
    policy.parent.mkdir()
    policy.write_text(
        f'version = 1\n[defaults]\nengine = "{engine}"\n[[rule]]\nrole = "connect"\nuse = "python:site_policy:decide"\n'
    )
    (policy.parent / "site_policy.py").write_text('def decide(request):\n    return "unix"\n')
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        log = place / "strace"
        calls = "trace=open,openat,openat2,execve,execveat"
        command = ["strace", "-f", "-qq", "-e", calls, "-o", log, SANRUN, "--policy", policy, "--"]
        command += ["/bin/bash", "-c", f"exec 3<>/dev/tcp/{LOOPBACK}/{port}; echo hello >&3; /usr/bin/env true"]
        subprocess.run(command, cwd=bait, env=plain_environment(), check=True, capture_output=True, timeout=60)
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(10) == b"hello\n"
    seen = 0
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\((?:AT_FDCWD, )?\"([^\"]*)\"", line)
        if call:
            seen += 1
            assert call[2].startswith("/"), line
            assert not call[2].startswith(str(bait)), line
    assert seen > 50
