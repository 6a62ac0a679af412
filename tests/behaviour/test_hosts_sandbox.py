"""Programs that confine themselves to the system calls of a plain TCP program."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from awkward import KINDS, Lab, Outcome, build_host
from puppet import plain_environment

from interposer.diag import stats

ENGINES = ("", "startup", "helper")


def sandbox() -> Path:
    return build_host("awkward_sandbox")


def lives_without_us(lab: Lab, what: str, how: str) -> None:
    command = [sandbox(), str(lab.port), what, how]
    plain = subprocess.run(command, env=plain_environment(), capture_output=True, timeout=30)
    assert plain.returncode == ord("T"), plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["kill", "trap", "errno", "syscall"])
def test_connect_in_a_sandbox(lab: Lab, how: str, engine: str, kind: str) -> None:
    """X8, P8, O1: a client that allows itself what a TCP client needs, before its first connect, lives: it is on TCP,
    and the log says why before the filter closes."""
    lives_without_us(lab, "client", how)
    outcome = lab.run(kind, sandbox(), lab.port, "client", how, engine=engine)
    assert outcome.letter == "T", outcome
    assert "a filter comes that forbids system call " in outcome.log and outcome.carried == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["kill", "trap", "errno", "syscall", "strict"])
def test_connection_from_before_the_sandbox(lab: Lab, how: str, kind: str) -> None:
    """X8, P7: a connection that was on the SAN already is read and closed with the calls that the program makes."""
    lives_without_us(lab, "connected", how)
    outcome = lab.run(kind, sandbox(), lab.port, "connected", how, engine="helper")
    assert outcome.letter == "U", outcome
    assert outcome.carried == ["unix"]


@pytest.mark.parametrize("how", ["kill", "errno"])
def test_epoll_in_a_sandbox(lab: Lab, how: str) -> None:
    """X8, T2: a connection whose reading side was shut before is registered with an epoll by that call alone."""
    lives_without_us(lab, "watched", how)
    outcome = lab.run("plain", sandbox(), lab.port, "watched", how)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"]), outcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["kill", "errno"])
def test_fork_in_a_sandbox(lab: Lab, how: str, kind: str) -> None:
    """X8, T4: a program that may fork there does, and its child uses a connection from before."""
    lives_without_us(lab, "forked", how)
    outcome = lab.run(kind, sandbox(), lab.port, "forked", how)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"]), outcome


@pytest.mark.parametrize("kind", ["plain", "function"])
@pytest.mark.parametrize("how", ["kill", "errno", "strict"])
@pytest.mark.parametrize(
    "what, letter, carried",
    [
        ("server", "T", []),
        ("listening", "T", ["unix"]),
        ("accepted", "U", ["unix"]),
    ],
)
def test_server_in_a_sandbox(lab: Lab, what: str, letter: str, carried: list[str], how: str, kind: str) -> None:
    """X8, S23, S24, O1: a server that confines itself before listen() or after it, or with a connection that it writes
    to: it lives, none of its clients waits, and a listener that was on the SAN is not any more."""
    if how == "strict" and what != "accepted":
        how = "trap"  # nobody can accept in the kernel's strict mode
    engine = "helper"
    with lab.serving(kind, sandbox(), 0, what, how, engine=engine) as (program, port, log):
        client = lab.run("plain", build_host("awkward_client"), port)
        assert client.letter == letter, (client, log.read_text())
        assert Outcome(program.wait(10), "", "", log.read_text()).letter == letter
        assert Outcome(0, "", "", log.read_text()).carried == carried


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["open", "audit", "exact"])
def test_connect_in_an_open_sandbox(lab: Lab, how: str, engine: str, kind: str) -> None:
    """P8: a filter that forbids nothing that the switch needs changes nothing: the SAN, and the helper where Python
    cannot start any more, or the engine that was started before."""
    outcome = lab.run(kind, sandbox(), lab.port, "client", how, engine=engine)
    assert outcome.letter == "U", outcome
    assert outcome.carried == ["unix"] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["server", "listening", "accepted"])
def test_server_in_an_open_sandbox(lab: Lab, what: str, engine: str, kind: str) -> None:
    """P8, S21: the same of a server: it needs no system call beyond those that are looked for in a filter."""
    with lab.serving(kind, sandbox(), 0, what, "exact", engine=engine) as (program, port, _):
        assert lab.run("plain", build_host("awkward_client"), port).letter == "U"
        assert program.wait(10) == ord("U")


def test_reason_of_a_sandbox(lab: Lab) -> None:
    """O1, O2: sanctl's counters of a process in a sandbox name the reason."""
    with lab.serving("plain", sandbox(), 0, "server", "kill") as (program, port, _):
        seen = stats.process(program.pid)
        assert seen.reasons == {"SANDBOX": 1}
        assert lab.run("plain", build_host("awkward_client"), port).letter == "T"


@pytest.mark.parametrize("how", ["probe"])
def test_asking_for_filters(lab: Lab, how: str) -> None:
    """X8, S7: a program that only asks whether the kernel has filters stays on the SAN."""
    outcome = lab.run("plain", sandbox(), lab.port, "client", how)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"] * 3), outcome


@pytest.mark.parametrize("seed", range(4))
def test_filters_are_judged_as_by_the_kernel(seed: int) -> None:
    """X8: 100 random filters answer to a system call as the kernel says when they are in force."""
    command = [build_host("awkward_filters"), str(seed), "100"]
    judged = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=120)
    assert (judged.returncode, judged.stdout) == (0, "100 judged\n"), judged
