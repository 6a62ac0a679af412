from __future__ import annotations

import os
import signal
from pathlib import Path

import looks
import programs
import pytest
import servers
from app_policies import few_policies
from clients import CLOSE, CONNECTIONS, COUNT, LOAD, answering, curl, keeper, kept, requests, same, wrk
from programs import Policy, Programs

SHARE = 20
worker_classes = pytest.mark.parametrize("workers", ["sync", "gthread"])
few_classes = pytest.mark.parametrize("workers", ["sync", pytest.param("gthread", marks=pytest.mark.long)])


@few_classes
def test_on_the_san(apps: Programs, site: Path, policy: Policy, workers: str) -> None:
    """P1, P5, P8, S21, T2, T4: a worker accepts the connection of curl on the listener that its master made, and both
    ends are on the SAN."""
    port = apps.port()
    server = servers.gunicorn(apps, policy, port, site, workers)
    client = curl(apps, policy, port)
    looks.on_san(port, client, server)
    looks.engine(client, policy)
    looks.engine(server, policy, python=True)
    assert same(client, site)


@few_policies
@few_classes
@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, site: Path, policy: Policy, workers: str, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain curl or a plain gunicorn the connection is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.gunicorn(apps, None if plain_side == "server" else policy, port, site, workers)
    client = curl(apps, None if plain_side == "client" else policy, port)
    looks.on_tcp(port, client, server)
    assert same(client, site)


@pytest.mark.parametrize("kind", ["python", pytest.param("node", marks=pytest.mark.long)])
def test_kept_connection(apps: Programs, site: Path, plain: Policy, kind: str) -> None:
    """S22, S26, T1: a client keeps its connection to a worker with threads, which sees the client's address."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, "gthread")
    client = keeper(apps, kind, plain, port)
    counted = programs.counters(client.pids)
    if not counted.reasons.get("IO_URING"):   # of a Node that cannot do without: test_node.py
        looks.on_san(port, client, server)
    assert kept(client, site / "small") == 1


def test_closed_connections(apps: Programs, site: Path, plain: Policy) -> None:
    """S22, S26, S28: a sync worker closes after each answer, and the client connects anew."""
    port = apps.port()
    servers.gunicorn(apps, plain, port, site, "sync")
    assert kept(keeper(apps, "python", plain, port), site / "small") == COUNT


@worker_classes
def test_every_worker_serves(apps: Programs, site: Path, plain: Policy, workers: str) -> None:
    """S21, S22, T4: of many short connections each worker gets some, on the SAN and on TCP at the same time; none
    fails."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, workers)
    both = server.pids - {server.pid}
    clients = [wrk(apps, policy, port, *CLOSE, seconds=LOAD) for policy in (plain, None)]

    def shared() -> bool:
        shares = programs.shares(server.pids)
        return all(shares.get(pid, {}).get(provider, 0) >= SHARE for pid in both for provider in ("unix", "tcp"))

    if looks.SWITCH:
        programs.wait_for(shared, f"each worker has {SHARE} connections of each kind")
    else:
        programs.wait_for(lambda: answering(apps, None, port) == both, "both workers answer")
    assert min(requests(client, stop=True) for client in clients) > 0


@worker_classes
def test_graceful_restart(apps: Programs, site: Path, plain: Policy, workers: str) -> None:
    """S23, S28, T4: SIGHUP under load, twice: all workers are replaced and no request fails, on the SAN and on TCP."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, workers)
    clients = [wrk(apps, policy, port, *CLOSE, seconds=LOAD) for policy in (plain, None)]
    for _ in range(2):
        answering(apps, plain, port)
        old = server.pids - {server.pid}
        server.popen.send_signal(signal.SIGHUP)
        programs.wait_for(lambda old=old: not server.pids & old, "the old workers have gone")  # type: ignore[misc]
    assert min(requests(client, stop=True) for client in clients) > 0
    client = curl(apps, plain, port)
    looks.connected(port, 1)
    now = programs.kernel(port)
    assert bool(now.tcp) is not looks.SWITCH, now
    assert same(client, site)


@worker_classes
def test_killed_worker(apps: Programs, site: Path, plain: Policy, workers: str) -> None:
    """X4, X5, S19, S23: a worker that is killed breaks its own connections only; another one takes its place and its
    share."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, workers)
    old = server.pids - {server.pid}
    client = curl(apps, plain, port)
    looks.on_san(port, client, server)
    pid = looks.worker(port, server)
    os.kill(pid, signal.SIGKILL)
    client.output.read()
    assert client.popen.wait(10) in (18, 56), client.said()
    programs.wait_for(lambda: len(server.pids - {server.pid, pid}) == len(old), "the worker is replaced")
    (new,) = server.pids - {server.pid} - old
    # It accepts as soon as it has loaded the application.
    programs.wait_for(lambda: new in answering(apps, plain, port), "the new worker answers")
    if looks.SWITCH:
        assert not programs.counters(server.pids).connections.get("tcp")


def test_new_program(apps: Programs, site: Path, plain: Policy) -> None:
    """T4, S23, S27: SIGUSR2 under load starts the program anew with the same listener, and the old one ends: no request
    fails, by SAN or by TCP. The new one has the old one's companion."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, "sync")
    by_san, by_tcp = (wrk(apps, policy, port, *CLOSE, seconds=LOAD) for policy in (plain, None))
    old = server.pids
    answering(apps, plain, port)
    server.popen.send_signal(signal.SIGUSR2)
    programs.wait_for(lambda: len(server.pids - old) == len(old), "the new program has its workers")
    os.kill(server.pid, signal.SIGTERM)
    programs.wait_for(lambda: not server.pids & old, "the old program has ended")
    new = server.pids
    try:
        assert requests(by_san, stop=True) > 0
        assert requests(by_tcp, stop=True) > 0
        client = curl(apps, plain, port)
        if looks.SWITCH:
            programs.wait_for(lambda: bool(programs.counters(client.pids).connections.get("unix")), "a connection")
            assert not programs.counters(client.pids).connections.get("tcp")
            assert any(row.pids & new for row in programs.kernel(port).listeners)
        assert same(client, site)
        assert answering(apps, plain, port) <= new
    finally:
        for pid in new:
            os.kill(pid, signal.SIGTERM)


@pytest.mark.long
def test_keep_alive(apps: Programs, site: Path, plain: Policy) -> None:
    """S22, T2: workers with threads hold many connections at a time, on the SAN."""
    port = apps.port()
    server = servers.gunicorn(apps, plain, port, site, "gthread")
    client = wrk(apps, plain, port, seconds=3)
    looks.connected(port, CONNECTIONS)
    with client.frozen():
        looks.on_san(port, client, server, CONNECTIONS)
    assert requests(client) > 0
