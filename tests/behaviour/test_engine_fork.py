"""The engine and fork: children can ask at once, and no fork waits for Python for long."""

from __future__ import annotations

import engine_support as support
import pytest
from engine_support import EMBEDDED, SAN, TCP, run, verdicts, write_table

from interposer.policy import reasons

FUNCTIONS = """
import time
def slow(request):
    time.sleep(0.4)
    return "unix"
def fine(request):
    return "unix"
def loops(request):
    while True:
        pass
"""


def table_of(directory, *names: str, timeout_ms: int = 2000) -> str:
    rules = "".join(support.FIRST.format(port=81 + i, name=name) for i, name in enumerate(names))
    return write_table(directory, support.DEFAULTS + f"timeout_ms = {timeout_ms}\n" + rules, FUNCTIONS)


@pytest.mark.parametrize("askers", [0, 2])
def test_forks_while_deciding(tmp_path, askers):
    """T4, P5: 4 threads fork 50 children each while others ask: each child asks rules and a function, none hangs."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "forks", 4, 50, askers, "both", timeout=120)
    assert "good=200 refused=0 bad=0" in output, output


# What 8 threads ask: the compiled rules' function, as with `embedded`; Python for every decision, as with `reactive`;
# or both in turn, as with `reactive` and rules that call a function.
@pytest.mark.parametrize("what", ["function", "rules", "both"])
@pytest.mark.parametrize("forks", [100, pytest.param(2000, marks=pytest.mark.long)])
def test_forks_while_eight_threads_decide(tmp_path, what, forks):
    """T4, P5: no fork hangs, and every child decides at once or says that it has no engine."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "forks", 2, forks // 2, 8, what, timeout=600)
    (counts,) = support.fields(output, "good")
    assert int(counts["good"]) + int(counts["refused"]) == forks, output
    assert counts["bad"] == "0"
    assert int(counts["good"]) > forks * 0.9, "fork gave up on the engine"
    assert int(counts["asked"]) > forks


def test_programs_started_while_deciding(tmp_path):
    """T4: posix_spawn and vfork go by the engine, which goes on deciding."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "spawns", 100, 8, timeout=120)
    assert "good=100 bad=0" in output, output
    assert verdicts(output, "after") == [(SAN, 0)]


def test_a_slow_function_does_not_hold_up_fork(tmp_path):
    """P5, O1: fork waits 50 ms for a function; then the child has no engine, and the parent keeps its own."""
    output = run(table_of(tmp_path, "slow", "fine"), EMBEDDED, "fork-slow")
    (fork,) = support.fields(output, "fork_ms")
    assert 40 < float(fork["fork_ms"]) < 150
    assert verdicts(output, "child") == [(TCP, reasons.ENGINE_FORKED)]
    assert verdicts(output, "slow") == [(SAN, 0)]
    assert verdicts(output, "parent") == [(SAN, 0)]


def test_a_function_that_loops_does_not_hold_up_fork(tmp_path):
    """P5, O1: nor does one that never lets go of Python by itself; it is interrupted when its time is over."""
    output = run(table_of(tmp_path, "loops", "fine", timeout_ms=200), EMBEDDED, "fork-slow")
    (fork,) = support.fields(output, "fork_ms")
    assert float(fork["fork_ms"]) < 150
    assert verdicts(output, "child") == [(TCP, reasons.ENGINE_FORKED)]
    assert verdicts(output, "slow") == [(TCP, reasons.FUNCTION_TIMEOUT)]
    assert verdicts(output, "parent") == [(SAN, 0)]


def test_children_that_no_handler_saw(tmp_path):
    """T4, O1: a child made by a raw clone or by vfork never enters Python, and the parent is not disturbed."""
    table = write_table(tmp_path, support.DEFAULTS + support.FIRST.format(port=79, name="fine"), FUNCTIONS)
    output = run(table, EMBEDDED, "raw-fork")
    assert verdicts(output, "raw") == [(TCP, reasons.ENGINE_FORKED)] * 2
    assert verdicts(output, "vfork") == [(TCP, reasons.ENGINE_FORKED)] * 2
    assert verdicts(output, "parent") == [(SAN, 0)] * 3
