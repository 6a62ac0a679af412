from __future__ import annotations

import re
import signal

import looks
import programs
import pytest
import servers
from app_policies import few_policies
from programs import LOOPBACK, Policy, Program, Programs

MODES = {"parallel": ["-P", "4"], "reverse": ["-R"], "duplex": ["--full-duplex"]}
STREAMS = {"parallel": 4}


def iperf2(apps: Programs, policy: Policy | None, port: int, *options: str) -> Program:
    """Sends until it is told to end."""
    argv = ["iperf", "--client", LOOPBACK, "--port", str(port), "--time", "30", "--reportstyle", "C", *options]
    return apps.start(argv, policy, pipes=True)


def moved(client: Program) -> list[int]:
    """Ends a client; the bytes of each direction of each stream."""
    client.popen.send_signal(signal.SIGINT)
    return transfers(client)


def transfers(client: Program) -> list[int]:
    """The bytes of each direction of each stream, as a client reports them at its end."""
    lines = [line.split(",") for line in client.finish().decode().splitlines() if re.match(r"\d+,", line)]
    assert lines, client.said()
    return [int(words[7]) for words in lines]


@pytest.mark.parametrize("mode", MODES)
def test_streams(apps: Programs, plain: Policy, mode: str) -> None:
    """S5, S21, T2: the streams are on the SAN in every mode, each served by a thread of its own."""
    port = apps.port()
    server = servers.iperf2(apps, plain, port)
    client = iperf2(apps, plain, port, *MODES[mode])
    count = STREAMS.get(mode, 1)
    looks.on_san(port, client, server, count)
    streams = moved(client)
    assert len(streams) >= count and min(streams) > 1 << 20, streams


def test_policies(apps: Programs, policy: Policy) -> None:
    """P1, P5: the engine decides in client and server where the policy asks for it."""
    port = apps.port()
    server = servers.iperf2(apps, policy, port)
    client = iperf2(apps, policy, port)
    looks.on_san(port, client, server)
    looks.engine(client, policy)
    looks.engine(server, policy)
    assert min(moved(client)) > 1 << 20


def test_both_connect(apps: Programs, plain: Policy) -> None:
    """S6, S21: after its own test the server connects back to a listener of the client's: a process has both roles, and
    both connections are on the SAN."""
    port, back = apps.port(), apps.port()
    server = servers.iperf2(apps, plain, port)
    client = iperf2(apps, plain, port, "--num", "8M", "--tradeoff", "--listenport", str(back))
    assert transfers(client) == [8 << 20] * 2
    if looks.SWITCH:
        assert programs.counters(server.pids).connections == {"tcp": 0, "unix": 2}


@few_policies
@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain client or a plain server the stream is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.iperf2(apps, None if plain_side == "server" else policy, port)
    client = iperf2(apps, None if plain_side == "client" else policy, port)
    looks.on_tcp(port, client, server)
    assert min(moved(client)) > 1 << 20


def test_killed_client(apps: Programs, plain: Policy) -> None:
    """X4, X5: a client that is killed in the middle of a stream leaves the server able to serve the next one."""
    port = apps.port()
    server = servers.iperf2(apps, plain, port)
    client = iperf2(apps, plain, port)
    looks.connected(port, 1)
    client.popen.kill()
    client.popen.wait(10)
    programs.wait_for(lambda: not programs.kernel(port).accepted, "the server has ended the stream")
    client = iperf2(apps, plain, port)
    looks.on_san(port, client, server)
    assert min(moved(client)) > 1 << 20
