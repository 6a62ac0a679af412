"""One run of tools/bench: what it starts, how figures of both sides are taken in turn, and the proof that each side was
where it should be."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import bench_machine as machine
import programs
from bench_report import Samples
from programs import WAIT, Failed, Policy, Program, Programs

from interposer.diag import stats

SAN = """\
version = 1

[defaults]
providers = ["unix"]
"""
ON_TCP = """\
version = 1

[[rule]]
role = "both"
use = "tcp"
"""
PORT = 7000
"""Any port is free in a network name space of one's own."""
TCP_SIDE, SAN_SIDE = "tcp", "san"
TURNING_TCP, TURNING_SAN = (TCP_SIDE, SAN_SIDE), (SAN_SIDE, TCP_SIDE)


class Progress(Protocol):
    def say(self, text: str, detail: bool = False) -> None: ...


class Bench:
    """One run: what is started, and what several rows share."""

    def __init__(self, pairs: int, quick: bool, progress: Progress) -> None:
        self.pairs = pairs
        self.quick = quick
        self.progress = progress
        self.shared: dict[str, Any] = {}
        """Results, and failures, of what several rows measure together."""
        self.apps = Programs()
        self.apps.prefix = machine.unprivileged()
        self.san = self.apps.policy("san", SAN)
        self.on_tcp = self.apps.policy("tcp", ON_TCP)
        self.row = ""
        self.ports = iter(range(PORT + 2, 65536))
        """For servers that leave files under the name of their port."""

    def close(self) -> list[str]:
        """Ends what is left of a row; returns what should not have been there."""
        return self.apps.close()

    # ---- starting and ending

    @contextmanager
    def behind(self, *words: str) -> Iterator[None]:
        before = self.apps.prefix
        self.apps.prefix = (*before, *words)
        try:
            yield
        finally:
            self.apps.prefix = before

    def stop(self, program: Program) -> None:
        self.apps.stop(program)
        self.apps.running.remove(program)

    @contextmanager
    def network(self) -> Iterator[machine.Network]:
        """A name space that this process is in."""
        network = machine.Network()
        try:
            with network.entered():
                yield network
        finally:
            network.close()

    def environment_under(self, policy: Policy) -> dict[str, str]:
        """What sanrun gives to a program."""
        output = self.apps.run(["/usr/bin/env", "-0"], policy).decode()
        return dict(entry.split("=", 1) for entry in output.split("\0") if "=" in entry)

    def preloaded(self, policy: Policy) -> dict[str, str]:
        """An environment in which programs are interposed without a launcher before them."""
        given = self.environment_under(policy)
        return self.apps.environment() | {name: given[name] for name in ("LD_PRELOAD", "INTERPOSER_TABLE")}

    # ---- measuring

    def in_turn(self, measure: Callable[[str], float], pairs: int | None = None) -> Samples:
        """One figure of each side, in turns: each side goes first as often as second."""
        figures: dict[str, list[float]] = {TCP_SIDE: [], SAN_SIDE: []}
        count = pairs or self.pairs
        for turn in range(count):
            self.progress.say(f"{self.row}: pair {turn + 1} of {count}", detail=True)
            for side in TURNING_SAN if turn % 2 else TURNING_TCP:
                figures[side].append(measure(side))
        return Samples(figures[SAN_SIDE], figures[TCP_SIDE])

    def alone(self, measure: Callable[[], float]) -> Samples:
        taken = []
        for turn in range(self.pairs):
            self.progress.say(f"{self.row}: {turn + 1} of {self.pairs}", detail=True)
            taken.append(measure())
        return Samples(taken)


T = TypeVar("T")


def shared(measure: Callable[[Bench], T]) -> Callable[[Bench], T]:
    """Measures once in a run, for all rows that need it; a failure is the same for all."""

    @functools.wraps(measure)
    def once(bench: Bench) -> T:
        name = measure.__name__
        if name not in bench.shared:
            try:
                bench.shared[name] = measure(bench)
            except (Failed, ValueError, OSError, subprocess.SubprocessError) as failure:
                bench.shared[name] = failure
        found = bench.shared[name]
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    return once


# ---- proofs


def carried(program: Program) -> Counter[str]:
    """Connections by provider, and reasons, over all processes of an interposed program."""
    total: Counter[str] = Counter()
    for pid in program.pids:
        try:
            process = stats.process(pid)
        except (stats.ProcessError, stats.PageError):
            continue
        total.update(process.connections)
        total.update(process.reasons)
    return total


def expect_san(program: Program, least: int) -> None:
    counted = carried(program)
    if counted["tcp"] or counted["unix"] < least:
        raise Failed(
            f"{program} should have {least} connections on the SAN and none on TCP; its counters: {dict(counted)}"
        )


def expect_cubic(words: Sequence[str]) -> None:
    """Of a small program's answer, whose second word is what its TCP connection used."""
    if list(words[1:]) != [machine.CUBIC]:
        raise Failed(f"the TCP side used {' '.join(words[1:])} instead of cubic")


def look(bench: Bench, side: str, server: Program, client: Sequence[str], connections: int, port: int) -> None:
    """Runs `client` once more, and stops it for a look at where its connections are: by our counters and the kernel's
    list on the SAN, by the kernel's list with cubic on TCP. Raises Failed."""
    held = bench.apps.start(client, bench.san if side == SAN_SIDE else None, pipes=True)

    def arrived() -> bool:
        now = programs.kernel(port)
        return (len(now.connecting) if side == SAN_SIDE else len(now.tcp) // 2) >= connections

    programs.wait_for(arrived, f"{held} has {connections} connections on the {side} side")
    with held.frozen():
        now = programs.kernel(port)
        if side == SAN_SIDE:
            if now.tcp or min(len(now.connecting), len(now.accepted)) < connections:
                raise Failed(f"the kernel shows\n{now}")
            for program in (held, server):
                expect_san(program, connections)
        else:
            command = ["ss", "-Htin", "state", "established", f"( sport = :{port} or dport = :{port} )"]
            lines = subprocess.run(
                command, capture_output=True, text=True, timeout=WAIT, check=True
            ).stdout.splitlines()
            inside = [line for line in lines if line.startswith((" ", "\t"))]
            if len(inside) < 2 * connections or not all(re.search(r"\bcubic\b", line) for line in inside):
                raise Failed("not all TCP connections use cubic:\n" + "\n".join(inside))
    bench.stop(held)


# ---- talking to small programs


def ask(client: Program, command: str, seconds: float = WAIT * 6) -> list[str]:
    client.send(command)
    return client.line(seconds).split()


def memory_of(pid: int, field: str) -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise Failed(f"no {field} in smaps_rollup")
