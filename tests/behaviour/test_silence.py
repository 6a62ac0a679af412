"""The standard descriptors are the program's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from puppet import build, switched_environment
from world import World


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("log", [False, True])
def test_closed_standard_descriptors(tmp_path: Path, closed: tuple[int, ...], log: bool) -> None:
    """O3, T11: a program started with standard descriptors closed: ours never take their numbers, nothing is written
    to what the program opens there."""
    files = [tmp_path / f"opened{number}" for number in range(3)]
    environment = dict(switched_environment(*(["--log", str(tmp_path / "log")] if log else [])))
    script = f"""
import os, sys
for number in {closed}:
    os.close(number)
os.environ.clear()
os.environ.update({environment!r})
os.execv({str(build("open_and_connect"))!r}, ["open_and_connect", *{[str(file) for file in files]!r}])
"""
    run = subprocess.run(["/usr/bin/python3", "-c", script], timeout=20, capture_output=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run
    assert (run.stdout, run.stderr) == (b"", b"")
    assert [file.read_bytes() for file in files[: len(closed)]] == [b""] * len(closed)


def test_log_is_not_a_standard_descriptor(san: World) -> None:
    """O3: standard output and error of working programs stay empty (the world looks at its end), and 0 to 2 are what
    they were."""
    before = [os.readlink(f"/proc/{san.client.pid}/fd/{number}") for number in (1, 2)]
    listener, address = san.listener()
    fd, accepted = san.join(listener, address)
    san.client.send(fd, b"x")
    assert san.server.recv(accepted, 5) == b"x"
    assert [os.readlink(f"/proc/{san.client.pid}/fd/{number}") for number in (1, 2)] == before
