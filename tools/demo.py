"""Real programs on the SAN and on TCP: who carried their connections, and how fast.

Runs in a network name space of its own, where TCP can be given cubic without changing the machine. Progress goes to
stderr, the table to stdout. Exit status: 0, or 1 when a connection that should be on the SAN was not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import programs
import servers
from programs import LOOPBACK, ROOT, Failed, Policy, Program, Programs

INSIDE = "INTERPOSER_DEMO_INSIDE"
ROUNDS = 5
POLICY = """\
version = 1

[defaults]
providers = ["unix"]
"""

PREPARE = """\
ip link set lo up
for prefix in 127.0.0.0/8 127.0.0.1; do
  ip route change local "$prefix" dev lo proto kernel scope host src 127.0.0.1 table local congctl cubic
done
"""


@dataclass(frozen=True)
class Case:
    name: str
    unit: str
    connections: int
    """That the client holds at the same time, at least."""
    server: Callable[[Programs, Policy | None, int], Program]
    client: Callable[[int], list[str]]
    result: Callable[[str], float]
    """The figure in what the client printed; raises ValueError."""
    held: Callable[[int], list[str]] | None = None
    """A client for the look at the connections, where that of the measurement is too quick for it."""


@dataclass(frozen=True)
class Row:
    case: Case
    counted: str
    kernel: str
    tcp: float
    san: float


class Progress:
    """One line that changes, on a terminal; else a line for each program."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()

    def say(self, text: str, detail: bool = False) -> None:
        if self.terminal:
            print(f"\r\033[K==> {text}", end="", file=sys.stderr, flush=True)
        elif not detail:
            print(f"==> {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern!r} in: {text}")
    return float(found[1])


def cases(site: Path) -> list[Case]:
    def wrk(seconds: int, *options: str) -> Callable[[int], list[str]]:
        return lambda port: ["wrk", "-t", "1", "-c", "16", "-d", f"{seconds}s", *options,
                             f"http://{LOOPBACK}:{port}/small"]

    def wrk_result(text: str) -> float:
        if "Socket errors" in text or "Non-2xx" in text:
            raise ValueError(text)
        return number(r"Requests/sec:\s*([\d.]+)", text)

    def benchmark(count: int, *options: str) -> Callable[[int], list[str]]:
        return lambda port: ["redis-benchmark", "-h", LOOPBACK, "-p", str(port), "-c", "50", "-n", str(count),
                             "-t", "get", "--csv", *options]

    def redis_result(text: str) -> float:
        return number(r'"GET","([\d.]+)"', text)

    def iperf(port: int) -> list[str]:
        return ["iperf3", "-c", LOOPBACK, "-p", str(port), "-t", "1", "--json"]

    def curl(*options: str) -> Callable[[int], list[str]]:
        return lambda port: ["curl", "--silent", "--show-error", "--fail", *options,
                             f"http://{LOOPBACK}:{port}/large"]

    def http(apps: Programs, policy: Policy | None, port: int) -> Program:
        return servers.http_server(apps, policy, port, site)

    def nginx(apps: Programs, policy: Policy | None, port: int) -> Program:
        return servers.nginx(apps, policy, port, site)

    return [
        Case("curl, Python http.server", "MB/s", 1, http,
             curl("--output", "/dev/null", "--write-out", "%{speed_download}"), lambda text: float(text) / 1e6, curl()),
        Case("wrk, nginx, keep-alive", "requests/s", 16, nginx, wrk(1), wrk_result),
        Case("wrk, nginx, a connection each", "requests/s", 1, nginx, wrk(1, "-H", "Connection: close"), wrk_result,
             wrk(1)),
        Case("redis-benchmark -c 50", "requests/s", 50, servers.redis, benchmark(60_000), redis_result,
             benchmark(400_000)),
        Case("redis-benchmark -c 50 -P 16", "requests/s", 50, servers.redis, benchmark(600_000, "-P", "16"),
             redis_result),
        Case("iperf3", "Gbit/s", 2, servers.iperf3, iperf,
             lambda text: float(json.loads(text)["end"]["sum_received"]["bits_per_second"]) / 1e9),
    ]


