"""Eight workers at one listener: who is woken, and how often."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median

import pytest
from puppet import build, plain_environment, switched_environment

from interposer.diag import stats

WORKERS, CONNECTIONS = 8, 240
WAIT = 20
TRIES = 4
# In these TCP wakes one worker for each connection, in the others all of them.
ONE_WAKES = ["accept", "threads", "exclusive", "oneshot", "edge-threads"]
ALL_WAKE = ["edge", "level", "nested", "mixed"]


@dataclass(frozen=True)
class Seen:
    switches: float
    """Context switches of all workers, for each connection."""
    vain: float
    """How often one found nothing to accept, for each connection."""
    served: list[int]
    """Connections of each worker."""


@contextmanager
def running(*words: str, san: bool) -> Iterator[subprocess.Popen[str]]:
    environment = switched_environment("--provider", "unix") if san else plain_environment()
    process = subprocess.Popen(
        [build("herd", "-pthread"), *words],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the number is its own
        process.communicate()


def line_of(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout
    assert select.select([process.stdout], [], [], WAIT)[0], f"{what}: nothing after {WAIT} s"
    return process.stdout.readline()


def herd(mode: str, at_once: int, san: bool) -> Seen:
    with running("serve", mode, str(WORKERS), str(CONNECTIONS), san=san) as server:
        port = line_of(server, f"{mode} server").strip()
        with running("ask", port, str(CONNECTIONS), str(at_once), san=san) as client:
            assert line_of(client, f"{mode} clients") == "done\n"
            line = line_of(server, f"{mode} server").split()
            if san:
                assert stats.process(client.pid).connections == {"unix": CONNECTIONS, "tcp": 0}
    switches, vain, *served = map(int, line)
    assert sum(served) == CONNECTIONS
    return Seen(switches / CONNECTIONS, vain / CONNECTIONS, served)


@pytest.mark.parametrize("mode", ONE_WAKES + ALL_WAKE)
def test_switches(mode: str) -> None:
    """T2: with eight workers on one listener, context switches for each connection stay within 1.5 times TCP's;
    where TCP wakes one, nobody is woken in vain. Other work on this machine adds to the switches where one is woken:
    the quietest of a few runs counts. Where all are it may take most of them away, so that the median counts."""
    count = median if mode in ALL_WAKE else min
    tcp: list[Seen] = []
    san: list[Seen] = []
    for _ in range(TRIES):
        tcp.append(herd(mode, 1, san=False))
        san.append(herd(mode, 1, san=True))
        few = count(each.switches for each in san) <= 1.5 * count(each.switches for each in tcp)
        if few and (mode in ALL_WAKE or min(each.vain for each in san) <= 0.1):
            return
    pytest.fail(f"{mode}: {san} on the SAN, {tcp} on TCP")


@pytest.mark.parametrize("at_once", [3, 8, 24])
@pytest.mark.parametrize("mode", ONE_WAKES + ALL_WAKE)
def test_nobody_sleeps_on(mode: str, at_once: int) -> None:
    """T2: however many clients come at once, each is served, though every worker that was woken serves only one or,
    edge-triggered, all there are."""
    seen = herd(mode, at_once, san=True)
    if mode in ONE_WAKES and at_once == 8:
        assert sum(each > 0 for each in seen.served) > 1, "one worker did it all"
