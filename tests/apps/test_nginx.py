from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import looks
import programs
import pytest
import servers
from clients import CLOSE, CONNECTIONS, requests, wrk
from programs import LOOPBACK, Policy, Programs

reuseport = pytest.mark.parametrize("reuseport", [False, True], ids=["shared", "reuseport"])


@reuseport
def test_keep_alive(apps: Programs, site: Path, policy: Policy, reuseport: bool) -> None:
    """P1, P5, S21, T2, T4, T8: the connections of wrk to two workers are on the SAN and answer every request."""
    port = apps.port()
    server = servers.nginx(apps, policy, port, site, reuseport=reuseport)
    client = wrk(apps, policy, port)
    looks.connected(port, CONNECTIONS)
    with client.frozen():
        looks.on_san(port, client, server, CONNECTIONS)
        looks.engine(client, policy)
        looks.engine(server, policy)
    assert requests(client) > 100


@reuseport
def test_close(apps: Programs, site: Path, policy: Policy, reuseport: bool) -> None:
    """S22, S28, T8: a connection for each request; none fails and none goes by TCP."""
    port = apps.port()
    server = servers.nginx(apps, policy, port, site, reuseport=reuseport)
    assert requests(wrk(apps, policy, port, *CLOSE)) > 100
    if looks.SWITCH:
        counted = programs.counters(server.pids)
        assert counted.connections.get("unix", 0) > 100, counted
        assert not counted.connections.get("tcp"), counted


@reuseport
def test_sendfile(apps: Programs, site: Path, plain: Policy, reuseport: bool) -> None:
    """T7: a file that nginx sends by sendfile arrives whole, at a client on the SAN and at one on TCP."""
    port = apps.port()
    servers.nginx(apps, plain, port, site, reuseport=reuseport)
    wanted = programs.sha256(site / "megabyte")
    for policy in (plain, None):
        body = apps.run(["curl", "--silent", "--fail", f"http://{LOOPBACK}:{port}/megabyte"], policy)
        assert hashlib.sha256(body).hexdigest() == wanted


@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, site: Path, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain wrk or a plain nginx every connection is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.nginx(apps, None if plain_side == "server" else policy, port, site)
    client = wrk(apps, None if plain_side == "client" else policy, port)
    looks.connected(port, CONNECTIONS)
    with client.frozen():
        looks.on_tcp(port, client, server)
    assert requests(client) > 100


@reuseport
def test_reload_under_load(apps: Programs, site: Path, policy: Policy, reuseport: bool) -> None:
    """S23, T4, T8: three reloads under load, workers replaced each time: no request fails, on the SAN and on TCP."""
    port = apps.port()
    server = servers.nginx(apps, policy, port, site, reuseport=reuseport)
    clients = [wrk(apps, policy, port, *CLOSE, seconds=2), wrk(apps, None, port, *CLOSE, seconds=2)]
    workers = server.pids - {server.pid}
    for _ in range(3):
        time.sleep(0.4)
        server.popen.send_signal(signal.SIGHUP)
    for client in clients:
        assert requests(client) > 100
    programs.wait_for(lambda: not server.pids & workers, "the first workers have gone")
    # The workers that are there now serve both kinds of client.
    client = wrk(apps, policy, port)
    looks.connected(port, CONNECTIONS)
    with client.frozen():
        now = programs.kernel(port)
        assert bool(now.tcp) is not looks.SWITCH, now
    assert requests(client) > 100


def test_killed_master(apps: Programs, site: Path, plain: Policy) -> None:
    """X1, X5, S27: after a kill -9 of the master its workers still serve the SAN, and when they have gone no name is
    left."""
    port = apps.port()
    server = servers.nginx(apps, plain, port, site)
    workers = server.pids - {server.pid}
    server.popen.kill()
    server.popen.wait(10)
    assert requests(wrk(apps, plain, port)) > 100
    if looks.SWITCH:
        counted = programs.counters(server.pids)
        assert counted.connections.get("unix", 0) >= CONNECTIONS, counted
        assert not counted.connections.get("tcp"), counted
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    programs.wait_for(lambda: not server.pids, "the workers have ended")
    assert not programs.kernel(port).names
