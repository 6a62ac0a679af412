from __future__ import annotations

import json

import looks
import pytest
import servers
from programs import LOOPBACK, Policy, Program, Programs

MODES = {"single": [], "parallel": ["-P", "4"], "reverse": ["-R"], "both": ["--bidir"]}
STREAMS = {"single": 1, "parallel": 4, "reverse": 1, "both": 2}


def iperf3(apps: Programs, policy: Policy | None, port: int, mode: str) -> Program:
    argv = ["iperf3", "--client", LOOPBACK, "--port", str(port), "--time", "1", "--json", *MODES[mode]]
    return apps.start(argv, policy, pipes=True)


def received(client: Program) -> int:
    """Bytes that arrived, as the finished client reports them."""
    end = json.loads(client.finish())["end"]
    return min(int(end[name]["bytes"]) for name in end if name.startswith("sum_received"))


@pytest.mark.parametrize("mode", MODES)
def test_streams(apps: Programs, policy: Policy, mode: str) -> None:
    """P1, P5, S5, S21, T2: control connection and streams are on the SAN in every mode, the server listening on the
    dual-stack wildcard."""
    port = apps.port()
    server = servers.iperf3(apps, policy, port)
    client = iperf3(apps, policy, port, mode)
    count = STREAMS[mode] + 1
    looks.connected(port, count)
    with client.frozen():
        looks.on_san(port, client, server, count)
        looks.engine(client, policy)
        looks.engine(server, policy)
    assert received(client) > 1 << 20


@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain client or a plain server all is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.iperf3(apps, None if plain_side == "server" else policy, port)
    client = iperf3(apps, None if plain_side == "client" else policy, port, "single")
    looks.connected(port, 2)
    with client.frozen():
        looks.on_tcp(port, client, server)
    assert received(client) > 1 << 20
