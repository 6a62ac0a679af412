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
"""


def table_of(directory, *names: str) -> str:
    rules = "".join(support.FIRST.format(port=81 + i, name=name) for i, name in enumerate(names))
    return write_table(directory, support.DEFAULTS + "timeout_ms = 2000\n" + rules, FUNCTIONS)


@pytest.mark.parametrize("askers", [0, 2])
def test_forks_while_deciding(tmp_path, askers):
    """T4, P5: 4 threads fork 50 children each while others ask: each child asks rules and a function, none hangs."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "forks", 4, 50, askers, timeout=120)
    assert "good=200 bad=0" in output, output


def test_a_slow_function_does_not_hold_up_fork(tmp_path):
    """P5, O1: fork waits 50 ms for a function; then the child has no engine, and the parent keeps its own."""
    output = run(table_of(tmp_path, "slow", "fine"), EMBEDDED, "fork-slow")
    (fork,) = support.fields(output, "fork_ms")
    assert 40 < float(fork["fork_ms"]) < 150
    assert verdicts(output, "child") == [(TCP, reasons.ENGINE_FORKED)]
    assert verdicts(output, "slow") == [(SAN, 0)]
    assert verdicts(output, "parent") == [(SAN, 0)]


def test_children_that_no_handler_saw(tmp_path):
    """T4, O1: a child made by a raw clone or by vfork never enters Python, and the parent is not disturbed."""
    output = run(write_table(tmp_path), EMBEDDED, "raw-fork")
    assert verdicts(output, "raw") == [(TCP, reasons.ENGINE_FORKED)]
    assert verdicts(output, "vfork") == [(TCP, reasons.ENGINE_FORKED)]
    assert verdicts(output, "parent") == [(SAN, 0)] * 2
