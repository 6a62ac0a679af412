"""Sixteen threads that connect, accept, duplicate, close, shut down, set options, register in epolls and fork, every
byte of them verified (hosts/stress_host.c), and four whose signal handlers make socket calls of their own and fork
(hosts/signal_host.c): under the sanitizers, and with the library preloaded, under helgrind too."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from build_c import HOSTS, SANITIZER_OPTIONS, switch_host
from puppet import build, switched_environment

from interposer.diag import stats

SECONDS = [10, pytest.param(60, marks=pytest.mark.long)]
# The thousands of ports that wait after their TCP connections would be missing to the tests that follow.
NAME_SPACE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def counts(
    command: Sequence[str | Path], seconds: int, environment: dict[str, str]
) -> tuple[dict[str, int], dict[str, int]]:
    """What the host counted, and its connections by provider: most are on the SAN. Nothing was amiss, and
    nothing was written to stderr."""
    seed = int.from_bytes(os.urandom(2))
    print(f"seed {seed}")
    run = subprocess.Popen(
        [*NAME_SPACE, *command, str(seconds * 1000), str(seed)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    line = run.stdout.readline() if wait_for_line(run, seconds + 120) else ""
    carried = stats.process(run.pid).connections if line else {}
    try:
        _, said = run.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    assert (run.returncode, said) == (0, ""), said[-6000:]
    counted: dict[str, int] = json.loads(line)
    print(counted, carried)
    assert carried["unix"] > carried["tcp"], carried   # a fork between socket() and connect() means TCP
    return counted, carried


def stressed(command: Sequence[str | Path], seconds: int, environment: dict[str, str]) -> dict[str, int]:
    counted, _ = counts(command, seconds, environment)
    assert counted["after"] == counted["before"]
    assert counted["made"] > 10 and counted["forked"] > 2 and counted["relistened"] > 2, counted
    return counted


def interrupted(command: Sequence[str | Path], seconds: int, environment: dict[str, str]) -> None:
    counted, carried = counts(command, seconds, environment)
    assert min(counted[name] for name in ("connected", "juggled", "pumped", "handled", "joined")) > 20, counted
    assert counted["forked"] > 2, counted
    assert counted["after"] <= counted["before"] + 3, counted   # some are made once, when first needed
    assert carried["unix"] > counted["joined"] / 2, (counted, carried)


def wait_for_line(run: subprocess.Popen[str], seconds: int) -> bool:
    assert run.stdout
    ready = bool(select.select([run.stdout], [], [], seconds)[0])
    if not ready:
        run.kill()
    return ready


def sanitized_environment(tmp_path: Path) -> dict[str, str]:
    # gcc 12's thread sanitizer does not know pthread_mutex_clocklock(), which took this lock.
    (tmp_path / "suppressions").write_text("mutex:engine_after_fork_parent\n")
    options = {**SANITIZER_OPTIONS}
    options["TSAN_OPTIONS"] += f":suppressions={tmp_path}/suppressions:print_suppressions=0"
    environment = {name: value for name, value in switched_environment().items() if name != "LD_PRELOAD"}
    return {**environment, **options}


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitized(sanitizer: str, seconds: int, tmp_path: Path) -> None:
    """T13, T4, T9, T3: no report of the address, undefined-behaviour and thread sanitizers."""
    program = switch_host("stress_host", sanitizer, ("stress_host.c",))
    stressed([program], seconds, sanitized_environment(tmp_path))


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.long)])
def test_handlers(seconds: int) -> None:
    """T12, T4, T9: signal handlers that interrupt socket calls make their own, on sockets of their own and on the one
    that the interrupted call is about, and fork; nothing hangs, all bytes are right, and so is errno."""
    interrupted([build("signal_host", "-pthread")], seconds, switched_environment())


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_handlers_sanitized(sanitizer: str, seconds: int, tmp_path: Path) -> None:
    """T12, T4, T9: the same, with no report of the sanitizers; the thread sanitizer knows unsafe calls of handlers."""
    program = switch_host("signal_host", sanitizer, ("signal_host.c",))
    interrupted([program], seconds, sanitized_environment(tmp_path))


@pytest.mark.parametrize("seconds", SECONDS)
def test_preloaded(seconds: int) -> None:
    """T13, T4, T9, T3, T11: the same with the library preloaded: all bytes arrive, no descriptor is left."""
    assert stressed([build("stress_host", "-pthread")], seconds, switched_environment())["made"] > 100


@pytest.mark.parametrize("seconds", SECONDS)
def test_helgrind(seconds: int, tmp_path: Path) -> None:
    """T13: no report of helgrind beyond what it cannot know (hosts/helgrind.supp)."""
    log = tmp_path / "helgrind"
    command = ["valgrind", "--tool=helgrind", "--child-silent-after-fork=yes", "--fair-sched=yes", f"--log-file={log}",
               f"--suppressions={HOSTS}/helgrind.supp", build("stress_host", "-pthread")]  # fmt: skip
    stressed(command, seconds, switched_environment())
    text = log.read_text()
    summary = re.search(r"ERROR SUMMARY: (\d+) errors from", text)
    assert summary and summary[1] == "0", text[-6000:]
