"""Programs that confine themselves to the system calls of a plain TCP program."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from awkward import KINDS, Lab, build_host
from puppet import plain_environment

ENGINES = ("", "startup", "helper")


def sandbox() -> Path:
    return build_host("awkward_sandbox")


def lives_without_us(lab: Lab, what: str, how: str) -> None:
    command = [sandbox(), str(lab.port), what, how]
    plain = subprocess.run(command, env=plain_environment(), capture_output=True, timeout=30)
    assert plain.returncode == ord("T"), plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_connect_in_a_sandbox_that_refuses(lab: Lab, engine: str, kind: str) -> None:
    """X8, P8: a client whose filter refuses, with an error, all but what a TCP client needs goes by TCP."""
    lives_without_us(lab, "client", "errno")
    assert lab.run(kind, sandbox(), lab.port, "client", "errno", engine=engine).letter == "T"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["kill", "trap", "errno", "syscall", "strict"])
def test_connection_from_before_the_sandbox(lab: Lab, how: str, kind: str) -> None:
    """X8, P7: a connection that was on the SAN already is read and closed with the calls that the program makes."""
    lives_without_us(lab, "connected", how)
    outcome = lab.run(kind, sandbox(), lab.port, "connected", how, engine="helper")
    assert outcome.letter == "U", outcome
    assert outcome.carried == ["unix"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["open", "audit"])
def test_connect_in_an_open_sandbox(lab: Lab, how: str, engine: str, kind: str) -> None:
    """P8: a filter that forbids nothing that the switch needs changes nothing: the SAN, and the helper where Python
    cannot start any more, or the engine that was started before."""
    outcome = lab.run(kind, sandbox(), lab.port, "client", how, engine=engine)
    assert outcome.letter == "U", outcome
    assert outcome.carried == ["unix"] * 3


def test_asking_for_filters(lab: Lab) -> None:
    """X8, S7: a program that only asks whether the kernel has filters stays on the SAN."""
    outcome = lab.run("plain", sandbox(), lab.port, "client", "probe")
    assert (outcome.letter, outcome.carried) == ("U", ["unix"] * 3), outcome
