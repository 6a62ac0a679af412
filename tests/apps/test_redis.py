from __future__ import annotations

import os
import signal

import looks
import programs
import pytest
import servers
from programs import LOOPBACK, Policy, Program, Programs

KEYS = 500


def cli(apps: Programs, policy: Policy | None, port: int) -> Program:
    """Reads commands from a pipe, and stays connected between them."""
    return apps.start(["redis-cli", "-h", LOOPBACK, "-p", str(port)], policy, pipes=True)


def ask(client: Program, command: str) -> str:
    client.send(command)
    return client.line()


def benchmark(apps: Programs, policy: Policy | None, port: int, count: int) -> Program:
    argv = ["redis-benchmark", "-h", LOOPBACK, "-p", str(port), "-c", "50", "-P", "16", "-n", str(count), "-r", "10000"]
    return apps.start([*argv, "-t", "set,get", "--csv"], policy, pipes=True)


def finished(client: Program) -> bool:
    """Whether a redis-benchmark reported both of its tests."""
    report = client.finish().decode()
    return '"SET"' in report and '"GET"' in report


def test_cli(apps: Programs, policy: Policy) -> None:
    """P1, P5, P8, S15, S21, O2: redis-cli and redis-server use the SAN under each kind of policy."""
    port = apps.port()
    server = servers.redis(apps, policy, port)
    client = cli(apps, policy, port)
    assert ask(client, "SET colour green") == "OK"
    looks.on_san(port, client, server)
    looks.engine(client, policy)
    looks.engine(server, policy)
    assert ask(client, "GET colour") == "green"
    # Both ends of the connection bear TCP's addresses for the server itself.
    client.send("CLIENT LIST")
    line = client.line()
    assert f" laddr={LOOPBACK}:{port} " in line and f" addr={LOOPBACK}:" in line, line


@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain redis-cli or redis-server the connection is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.redis(apps, None if plain_side == "server" else policy, port)
    client = cli(apps, None if plain_side == "client" else policy, port)
    assert ask(client, "SET colour green") == "OK"
    looks.on_tcp(port, client, server)
    assert ask(client, "GET colour") == "green"


def test_benchmark(apps: Programs, policy: Policy) -> None:
    """S21, S22, T1, T2: 50 connections with 16 commands in flight on each are all on the SAN, with a plain client
    beside them on TCP."""
    port = apps.port()
    server = servers.redis(apps, policy, port)
    client = benchmark(apps, policy, port, 200_000)
    looks.connected(port, 50)
    with client.frozen():
        looks.on_san(port, client, server, 50)
        looks.engine(client, policy)
        looks.engine(server, policy)
        visitor = cli(apps, None, port)
        assert ask(visitor, "PING") == "PONG"
        visitor.finish()
    assert finished(client)


def test_background_save_under_load(apps: Programs, policy: Policy) -> None:
    """S27, T4: a save by a forked child under load ends well, loses no connection, and the data is whole when a new
    server reads it."""
    port = apps.port()
    server = servers.redis(apps, policy, port)
    client = cli(apps, policy, port)
    for number in range(KEYS):
        client.send(f"SET mark:{number} value-{number * number}")
    assert {client.line() for _ in range(KEYS)} == {"OK"}
    load = benchmark(apps, policy, port, 200_000)
    looks.connected(port, 50)
    assert ask(client, "BGSAVE") == "Background saving started"
    assert finished(load)

    def saved() -> bool:
        client.send("INFO persistence")
        lines: list[str] = []
        while not lines or not lines[-1].startswith("rdb_last_bgsave_status"):
            lines.append(client.line().strip())
        return "rdb_bgsave_in_progress:0" in lines and "rdb_last_bgsave_status:ok" in lines

    programs.wait_for(saved, "the save has ended well")
    client.finish()
    if looks.SWITCH:
        counted = programs.counters(server.pids)
        assert counted.connections.get("unix", 0) > 50, counted
        assert not counted.connections.get("tcp"), counted

    server.popen.send_signal(signal.SIGKILL)
    server.popen.wait(10)
    servers.redis(apps, policy, port)
    client = cli(apps, policy, port)
    for number in range(KEYS):
        client.send(f"GET mark:{number}")
    assert [client.line() for _ in range(KEYS)] == [f"value-{number * number}" for number in range(KEYS)]


def test_killed_server(apps: Programs, plain: Policy) -> None:
    """X5, S19: after a kill -9 the client sees the connection end, no name is left, and the port can be used again."""
    port = apps.port()
    server = servers.redis(apps, plain, port)
    client = cli(apps, plain, port)
    assert ask(client, "PING") == "PONG"
    os.kill(server.pid, signal.SIGKILL)
    server.popen.wait(10)
    client.send("PING")
    programs.wait_for(lambda: "Error" in client.said(), "redis-cli says that the connection ended")
    programs.wait_for(lambda: not programs.kernel(port).listeners, "the kernel has removed the companion listener")
    servers.redis(apps, plain, port)
    answers = [ask(client, "PING")]
    while answers[-1] != "PONG":
        answers.append(client.line())
