"""What a test of a real program asserts about connections: where the kernel has them, what our counters say, and
whether a policy engine was started for them."""

from __future__ import annotations

import os
from collections.abc import Callable

import programs
from programs import Counters, Kernel, Policy, Program

SWITCH = not os.environ.get("APPS_WITHOUT_SWITCH")
"""APPS_WITHOUT_SWITCH=1 runs every scenario on TCP alone, which shows that the scenario itself is right."""


def connected(port: int, count: int) -> None:
    """Waits until `port` has `count` connections, wherever they are."""
    _kernel(port, f"{count} connections", lambda now: max(len(now.connecting), len(now.tcp) // 2) >= count)


def on_san(port: int, client: Program, server: Program, at_least: int = 1) -> None:
    """All connections of `port` that now exist are on the SAN, as the kernel, our counters and our list of sockets see
    them, and `client` has `at_least` of them. Both programs are interposed."""
    if not SWITCH:
        on_tcp(port, client, server)
        return
    # A socket that was made while ss had already looked through the processes is shown without one.
    now = _kernel(port, f"{at_least} companions", lambda now: bool(now.accepted) and
                  len([row for row in now.connecting if row.pids & client.pids]) >= at_least)
    assert not now.tcp, now
    assert now.tcp_listeners, now
    # The kernel shows an accepted companion without a process until the server takes it from its backlog.
    _kernel(port, "an accepted companion", lambda now: any(row.pids & server.pids for row in now.accepted))

    counted = programs.counters(client.pids)
    assert counted.connections.get("unix", 0) >= at_least, counted
    assert not counted.connections.get("tcp"), counted
    counted = _counted(server, "a SAN connection", lambda counted: bool(counted.connections.get("unix")))
    assert not counted.connections.get("tcp"), counted
    assert counted.listeners.get("unix"), counted

    listed = programs.rows(client.pids | server.pids)
    for program, role, key in ((client, "connect", "peer"), (server, "accept", "local")):
        providers = [row["provider"] for row in listed if row["pid"] in program.pids
                     and row["role"] == role and row[key] == f"{programs.LOOPBACK}:{port}"]
        assert providers and set(providers) == {"unix"}, listed


def on_tcp(port: int, client: Program, server: Program, why: str = "NO_COMPANION",
           server_why: str | None = "PEER_TCP") -> None:
    """All connections of `port` that now exist are on TCP, in the kernel and in the counters of the programs that are
    interposed, and these say why: the client `why`, the server `server_why`, that the client came by TCP, unless it is
    None."""
    now = _kernel(port, "a TCP connection", lambda now: len(now.tcp) >= 2)
    assert not now.connecting, now
    assert not now.accepted, now
    for program, reason in ((client, why), (server, server_why)):
        if program.switched and reason:
            counted = _counted(program, "a TCP connection", lambda counted: bool(counted.connections.get("tcp")))
            assert not counted.connections.get("unix"), counted
            assert counted.reasons.get(reason), counted


def worker(port: int, server: Program) -> int:
    """The child of `server` that has the only connection of `port`."""
    now = _kernel(port, "one worker", lambda now: len(_accepted(now, port, server)) == 1)
    return min(_accepted(now, port, server))


def _accepted(now: Kernel, port: int, server: Program) -> frozenset[int]:
    rows = [*now.accepted, *(row for row in now.tcp if row.local.endswith(f":{port}"))]
    return frozenset(pid for row in rows for pid in row.pids & server.pids - {server.pid})


def engine(program: Program, policy: Policy, *, python: bool = False) -> None:
    """The engine runs where the policy asks for it, and nowhere else. Programs that are Python ask a helper."""
    if not SWITCH:
        return
    counted = programs.counters(program.pids)
    if policy.asks:
        assert counted.upcalls, counted
        assert ("helper" if python else "ready") in counted.engines, counted
    else:
        assert not counted.upcalls, counted
        assert counted.engines == {"not started"}, counted


def _kernel(port: int, meaning: str, holds: Callable[[Kernel], bool]) -> Kernel:
    seen: list[Kernel] = []

    def look() -> bool:
        seen[:] = [programs.kernel(port)]
        return holds(seen[0])

    try:
        programs.wait_for(look, f"{meaning} on port {port}")
    except programs.Failed as failure:
        raise programs.Failed(f"{failure}\n{seen[0]}") from None
    return seen[0]


def _counted(program: Program, meaning: str, holds: Callable[[Counters], bool]) -> Counters:
    seen: list[Counters] = []

    def look() -> bool:
        seen[:] = [programs.counters(program.pids)]
        return holds(seen[0])

    try:
        programs.wait_for(look, f"{meaning} counted by {program}", 3)
    except programs.Failed as failure:
        raise programs.Failed(f"{failure}\n{seen[0]}") from None
    return seen[0]
