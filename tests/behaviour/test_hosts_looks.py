"""Programs that look at themselves, and programs that are kept short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from awkward import KINDS, Lab, build_host
from puppet import plain_environment

ENGINE = ("function", "reactive")
LOOKS = (*KINDS, "loud")
GIVEN = "abcdefghi"


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A directory with tr_TR.UTF-8, in which a comma stands in numbers and i is no capital I; None where the machine
    has no sources of locales."""
    directory = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "tr_TR", "-f", "UTF-8", directory / "tr_TR.UTF-8"]
    if not shutil.which("localedef") or subprocess.run(command, capture_output=True, timeout=60).returncode:
        return None
    return directory


@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("handling, ends", [("default", "SIGINT"), ("ignored", "status 0"), ("handled", "status 1")])
def test_nothing_is_changed(lab: Lab, handling: str, ends: str, kind: str) -> None:
    """P5, X8, T12, O3: locale, numbers, time zone, signals (handlers, masks, what is pending, timers), descriptors and
    their offsets, limits, threads, environment, rounding, floating-point flags, dlerror: all are after a connection and
    a listener what they were, under a function that prints and imports signal and asyncio too; and SIGINT does then
    what the program wants it to do."""
    outcome = lab.run(kind, build_host("awkward_looks"), lab.port, handling, given=GIVEN)
    assert (outcome.letter, outcome.said) == (ends, "UUU\n"), outcome
    assert outcome.carried == ["unix"] * 3


@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("name", ["C.UTF-8", "tr_TR.UTF-8"])
def test_locale_of_the_program(lab: Lab, locales: Path | None, name: str, kind: str) -> None:
    """P5, X8: a program that works in a locale of its own writes and reads numbers, and has letters, as before."""
    if name != "C.UTF-8" and not locales:
        pytest.skip(f"{name} cannot be made: localedef or its sources (Debian's package locales) are missing")
    environment = {"LC_ALL": name, "LOCPATH": str(locales or "")}
    outcome = lab.run(
        kind, build_host("awkward_looks"), lab.port, "default", name, given=GIVEN, environment=environment
    )
    assert (outcome.letter, outcome.said) == ("SIGINT", "UUU\n"), outcome
    assert outcome.carried == ["unix"] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [6, 7, 8, 16])
def test_few_descriptors(lab: Lab, limit: int, kind: str) -> None:
    """X6: a program that may have so few descriptors, which is what it needs, gets all of them: it works, on TCP."""
    command = f"ulimit -n {limit} && exec {build_host('awkward_places')} {lab.port} nothing"
    without = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert without.stdout == "nothing TTT\n"
    outcome = lab.run(kind, "bash", "-c", command)
    assert (outcome.letter, outcome.said) == ("status 0", "nothing TTT\n"), outcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", ["-f 0", "-f 1", "-Sn 8", "-l 0", "-q 0", "-t 20"])
def test_other_limits(lab: Lab, limit: str, kind: str) -> None:
    """X6, O3: no file, no locked memory, no message queues, a soft limit of 8 descriptors: the SAN is used as ever, and
    the log, which is not to grow, is left as it is instead of SIGXFSZ."""
    command = f"ulimit {limit} && exec {build_host('awkward_places')} {lab.port} nothing"
    outcome = lab.run(kind, "bash", "-c", command)
    assert (outcome.letter, outcome.said) == ("status 0", "nothing UUU\n"), outcome
    assert len(outcome.log) <= {"-f 0": 0, "-f 1": 1024}.get(limit, 1 << 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("kind", KINDS)
def test_no_threads(lab: Lab, kind: str) -> None:
    """X6, P5, O1: a user who may have no further process: an engine, which starts on a thread, is refused with its
    reason (the helper is root's here, and answers nobody else)."""
    command = f"ulimit -u 0 && exec {build_host('awkward_client')} {lab.port}"
    outcome = lab.run(kind, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c", command)
    expected = ("U", ["unix"]) if kind == "plain" else ("T", ["ENGINE_FAILED"])
    assert (outcome.letter, outcome.carried) == expected, outcome


def sweep(lab: Lab, kind: str, sizes: range) -> None:
    """A client with so many KiB of address space, in turn."""
    client = build_host("awkward_client")
    for size in sizes:
        command = ["bash", "-c", f"ulimit -v {size} && exec {client} {lab.port}"]
        plain = subprocess.run(command, env=plain_environment(), capture_output=True, timeout=30)
        if plain.returncode != ord("T"):
            continue  # too little for libc itself
        outcome = lab.run(kind, *command, quiet=False)
        if "error while loading shared libraries" in outcome.complaints:
            continue
        assert outcome.letter in ("U", "T") and outcome.complaints == "", (size, outcome)
        reasons = {"ENGINE_FAILED", "NO_MEMORY", "FUNCTION_MISSING", "FUNCTION_RAISED", "FUNCTION_TIMEOUT"}
        assert set(outcome.carried) <= {"unix", *reasons}, (size, outcome)


@pytest.mark.parametrize("kind", LOOKS)
def test_little_memory(lab: Lab, kind: str) -> None:
    """X6, P5: with whatever little memory Python would have, a program goes on: with the helper, or by TCP."""
    sweep(lab, kind, range(12000, 44000, 3000))


@pytest.mark.long
@pytest.mark.parametrize("kind", LOOKS)
def test_every_little_memory(lab: Lab, kind: str) -> None:
    """X6, P5: the same in small steps."""
    sweep(lab, kind, range(2500, 90000, 300))


@pytest.mark.parametrize("kind", ENGINE)
def test_engine_is_not_in_the_way_of_arithmetic(lab: Lab, kind: str) -> None:
    """P5, X8: a program in which an inexact result is a signal is not ended by the engine's arithmetic."""
    outcome = lab.run(kind, build_host("awkward_client"), lab.port, environment={"AWKWARD_TRAPS": "1"})
    assert (outcome.letter, outcome.carried) == ("U", ["unix"]), outcome


def test_outcome_reads_the_log(lab: Lab) -> None:
    """O1: what these tests go by: the log names what carried each connection."""
    outcome = lab.run("plain", build_host("awkward_client"), lab.port)
    assert re.search(r" connect fd 3: provider unix\n", outcome.log)
    assert outcome.carried == ["unix"]
