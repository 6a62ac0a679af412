"""The rows of tools/bench, and their bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import bench_costs as costs
import bench_network as network
from bench_report import Row, Samples
from bench_run import Bench
from programs import LOOPBACK

Measure = Callable[[Bench], Samples]

SERIAL = "connect, accept, a byte each way, close, one after the other"
UNMOVED = "of a connection that no rule moves"


def moved() -> Iterator[tuple[Row, Measure]]:
    """Both ends on the SAN, against both on TCP."""

    def rate(name: str, meaning: str, unit: str, bar: float) -> Row:
        return Row(name, meaning, unit, "unix", bar)

    for cpus, where, rate_bar, time_bar in ((2, "two CPUs", 1.15, 0.80), (1, "one CPU", 1.5, 0.68)):
        yield (rate(f"connect-{cpus}cpu", f"{SERIAL}; {where}", "connections/s", rate_bar),
               partial(network.measure_connect, cpus=cpus))
        yield (Row(f"roundtrip-{cpus}cpu", f"round trip of 64 bytes, blocking; {where}", "us", "unix", time_bar,
                   better="lower"),
               partial(network.measure_exchange, cpus=cpus, command="roundtrip"))
    yield (rate("stream-large", "stream of writes of 128 KiB; large buffers allowed", "GB/s", 1.3),
           partial(network.measure_stream, stock=False))
    yield (rate("stream-stock", "stream of writes of 128 KiB; stock wmem_max", "GB/s", 1.1),
           partial(network.measure_stream, stock=True))
    for pipeline, bar in ((1, 1.3), (16, 1.2)):
        yield (rate(f"redis-p{pipeline}", f"redis-benchmark GET -c 50 -P {pipeline}", "requests/s", bar),
               partial(network.measure_redis, pipeline=pipeline))
    yield (rate("nginx-keepalive", "nginx, wrk -c 16, 600 bytes; keep-alive", "requests/s", 1.4),
           partial(network.measure_nginx, close=False))
    yield (rate("nginx-close", "nginx, wrk -c 16, 600 bytes; Connection: close", "requests/s", 1.5),
           partial(network.measure_nginx, close=True))


def unmoved() -> Iterator[tuple[Row, Measure]]:
    """What the switch costs connections that stay on TCP."""
    yield (Row("connect-plain-server", f"{SERIAL}; the server is not interposed", "connections/s", "tcp", 0.90),
           partial(network.measure_connect, cpus=2, interposed_server=False))
    for call in costs.COUNTED_CALLS:
        yield (Row(f"syscalls-{call}", f"system calls in one `{call}` {UNMOVED}", "system calls", "tcp", 0, "added",
                   "lower"),
               partial(costs.measure_system_calls, call=call))
    for call in (*costs.DATA_CALLS, *costs.OTHER_CALLS):
        yield (Row(f"instructions-{call}", f"instructions in one `{call}` {UNMOVED}", "instructions", "tcp", 60,
                   "added", "lower"),
               partial(costs.measure_instructions, call=call))


def deciding() -> Iterator[tuple[Row, Measure]]:
    for name, rules, address, port, what, bar in (
        ("decide-0", "", LOOPBACK, 1000, "without rules", None),
        ("decide-1000-ports", costs.BY_PORT, LOOPBACK, 1000, "1,000 rules by port", 100.0),
        ("decide-1000-prefixes", costs.BY_PREFIX, "10.3.249.7", 80, "1,000 rules by prefix", 100.0),
    ):
        yield (Row(name, f"flow table decision, {what}", "ns", None, bar, "san", "lower"),
               partial(costs.measure_decision, name=name, rules=rules, address=address, port=port))
    yield (Row("upcall", "decision that asks a user's function", "us", None, 3.0, "san", "lower"),
           partial(costs.measure_upcall, cpus=2))
    yield (Row("upcall-1cpu", "decision that asks a user's function; one CPU", "us", None, None, "san", "lower"),
           partial(costs.measure_upcall, cpus=1))


def crowds() -> Iterator[tuple[Row, Measure]]:
    yield (Row("connections-10000", "10,000 connections open at once in one process, that work", "connections", "unix",
               network.MANY, "san"),
           network.measure_crowd)
    for end, which in (("connect", "connecting"), ("accept", "accepting")):
        yield (Row(f"memory-{end}", f"memory of the {which} process for each of 10,000 connections", "bytes", "unix",
                   1024, "added", "lower"),
               partial(network.measure_memory, end=end))


def starting() -> Iterator[tuple[Row, Measure]]:
    yield (Row("start-preload", "`true` with the library preloaded", "ms", None, None, "added", "lower"),
           partial(costs.measure_start, launcher=False))
    yield (Row("start-sanrun", "`sanrun true` with a policy file", "ms", None, None, "added", "lower"),
           partial(costs.measure_start, launcher=True))
    yield (Row("start-engine", "the policy engine's start, at the first question to a function", "ms", None, None,
               "san", "lower"),
           costs.measure_engine_start)
    yield (Row("memory-engine", "resident memory of the policy engine", "KiB", None, None, "san", "lower"),
           costs.measure_engine_memory)


ROWS = [*moved(), *unmoved(), *deciding(), *crowds(), *starting()]
