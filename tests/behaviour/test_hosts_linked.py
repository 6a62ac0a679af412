"""Programs that are linked in awkward ways: C++, static, without libc's calls, with a Python of their own."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from awkward import KINDS, Lab, build_host
from interpreters import libpythons
from puppet import plain_environment

LIBPYTHONS = libpythons()


@pytest.mark.parametrize("kind", KINDS)
def test_cpp(lab: Lab, kind: str) -> None:
    """T13, P5: connections from constructors before main, destructors after it, destructors of thread_local objects,
    threads that end by an exception, and while one unwinds through us."""
    outcome = lab.run(kind, build_host("awkward_cxx"), environment={"AWKWARD_PORT": str(lab.port)})
    assert outcome.letter == "status 0", outcome
    assert Counter(outcome.said.splitlines()) == {
        "static constructor U": 1,
        "while unwinding U": 5,
        "thread_local destructor U": 5,
        "carried over U": 4,
        "caught U": 1,
        "static destructor U": 1,
    }
    assert outcome.carried == ["unix"] * 17


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["-static", "-static-pie"])
def test_static(lab: Lab, how: str, kind: str) -> None:
    """T14, O4, S23: a static program works on TCP both ways, which sanrun said before the start; the program with libc
    that it starts is under the switch, and says why it came by TCP."""
    program = build_host("awkward_static", how, as_name=f"awkward{how}")
    outcome = lab.run(kind, program, lab.port, build_host("awkward_client"), quiet=False)
    assert (outcome.letter, outcome.said) == ("status 0", "T\nT\nT\n"), outcome
    assert outcome.complaints.startswith(f"sanrun: {program} cannot be interposed: it is statically linked")
    assert outcome.carried == ["NO_COMPANION"]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_past_libc(lab: Lab, kind: str) -> None:
    """T14, S23: a program that makes its socket calls by itself is on TCP both ways; no client waits at a companion."""
    with lab.serving(kind, build_host("awkward_raw"), lab.port) as (program, port, log):
        client = lab.run(kind, build_host("awkward_client"), port)
        assert (client.letter, client.carried) == ("T", ["NO_COMPANION"])
        assert program.stdout is not None
        assert program.stdout.read() == "T\nT\n"
        assert program.wait(10) == 0
        assert log.read_text() == ""


def environment_of(library: str) -> dict[str, str]:
    """Python's prefix, which a program with a libpython from elsewhere has to be told."""
    prefix = Path(library).parent.parent
    return {} if prefix == Path("/usr/lib") else {"PYTHONHOME": str(prefix)}


@pytest.mark.parametrize("library", LIBPYTHONS, ids=os.path.basename)
def test_libpython_after_the_first_verdict(lab: Lab, library: str) -> None:
    """P8: a program that loads a Python of its own after it connected: with `engine = "helper"` no engine is in its
    way; Python's own connections are on the SAN too."""
    environment = environment_of(library)
    command = [build_host("awkward_libpython"), str(lab.port), library, "global"]
    without = subprocess.run(command, env={**plain_environment(), **environment}, capture_output=True, timeout=60)
    assert without.stdout == b"T\nT\nT\n", without
    outcome = lab.run("function", *command, engine="helper", environment=environment)
    assert (outcome.letter, outcome.said) == ("status 0", "U\nU\nU\n"), outcome
    assert outcome.carried == ["unix"] * 3


@pytest.mark.parametrize("library", LIBPYTHONS, ids=os.path.basename)
def test_libpython_before_the_first_verdict(lab: Lab, library: str) -> None:
    """P8: a program that has loaded a Python, of whichever version, asks the helper without being told."""
    host = build_host("awkward_libpython")
    outcome = lab.run("function", host, lab.port, library, "global", "before", environment=environment_of(library))
    assert (outcome.letter, outcome.said) == ("status 0", "U\nU\n"), outcome
    assert outcome.carried == ["unix"] * 2
