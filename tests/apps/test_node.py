from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import looks
import programs
import pytest
import servers
from app_policies import few_policies
from clients import CLOSE, answering, curl, keeper, kept, requests, same, wrk
from programs import Policy, Program, Programs

RINGS = """\
const fs = require('fs');
const link = (fd) => { try { return fs.readlinkSync('/proc/self/fd/' + fd); } catch { return ''; } };
console.log(fs.readdirSync('/proc/self/fd').filter((fd) => link(fd).includes('io_uring')).length);
"""


def makes_rings(wanted: bool) -> bool:
    environment = {**os.environ, "UV_USE_IO_URING": str(int(wanted))}
    return int(subprocess.check_output(["node", "-e", RINGS], env=environment, timeout=30)) > 0


@pytest.fixture(scope="module")
def ring() -> bool:
    """Whether this Node submits epoll_ctl through an io_uring even when told not to use one, as it does with libuv 1.50
    and newer. The switch cannot follow that, so such a Node is TCP's."""
    return makes_rings(False)


def carried(port: int, client: Program, server: Program, ring: bool) -> None:
    """On the SAN, or on TCP because of a ring."""
    if not ring:
        looks.on_san(port, client, server)
        return
    why = "IO_URING" if "node" in client.argv else "NO_COMPANION"
    looks.on_tcp(port, client, server, why, "IO_URING")


def serve(apps: Programs, policy: Policy | None, port: int, site: Path, ring: bool, cluster: str = "") -> Program:
    return servers.node(apps, policy, port, site, cluster=cluster, companion=not ring)


@few_policies
def test_server(apps: Programs, site: Path, policy: Policy, ring: bool) -> None:
    """P1, P5, S2, S21, T2, O2: curl and a Node server that streams a file are on the SAN."""
    port = apps.port()
    server = serve(apps, policy, port, site, ring)
    client = curl(apps, policy, port)
    carried(port, client, server, ring)
    looks.engine(client, policy)
    if not ring:
        looks.engine(server, policy)
    assert same(client, site)


def test_agent(apps: Programs, site: Path, policy: Policy, ring: bool) -> None:
    """P1, S17, S26, T1, T2, O2: a Node agent connects without blocking and keeps its one connection for all requests.
    The server sees it under its own address."""
    port = apps.port()
    server = serve(apps, policy, port, site, ring)
    client = keeper(apps, "node", policy, port, "large")
    carried(port, client, server, ring)
    if not ring:
        looks.engine(client, policy)
    assert kept(client, site / "large") == 1
    if looks.SWITCH and not ring:
        assert programs.counters(server.pids).connections == {"tcp": 0, "unix": 1}


@few_policies
@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, site: Path, policy: Policy, ring: bool, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain Node client or server the connection is on TCP, and the other one says why."""
    port = apps.port()
    server = serve(apps, None if plain_side == "server" else policy, port, site, ring)
    client = keeper(apps, "node", None if plain_side == "client" else policy, port)
    why = ("IO_URING", "IO_URING") if ring else ("NO_COMPANION", "PEER_TCP")
    looks.on_tcp(port, client, server, *why)
    assert kept(client, site / "small") == 1


@pytest.mark.parametrize(
    "sides", ["both", *(pytest.param(name, marks=pytest.mark.long) for name in ("client plain", "server plain"))]
)
def test_python_client(apps: Programs, site: Path, plain: Policy, ring: bool, sides: str) -> None:
    """S22, S26, O1: Python's client keeps its connection to a Node server, on the SAN and on TCP."""
    port = apps.port()
    server = serve(apps, None if sides == "server plain" else plain, port, site, ring)
    client = keeper(apps, "python", None if sides == "client plain" else plain, port)
    if sides == "both":
        carried(port, client, server, ring)
    else:
        looks.on_tcp(port, client, server, "NO_COMPANION", "IO_URING" if ring else "PEER_TCP")
    assert kept(client, site / "small") == 1


def test_close(apps: Programs, site: Path, plain: Policy, ring: bool) -> None:
    """S22, S28: a connection for each request; none fails."""
    port = apps.port()
    server = serve(apps, plain, port, site, ring)
    assert requests(wrk(apps, plain, port, *CLOSE)) > 0
    if looks.SWITCH and not ring:
        counted = programs.counters(server.pids)
        assert counted.connections.get("unix") and not counted.connections.get("tcp"), counted


@few_policies
def test_cluster(apps: Programs, site: Path, policy: Policy, ring: bool) -> None:
    """T5, S27, S26, P1: a primary accepts and passes every connection on to one of two workers as a descriptor. All
    stay on the SAN, both workers get their share, and they see the client's address."""
    port = apps.port()
    server = serve(apps, policy, port, site, ring, "rr")
    client = keeper(apps, "python", policy, port)
    if ring:
        looks.on_tcp(port, client, server, "NO_COMPANION", "IO_URING")
    else:
        looks.on_san(port, client, server)
    assert kept(client, site / "small") == 1
    assert answering(apps, policy, port) == server.pids - {server.pid}


def test_cluster_that_shares(apps: Programs, site: Path, plain: Policy, ring: bool) -> None:
    """T5, S23: workers that listen on a descriptor which their primary bound and passed to them are on the SAN."""
    port = apps.port()
    server = serve(apps, plain, port, site, ring, "none")
    client = keeper(apps, "python", plain, port)
    carried(port, client, server, ring)
    assert kept(client, site / "small") == 1
    assert answering(apps, plain, port) <= server.pids - {server.pid}
    assert requests(wrk(apps, plain, port)) > 0


def test_killed_worker(apps: Programs, site: Path, plain: Policy, ring: bool) -> None:
    """X4, X5, S19: a worker that is killed breaks its own connections only, and the one that takes its place is on the
    SAN too."""
    port = apps.port()
    server = serve(apps, plain, port, site, ring, "rr")
    workers = server.pids - {server.pid}
    client = curl(apps, plain, port)
    carried(port, client, server, ring)
    pid = looks.worker(port, server)
    other = keeper(apps, "python", plain, port, other=pid)
    os.kill(pid, signal.SIGKILL)
    client.output.read()
    assert client.popen.wait(10) in (18, 56), client.said()
    assert kept(other, site / "small") == 1
    programs.wait_for(lambda: len(server.pids - {server.pid} - {pid}) == len(workers), "the worker is replaced")
    assert requests(wrk(apps, plain, port, *CLOSE)) > 0


def test_io_uring(apps: Programs, site: Path, plain: Policy) -> None:
    """T14, O1: a Node that is told to use io_uring works: on TCP, saying why, where it knows how to (libuv 1.45)."""
    port = apps.port()
    server = servers.node(apps, plain, port, site, ring=True, companion=False)
    client = curl(apps, plain, port)
    carried(port, client, server, makes_rings(True))
    assert same(client, site)
    assert requests(wrk(apps, plain, port)) > 0
