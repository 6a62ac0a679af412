"""Python programs, of every CPython that this machine has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from awkward import KINDS, Lab
from interpreters import DEBIANS, VERSIONS, interpreters
from puppet import HOSTS

PROGRAM = HOSTS / "awkward_python.py"
WAYS = {
    "plain": "U",
    "non-blocking": "U",
    "threads": "UUUUUUUU",
    "http": "U",
    "asyncio": "UUUU",
    "fork": "UU",
    "multiprocessing-fork": "UUUU",
    "multiprocessing-spawn": "UUUU",
    "pass-fds": "UU",
    "stdin": "U",
}
"""How awkward_python.py connects, and what carries it."""
NOT_IN = {"2.7": ("asyncio", "multiprocessing-spawn"), "3.6": ("asyncio",)}


def check(lab: Lab, kind: str, executable: str, ways: Sequence[str], engine: str = "") -> None:
    outcome = lab.run(kind, executable, PROGRAM, lab.port, *ways, engine=engine)
    assert outcome.letter == "status 0", outcome
    assert outcome.said.splitlines() == [f"{way} {WAYS[way]}" for way in ways]
    assert set(outcome.carried) == {"unix"}


@pytest.mark.parametrize("kind, engine", [("plain", ""), ("function", ""), ("function", "startup"), ("reactive", "")])
def test_debians_python(lab: Lab, kind: str, engine: str) -> None:
    """P8, P1: http.server and urllib, asyncio, threads, fork, multiprocessing by fork and spawn, descriptors passed to
    another program: all on the SAN, the helper being asked where the policy has code, whatever the policy says of the
    engine."""
    check(lab, kind, DEBIANS, list(WAYS), engine)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python(lab: Lab, version: str) -> None:
    """P8, P1: the same with each other version, the policy asking a function."""
    executable = interpreters().get(version)
    if not executable:
        pytest.skip(f"not run: no CPython {version} on this machine")
    print(f"CPython {version}: {executable}")
    check(lab, "function", executable, [way for way in WAYS if way not in NOT_IN.get(version, ())])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_and_policy(lab: Lab, version: str, kind: str) -> None:
    """P8, P1: each version with each policy."""
    executable = interpreters().get(version)
    if not executable:
        pytest.skip(f"not run: no CPython {version} on this machine")
    check(lab, kind, executable, [way for way in WAYS if way not in NOT_IN.get(version, ())])
