"""Programs that fork, vfork, spawn and clone in awkward moments."""

from __future__ import annotations

import re

import pytest
from awkward import KINDS, Lab, Outcome, build_host

from interposer.policy import reasons

INHERITED = "U"
"""The letter of a listener that the program has handed to another one, so that it gave its companion up."""
WAYS = {
    "vfork-exec": ("U", INHERITED),
    "vfork-close-exec": ("U", "U"),
    "vfork-exit": ("U", "U"),
    "spawn": ("U", INHERITED),
    "spawn-closefrom": ("U", INHERITED),
    "clone-vfork-exec": ("U", INHERITED),
    "clone-vfork-close-exec": ("U", "U"),
    "clone-vfork-exit": ("U", "U"),
    "clone-vfork-talk": ("T", "U"),
    "clone-fork-talk": ("T", "U"),
    "clone-fork-close-exec": ("U", "U"),
}
"""How a child is made and what it does: what carries its connection, and a later one to its parent's listener."""


def totals(said: str, who: str) -> tuple[int, int, int]:
    """Connections by SAN, by TCP, and wrong ones."""
    found = re.search(rf"^{who}: san (\d+), tcp (\d+), wrong (\d+)$", said, re.MULTILINE)
    assert found, said
    san, tcp, wrong = found.groups()
    return int(san), int(tcp), int(wrong)


def check_forks(outcome: Outcome, children: int) -> None:
    assert outcome.status == 0, (outcome.letter, outcome.said)
    san, tcp, wrong = totals(outcome.said, "children")
    assert (san + tcp, wrong) == (children, 0), outcome.said
    assert san > children * 0.9, (outcome.said, outcome.carried)
    assert totals(outcome.said, "parent")[2] == 0, outcome.said
    # Children without the engine of their own would ask the helper.
    assert outcome.log.count(f"engine: not in this process, reason {reasons.ENGINE_FORKED}\n") < children * 0.1
    # A socket that was made before one of the forks and connects after it is shared with the child.
    assert set(outcome.carried) <= {"unix", "SHARED", "ENGINE_FORKED", "ENGINE_BUSY", "BACKLOG_FULL"}


@pytest.mark.parametrize("engine", ["", "helper", "startup"])
@pytest.mark.parametrize("kind", KINDS)
def test_fork_while_deciding(lab: Lab, kind: str, engine: str) -> None:
    """T4, T13, P5, P8: a program forks 100 times while 8 of its threads wait for decisions, and each child wants one:
    all end in time, none fails, and all but a few are on the SAN."""
    check_forks(lab.run(kind, build_host("awkward_forks"), lab.port, 100, 8, engine=engine), 100)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["", "helper", "startup"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_forks_while_deciding(lab: Lab, kind: str, engine: str) -> None:
    """T4, T13, P5, P8: the same with 2,000 forks."""
    check_forks(lab.run(kind, build_host("awkward_forks"), lab.port, 2000, 8, engine=engine, timeout=600), 2000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_children(lab: Lab, way: str, kind: str) -> None:
    """T4, T10, S23, S27: whatever a child does before it runs another program, and however it was made, it works, and
    its parent's connection, listener and new connections go on; nobody waits at a companion that is not served."""
    child, served = WAYS[way]
    outcome = lab.run(kind, build_host("awkward_children"), lab.port, way)
    assert outcome.status == 0, outcome
    assert outcome.said.splitlines() == [
        "before U",
        f"child {child} {ord(child)}",
        "connection U",
        "new U",
        f"served {served}",
        f"client {served}",
    ], outcome
    assert set(outcome.carried) <= {"unix", "SHARED" if child == "T" else "NO_COMPANION"}
