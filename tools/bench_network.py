"""Rows of tools/bench with connections: our own client and server, real programs, and ten thousand at once."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import bench_machine as machine
import demo
import programs
import servers
from bench_report import Samples
from bench_run import (
    PORT,
    SAN_SIDE,
    TCP_SIDE,
    TURNING_TCP,
    Bench,
    ask,
    carried,
    expect_cubic,
    expect_san,
    look,
    memory_of,
    shared,
)
from programs import LOOPBACK, WAIT, Failed, Policy, Program, Programs

# ---- our own client and server


def net(role: str, port: int = PORT) -> list[str]:
    return [str(machine.host("bench_net")), role, str(port)]


@dataclass(frozen=True)
class Pinning:
    server: tuple[str, ...]
    client: tuple[str, ...]


def pinning(cpus: int) -> Pinning:
    first, second = machine.two_cpus() if cpus == 2 else (min(os.sched_getaffinity(0)),) * 2
    return Pinning(machine.on_cpu(first), machine.on_cpu(second))


def start_pair(
    bench: Bench, pins: Pinning, server: Policy | None, client: Policy | None, role: str = "serve", port: int = PORT
) -> tuple[Program, Program]:
    with bench.behind(*pins.server):
        serving = bench.apps.serve(net(role, port), server, port)
    with bench.behind(*pins.client):
        return serving, bench.apps.start(net("client", port), client, pipes=True)


def measure_connect(bench: Bench, cpus: int, interposed_server: bool = True) -> Samples:
    """Every figure in a name space of its own: after some seconds of connections most of TCP's ports wait for their
    end, and looking for a free one costs both sides milliseconds."""
    pins = pinning(cpus)
    most, ms = (300, 100) if bench.quick else (6000, 400)
    counts: list[int] = []
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:

        def measure(side: str) -> float:
            network = machine.Network()
            stack.callback(network.close)  # closing one now would make the kernel work beside the next figure
            with network.entered():
                switched = bench.san if side == SAN_SIDE else None
                server, client = start_pair(bench, pins, switched if interposed_server else None, switched)
                figure, control, made = ask(client, f"connect {most} {ms}")
                count = int(made)
                counts.append(count)
                if side == TCP_SIDE or not interposed_server:
                    expect_cubic([figure, control])
                if side == SAN_SIDE and interposed_server:
                    expect_san(client, count)
                    expect_san(server, count)
                elif side == SAN_SIDE:
                    counted = carried(client)
                    if counted["unix"] or counted["tcp"] < count:
                        raise Failed(f"{client} should have {count} connections on TCP; its counters: {dict(counted)}")
                    reasons.update({name: counted[name] for name in counted if name.isupper()})
                bench.stop(client)
                bench.stop(server)
            return float(figure)

        samples = bench.in_turn(measure)
    samples.extra["connections_each"] = statistics.median(counts)
    if not interposed_server:
        samples.extra["reasons"] = dict(reasons)
    return samples


def measure_exchange(bench: Bench, cpus: int, command: str, words: tuple[str, ...] = ()) -> Samples:
    """One connection for each figure, between programs that live through the row."""
    pins = pinning(cpus)
    ms = 50 if bench.quick else 400
    with bench.network(), bench.behind(*words):
        pairs = {
            side: start_pair(bench, pins, policy, policy, port=port)
            for side, policy, port in ((TCP_SIDE, None, PORT), (SAN_SIDE, bench.san, PORT + 1))
        }

        def measure(side: str) -> float:
            words = ask(pairs[side][1], f"{command} {ms}")
            if side == TCP_SIDE:
                expect_cubic(words)
            return float(words[0])

        samples = Samples()
        if command == "stream":
            samples.extra["companion_sndbuf"] = companion_buffer(pairs[SAN_SIDE][1], f"{command} 300")
        taken = bench.in_turn(measure)
        for program in pairs[SAN_SIDE]:
            expect_san(program, len(taken.san))
        for program in [program for pair in pairs.values() for program in reversed(pair)]:
            bench.stop(program)
    return Samples(taken.san, taken.tcp, samples.extra)


def companion_buffer(client: Program, command: str) -> int:
    """The send buffer of a companion while it is used, as the kernel counts it: twice what was set."""
    client.send(command)

    def seen() -> int:
        lines = subprocess.run(["ss", "-Hxm"], capture_output=True, text=True, timeout=WAIT, check=True).stdout
        found = [
            int(size) for line in lines.splitlines() if "@san1/C/" in line for size in re.findall(r"\btb(\d+)", line)
        ]
        return max(found, default=0)

    size = programs.wait_for(seen, "ss shows a companion's send buffer")
    client.line(WAIT * 6)
    return size


def measure_stream(bench: Bench, stock: bool) -> Samples:
    samples = measure_exchange(bench, 2, "stream", machine.stock_buffers() if stock else ())
    limit = 2 * machine.STOCK_WMEM_MAX
    buffer = samples.extra["companion_sndbuf"]
    if stock and buffer > limit:
        raise Failed(f"the companion's send buffer is {buffer} bytes, more than a stock kernel's {limit}")
    if not stock and buffer <= limit:
        raise Failed(f"large buffers are not allowed here: the companion's send buffer is {buffer} bytes; run as root")
    samples.extra["wmem_max"] = machine.STOCK_WMEM_MAX if stock else machine.wmem_max()
    return Samples([v / 1e9 for v in samples.san], [v / 1e9 for v in samples.tcp or []], samples.extra)


# ---- real programs


def measure_redis(bench: Bench, pipeline: int) -> Samples:
    count = (2_000 if bench.quick else 25_000) * (1 if pipeline == 1 else 12)

    def client(port: int, requests: int) -> list[str]:
        return [
            "redis-benchmark",
            "-h",
            LOOPBACK,
            "-p",
            str(port),
            "-c",
            "50",
            "-n",
            str(requests),
            "-t",
            "get",
            "--csv",
            "-P",
            str(pipeline),
        ]

    return between_programs(
        bench,
        servers.redis,
        lambda port: client(port, count),
        lambda port: client(port, 10**8),
        50,
        lambda text: demo.number(r'"GET","([\d.]+)"', text),
    )


def measure_nginx(bench: Bench, close: bool) -> Samples:
    site = bench.apps.directory / "site"
    if not site.exists():
        site.mkdir()
        (site / "small").write_bytes(b"small\n" * 100)

    def client(port: int, *options: str, seconds: int = 1) -> list[str]:
        return ["wrk", "-t", "1", "-c", "16", "-d", f"{seconds}s", *options, f"http://{LOOPBACK}:{port}/small"]

    def figure(text: str) -> float:
        if "Socket errors" in text or "Non-2xx" in text:
            raise ValueError(text)
        return demo.number(r"Requests/sec:\s*([\d.]+)", text)

    def server(apps: Programs, policy: Policy | None, port: int) -> Program:
        return servers.nginx(apps, policy, port, site)

    options = ("-H", "Connection: close") if close else ()
    return between_programs(
        bench,
        server,
        lambda port: client(port, *options),
        lambda port: client(port, seconds=60),
        16,
        figure,
        fresh=close,
    )


def between_programs(
    bench: Bench,
    serve: Callable[[Programs, Policy | None, int], Program],
    client: Callable[[int], list[str]],
    held: Callable[[int], list[str]],
    connections: int,
    figure: Callable[[str], float],
    fresh: bool = False,
) -> Samples:
    """`held`: a client for the look, which is ended. `fresh`: a server and a name space for each figure."""
    apps = bench.apps
    with ExitStack() as stack:

        def start(side: str) -> tuple[machine.Network, Program, int]:
            network = machine.Network()
            stack.callback(network.close)
            port = next(bench.ports)
            with network.entered():
                return network, serve(apps, bench.san if side == SAN_SIDE else None, port), port

        running = {side: start(side) for side in TURNING_TCP}
        for side, (network, server, port) in running.items():
            with network.entered():
                look(bench, side, server, held(port), connections, port)

        def measure(side: str) -> float:
            network, server, port = start(side) if fresh else running[side]
            with network.entered():
                policy = bench.san if side == SAN_SIDE else None
                program = apps.start(client(port), policy, pipes=True)
                output = program.finish().decode()
                apps.running.remove(program)
                if side == SAN_SIDE:
                    expect_san(server, connections)
                if fresh:
                    bench.stop(server)
            return figure(output)

        samples = bench.in_turn(measure)
        for network, server, _ in running.values():
            with network.entered():
                bench.stop(server)
    return samples


# ---- many connections


MANY = 10_000
FEW = 100


@dataclass(frozen=True)
class Crowd:
    working: dict[str, float]
    memory: dict[str, dict[str, float]]
    """Bytes for each connection, of client and server, by side."""
    extra: dict[str, Any]


@shared
def hold_many(bench: Bench) -> Crowd:
    limit, words = machine.many_files()
    if limit < MANY + 20:
        raise Failed(f"the hard limit of open files is {limit}, too few for {MANY} connections")
    working, memory = {}, {}
    extra: dict[str, Any] = {"open_files": limit}
    for side in TURNING_TCP:
        policy = bench.san if side == SAN_SIDE else None
        bench.progress.say(f"{bench.row}: {side}", detail=True)
        with bench.network(), bench.behind(*words):
            server, client = start_pair(bench, Pinning((), ()), policy, policy, "hold")
            ends = {"connect": client, "accept": server}
            answer = ask(client, f"hold {FEW}")
            if side == TCP_SIDE:
                expect_cubic(answer)
            before = {name: memory_of(end.pid, "Private_Dirty") for name, end in ends.items()}
            working[side] = float(ask(client, f"hold {MANY}", 120)[0])
            memory[side] = {
                name: (memory_of(end.pid, "Private_Dirty") - before[name]) / (MANY - FEW) for name, end in ends.items()
            }
            if side == SAN_SIDE:
                extra["carried"] = {
                    name: {key: value for key, value in carried(end).items() if value} for name, end in ends.items()
                }
                expect_crowd(extra["carried"])
            bench.stop(client)
            bench.stop(server)
    return Crowd(working, memory, extra)


def expect_crowd(counted: Mapping[str, Mapping[str, int]]) -> None:
    """All but the last few, for which descriptors may not suffice, are on the SAN."""
    for name, counts in counted.items():
        if counts.get("unix", 0) < MANY * 0.9:
            raise Failed(f"of {MANY} connections too few are on the SAN ({name}): {dict(counts)}")


def measure_crowd(bench: Bench) -> Samples:
    crowd = hold_many(bench)
    return Samples([crowd.working[SAN_SIDE]], [crowd.working[TCP_SIDE]], crowd.extra | {"exact": True})


def measure_memory(bench: Bench, end: str) -> Samples:
    crowd = hold_many(bench)
    return Samples([crowd.memory[SAN_SIDE][end]], [crowd.memory[TCP_SIDE][end]], crowd.extra)
