"""Programs that connect from small stacks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from awkward import KINDS, Lab, build_host
from puppet import plain_environment


def stacks() -> Path:
    return build_host("awkward_stacks")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8192, 16384, 65536, 262144])
@pytest.mark.parametrize("where", ["thread", "coroutine", "signal"])
def test_small_stack(lab: Lab, where: str, size: int, kind: str) -> None:
    """P8, T12: connect, listen and accept on stacks from 8 KiB, with a page below that must not be touched: of threads,
    of coroutines, of signal handlers. Where Python has no room the helper is asked."""
    if where == "thread" and size < 16384:
        size = 16384  # PTHREAD_STACK_MIN
    outcome = lab.run(kind, stacks(), lab.port, where, size)
    assert (outcome.letter, outcome.said) == ("status 0", "UUU\n"), outcome
    assert outcome.carried == ["unix"] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [32, 64, 128, 1024])
def test_small_stack_of_the_main_thread(lab: Lab, limit: int, kind: str) -> None:
    """P8: a program started with a stack limit of so many KiB (with 16, libc itself fails now and then)."""
    outcome = lab.run(kind, "sh", "-c", f"ulimit -s {limit} && exec {stacks()} {lab.port} main 0")
    assert (outcome.letter, outcome.said) == ("status 0", "UUU\n"), outcome
    assert outcome.carried == ["unix"] * 4


def test_depth_of_a_connection(lab: Lab) -> None:
    """P8, X8: without code in the policy a connection needs at most 4 KiB of stack beyond what libc needs."""
    command = [stacks(), str(lab.port), "depth", str(1 << 20)]
    plain = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=30, check=True)
    outcome = lab.run("plain", *command)
    assert outcome.said.endswith("\nU\n"), outcome
    depth, without = (int(said.split()[1]) for said in (outcome.said, plain.stdout))
    assert without < depth < without + 4096