def look(apps: Programs, case: Case, policy: Policy, port: int, server: Program) -> tuple[str, str]:
    """Where the connections of one run are: by the counters of client and server, and by the kernel. Raises Failed
    unless all are on the SAN."""
    client = apps.start((case.held or case.client)(port), policy, pipes=True)
    programs.wait_for(lambda: max(len(programs.kernel(port).connecting), len(programs.kernel(port).tcp) // 2)
                      >= case.connections, f"{client} has {case.connections} connections on port {port}")
    with client.frozen():
        time.sleep(0.1)
        now = programs.kernel(port)
        counts = [programs.counters(program.pids).connections for program in (client, server)]
    unix, tcp = (min if name == "unix" else max for name in ("unix", "tcp"))
    counted = f"unix {unix(c.get('unix', 0) for c in counts)}, tcp {tcp(c.get('tcp', 0) for c in counts)}"
    seen = f"AF_UNIX {min(len(now.connecting), len(now.accepted))}, TCP {len(now.tcp) // 2}"
    client.finish()
    if now.tcp or min(len(now.connecting), len(now.accepted)) < case.connections:
        raise Failed(f"{case.name}: the kernel shows {seen}\n{now}\n{apps.logged()}")
    if any(c.get("tcp") or c.get("unix", 0) < case.connections for c in counts):
        raise Failed(f"{case.name}: the counters of client and server are {counts}\n{apps.logged()}")
    return counted, seen


def measure(apps: Programs, case: Case, policy: Policy, progress: Progress) -> Row:
    """Raises Failed."""
    ports = {None: apps.port(), policy: apps.port()}
    started = {side: case.server(apps, side, port) for side, port in ports.items()}
    progress.say(f"{case.name}: looking at the connections", detail=True)
    counted, seen = look(apps, case, policy, ports[policy], started[policy])
    figures: dict[Policy | None, list[float]] = {None: [], policy: []}
    for turn in range(ROUNDS):
        progress.say(f"{case.name}: TCP and SAN in turn, {turn + 1} of {ROUNDS}", detail=True)
        for side in ((None, policy), (policy, None))[turn % 2]:
            output = apps.run(case.client(ports[side]), side).decode()
            figures[side].append(case.result(output))
    after = programs.counters(started[policy].pids)
    if after.connections.get("tcp"):
        raise Failed(f"{case.name}: some connections were on TCP: {after}\n{apps.logged()}")
    for program in started.values():
        apps.stop(program)
    return Row(case, counted, seen, statistics.median(figures[None]), statistics.median(figures[policy]))


def congestion_control() -> str:
    """Of a TCP connection made here."""
    with socket.create_server((LOOPBACK, 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            names = [end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
                     for end in (client, accepted)]
    return " and ".join(sorted(set(names)))


def table(rows: list[Row]) -> str:
    head = ("program", "our counters", "the kernel", "unit", "TCP", "SAN", "ratio")
    lines = [head]
    for row in rows:
        digits = 0 if row.tcp >= 100 else 1
        lines.append((row.case.name, row.counted, row.kernel, row.case.unit, f"{row.tcp:,.{digits}f}",
                      f"{row.san:,.{digits}f}", f"x{row.san / row.tcp:.2f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column > 3 else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def enter_network() -> None:
    """Becomes this program again, in a network name space of its own. Returns where none can be made."""
    if os.environ.get(INSIDE):
        return
    again = [sys.executable, *sys.argv]
    if os.geteuid() == 0:
        command = ["unshare", "--net", "sh", "-c", PREPARE + 'exec "$@"', "sh", *again]
    else:
        # What the programs may do must not change with the user name space.
        command = ["unshare", "--user", "--map-current-user", "--keep-caps", "--net", "sh", "-c",
                   PREPARE + 'exec setpriv --ambient-caps=-all --inh-caps=-all "$@"', "sh", *again]
    # Tried first, because exec would leave nobody to go on here.
    trial = [*command[:-len(again)], "true"]
    try:
        if subprocess.run(trial, capture_output=True, timeout=10).returncode == 0:
            os.execvpe(command[0], command, os.environ | {INSIDE: "1"})
    except (OSError, subprocess.TimeoutExpired):
        pass


def main() -> int:
    enter_network()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    progress = Progress()
    control = congestion_control()
    rows: list[Row] = []
    failures: list[str] = []
    apps = Programs()
    try:
        policy = apps.policy("demo", POLICY)
        site = apps.directory / "site"
        site.mkdir()
        (site / "small").write_bytes(b"small\n" * 100)
        with (site / "large").open("wb") as file:
            file.truncate(256 << 20)
        todo = cases(site)
        for turn, case in enumerate(todo):
            progress.say(f"{turn + 1}/{len(todo)} {case.name}")
            try:
                rows.append(measure(apps, case, policy, progress))
            except (Failed, ValueError, subprocess.TimeoutExpired) as failure:
                failures.append(f"{case.name}: {failure}")
            failures += apps.close()
    except KeyboardInterrupt:
        return 130
    finally:
        apps.close()
        apps.remove()
        progress.end()
    if rows:
        print(table(rows))
        print(f"\nMedians of {ROUNDS} runs, TCP and SAN in turn; TCP with {control}; {os.cpu_count()} CPUs, "
              f"Linux {os.uname().release}.")
        if control != "cubic":
            print("No network name space could be made, so TCP was not set to cubic: the ratios are not comparable.")
    if failures:
        print("\nFAILED: " + "\nFAILED: ".join(failures), file=sys.stderr)
        return 1
    print(f"Every connection was on the SAN. Try: {(ROOT / '.venv/bin/sanrun').relative_to(ROOT)} redis-server")
    return 0


if __name__ == "__main__":
    sys.exit(main())
