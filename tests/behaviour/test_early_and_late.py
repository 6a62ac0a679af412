"""The first calls of a process, and the last."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from puppet import ROOT, build, switched_environment
from world import World

from interposer.diag import stats


def test_every_hook_is_called() -> None:
    """T13: the calls of hosts/each_call.h are the hooks, all but those that end the process."""
    call = re.compile(r"^HOOK\([^,]+?, (\w+),|^EXPORTED\((\w+)\)", re.MULTILINE)
    hooks = {name for place in ("interposer/native/hooks.def", "shim.c") for name in names(call, ROOT / place)}
    made = names(re.compile(r"^    (?:CALL|EACH_[A-Z]+)\((\w+),? ?", re.MULTILINE), ROOT / "tests/hosts/each_call.h")
    assert "socket" in hooks and "execl" in hooks
    assert (hooks | {"vfork"}) - {"_exit", "_Exit"} == set(made) - {"name"}


def names(pattern: re.Pattern[str], path: Path) -> list[str]:
    return [next(filter(None, match.groups())) for match in pattern.finditer(path.read_text())]


@pytest.mark.parametrize("order", ["before", "after"])
def test_constructor_and_destructor(tmp_path: Path, order: str) -> None:
    """T13: calls of another preloaded library in its constructor, at exit, in its destructor, and in a thread that goes
    on meanwhile, work. The library's constructor runs after ours and its destructor before, or (`after`: its place in
    LD_PRELOAD) the other way round."""
    library = build("early_library", "-shared", "-fPIC", "-pthread")
    environment = switched_environment()
    ours = environment["LD_PRELOAD"]
    preload = f"{library}:{ours}" if order == "before" else f"{ours}:{library}"
    output = tmp_path / "said"
    ran = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loader")}
    run = subprocess.run(
        ["/bin/true"],
        env={**environment, **ran, "LD_PRELOAD": preload, "EARLY_OUTPUT": str(output)},
        capture_output=True,
        check=True,
        timeout=40,
    )
    assert (run.stdout, run.stderr) == (b"", b"")
    assert output.read_text() == "constructor works\natexit works\ndestructor works\nthread works\n"
    loader = max(tmp_path.glob("loader.*"), key=lambda path: path.stat().st_size).read_text()
    for moment, first in (("init", order == "after"), ("fini", order == "before")):
        assert (loader.index(f"calling {moment}: {library}") < loader.index(f"calling {moment}: {ours}")) == first


@pytest.mark.parametrize("binding", ["now", "lazy"])
def test_ifunc_resolver(binding: str) -> None:
    """T13: all calls work in an IFUNC resolver of the program, which the loader runs before any constructor."""
    program = build("resolver_calls", f"-Wl,-z,{binding}")
    run = subprocess.run([program], env=switched_environment(), capture_output=True, text=True, check=True, timeout=20)
    assert (run.stdout, run.stderr) == ("42 works works\n", "")


def test_each_first_call() -> None:
    """T13: the first calls of a process are all hooks at one moment, each in a thread of its own."""
    for _ in range(10):
        run = subprocess.run(
            [build("first_calls", "-pthread")],
            env=switched_environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert (run.stdout, run.stderr) == ("93\n", "")


def test_sixteen_first_calls(san: World) -> None:
    """T13: the first socket calls of sixteen threads at one moment all succeed, again and again."""
    listener, address = san.listener(backlog=64)
    san.server.ask("puppet_serve_bytes", listener, ord("x"), 16 * 20)
    program = build("first_calls", "-pthread")
    for _ in range(20):
        run = subprocess.run(
            [program, str(address[1])],
            env=switched_environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert (run.stdout, run.stderr) == ("16\n", "")
    assert san.server.answer("serve").result == 320
    assert stats.process(san.server.pid).connections["unix"] >= 300


def test_first_registrations() -> None:
    """T2, T13: the first registrations of a process are of one listener, by two threads at one moment: it keeps its
    companion."""
    program = build("first_registrations", "-pthread")
    run = subprocess.run([program], env=switched_environment(), capture_output=True, text=True, check=True, timeout=60)
    assert (run.stdout, run.stderr) == ("100\n", "")


def test_other_preloads_stay() -> None:
    """T13, P3: what was in LD_PRELOAD before stays, after ours."""
    library = build("early_library", "-shared", "-fPIC", "-pthread")
    environment = dict(switched_environment())
    run = subprocess.run(
        [ROOT / ".venv/bin/sanrun", "/usr/bin/env"],
        env={**environment, "LD_PRELOAD": str(library), "EARLY_OUTPUT": "/dev/null"},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    value = next(line for line in run.stdout.splitlines() if line.startswith("LD_PRELOAD="))
    assert value.endswith(f"libinterposer.so:{build('early_library', '-shared', '-fPIC')}")


@pytest.mark.parametrize("mode", ["", "nonblocking", "copies", "passing copies", "ends"])
def test_two_threads_on_one_socket(mode: str) -> None:
    """T9, T3, T10, S20: of two threads that connect one socket at one moment exactly one succeeds, with one connection,
    and one that does not block is told of it later; a copy that one makes while the other connects is of that
    connection, and one that it closes at once does not keep it; the number of a closed one is not written over."""
    command = [build("connect_race", "-pthread"), mode]
    run = subprocess.run(command, env=switched_environment(), capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 0 0\n", "")


def test_interrupted_connect() -> None:
    """T9, T12, S26: a handler that interrupts connect() is told TCP's names of that socket, at once, and that the
    connect is going on; what a vfork child has connected is not connected again; connect(AF_UNSPEC)
    ends the recv() of another thread."""
    run = subprocess.run(
        [build("interrupted_connect", "-pthread")],
        env=switched_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 0 0 0 1 1\n", "")
