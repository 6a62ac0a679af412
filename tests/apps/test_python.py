from __future__ import annotations

from pathlib import Path

import looks
import programs
import pytest
import servers
from programs import LOOPBACK, PYTHON, Policy, Program, Programs

PEER = str(Path(__file__).parent / "asyncio_peer.py")
SIZE = 8 << 20

FETCH = """\
import hashlib, sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as answer:
    sys.stdin.readline()
    print(hashlib.sha256(answer.read()).hexdigest())
"""


def serve(apps: Programs, policy: Policy | None, port: int) -> Program:
    return apps.serve([PYTHON, PEER, "serve", str(port)], policy, port)


def fetch(apps: Programs, policy: Policy | None, port: int) -> Program:
    return apps.start([PYTHON, PEER, "fetch", str(port), str(SIZE)], policy, pipes=True)


def same(client: Program) -> bool:
    client.send("go on")
    return client.finish() == f"same {SIZE + 32}\n".encode()


def test_asyncio(apps: Programs, policy: Policy) -> None:
    """P1, P8, S17, T2, T9, O2: asyncio streams, non-blocking on epoll, are on the SAN at both ends; 8 MiB each way with
    a half close arrive whole."""
    port = apps.port()
    server = serve(apps, policy, port)
    client = fetch(apps, policy, port)
    looks.on_san(port, client, server)
    looks.engine(client, policy, python=True)
    looks.engine(server, policy, python=True)
    assert same(client)


@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_asyncio_mixed(apps: Programs, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, T9, O1: the same with one plain side, by TCP."""
    port = apps.port()
    server = serve(apps, None if plain_side == "server" else policy, port)
    client = fetch(apps, None if plain_side == "client" else policy, port)
    looks.on_tcp(port, client, server)
    assert same(client)


def test_urllib(apps: Programs, site: Path, policy: Policy) -> None:
    """P1, P8, S15, T7, O2: Python's blocking client and http.server are on the SAN at both ends."""
    port = apps.port()
    server = servers.http_server(apps, policy, port, site)
    url = f"http://{LOOPBACK}:{port}/large"
    client = apps.start([PYTHON, "-c", FETCH, url], policy, pipes=True)
    looks.on_san(port, client, server)
    looks.engine(client, policy, python=True)
    looks.engine(server, policy, python=True)
    client.send("go on")
    assert client.finish().decode().strip() == programs.sha256(site / "large")
