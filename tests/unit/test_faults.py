"""Every call to the kernel that the switch makes fails, one after the other: TCP's result, and nothing is left."""

from __future__ import annotations

import re
import subprocess

import pytest
from build_c import SANITIZER_OPTIONS, switch_host
from puppet import switched_environment

SCENARIOS = (
    "socket",
    "listen",
    "connect",
    "connect_nonblocking",
    "connect_registered",
    "accept",
    "accept_nonblocking",
    "epoll_ctl",
    "listen_registered",
    "poll",
    "dup",
    "options",
    "close",
)
WRAPPED = (
    "mmap",
    "ftruncate",
    "epoll_wait",
    "prlimit",
    "madvise",
    "getrandom",
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_call_fails(scenario: str) -> None:
    """X6, S7, S14, T12: the n-th call of each kind fails, for all n, with every error that the kernel may give, once
    and from then on: TCP's result, no error that is not TCP's, no descriptor left, and the next connections work."""
    program = switch_host("fault_host", "address", ("fault_host.c",), wrapped=WRAPPED)
    environment = {name: value for name, value in switched_environment().items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        [program, scenario], env={**environment, **SANITIZER_OPTIONS}, capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stdout[-3000:] + run.stderr[-6000:]
    counted = re.match(r"(\d+) faults, 0 failures", run.stdout)
    assert counted
    assert int(counted[1]) >= 4
