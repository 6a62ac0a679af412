"""The first calls of a process, and the last."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from puppet import ROOT, build, switched_environment
from world import World

from interposer.diag import stats


@pytest.mark.parametrize("order", ["before", "after"])
def test_constructor_and_destructor(tmp_path: Path, order: str) -> None:
    """T13: socket calls of another preloaded library, before main and after exit, work; its place in LD_PRELOAD is
    before or after ours."""
    library = build("early_library", "-shared", "-fPIC")
    environment = switched_environment()
    ours = environment["LD_PRELOAD"]
    preload = f"{library}:{ours}" if order == "before" else f"{ours}:{library}"
    output = tmp_path / "said"
    subprocess.run(
        ["/bin/true"], env={**environment, "LD_PRELOAD": preload, "EARLY_OUTPUT": str(output)}, check=True, timeout=20
    )
    assert output.read_text() == "constructor works\ndestructor works\n"


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


def test_other_preloads_stay() -> None:
    """T13, P3: what was in LD_PRELOAD before stays, after ours."""
    environment = dict(switched_environment())
    run = subprocess.run(
        [ROOT / ".venv/bin/sanrun", "/usr/bin/env"],
        env={**environment, "LD_PRELOAD": str(build("early_library", "-shared", "-fPIC")), "EARLY_OUTPUT": "/dev/null"},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    value = next(line for line in run.stdout.splitlines() if line.startswith("LD_PRELOAD="))
    assert value.endswith(f"libinterposer.so:{build('early_library', '-shared', '-fPIC')}")


def test_two_connect_one_socket() -> None:
    """T9, S20: of two threads that connect one socket at one moment exactly one succeeds, with one connection."""
    run = subprocess.run(
        [build("connect_race", "-pthread")], env=switched_environment(), capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 0 0\n", "")
