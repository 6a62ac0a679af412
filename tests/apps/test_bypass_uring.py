"""Programs with liburing, linked and linked in: whole, and nobody waits for them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import looks
import programs
import pytest
from programs import LOOPBACK, PYTHON, Policy, Programs

from interposer.policy import reasons

NO_COMPANION = reasons.BY_SYMBOL["NO_COMPANION"].number
SOURCE = Path(__file__).parent / "uring_echo.c"
SAY = f"""
import socket, sys
peer = socket.create_connection(("{LOOPBACK}", int(sys.argv[1])), 10)
peer.sendall(b"x" * 100000)
left = 100000
while left:
    left -= len(peer.recv(65536)) or sys.exit("it ended early")
print("all of it")
"""


@pytest.fixture(scope="session", params=["shared", "static"])
def echo(request: pytest.FixtureRequest, everything: Programs) -> str:
    """uring_echo with liburing's library, or with its code linked in."""
    output = everything.directory / f"uring_echo-{request.param}"
    library = ["-luring"] if request.param == "shared" else ["-Wl,-Bstatic", "-luring", "-Wl,-Bdynamic"]
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-o", output, SOURCE, *library], check=True, timeout=60)
    needed = subprocess.check_output(["readelf", "-d", output], text=True, timeout=10)
    assert ("liburing" in needed) == (request.param == "shared")
    return str(output)


def test_server(apps: Programs, plain: Policy, echo: str) -> None:
    """T14, S23, O1: a server that listens and then accepts through a ring echoes what its clients say, those under the
    switch too; these say why they are on TCP."""
    port = apps.port()
    apps.serve([echo, "serve", str(port)], plain, port)
    for policy in (plain, None, plain):
        client = apps.start([PYTHON, "-c", SAY, str(port)], policy, pipes=True)
        assert client.finish() == b"all of it\n"
        if client.switched:
            assert re.search(rf" {client.pid} connect fd \d+: TCP, reason {NO_COMPANION}\n", apps.logged())


@pytest.mark.parametrize(("how", "connections"), [("say", {"tcp": 1, "unix": 0}), ("libc", {"tcp": 0, "unix": 1})])
def test_client(apps: Programs, plain: Policy, echo: str, how: str, connections: dict[str, int]) -> None:
    """T14: a client that connects through a ring is on TCP, one that made its ring after connect() on the SAN; a
    megabyte goes through each and comes back."""
    port = apps.port()
    server = apps.serve(["socat", f"TCP-LISTEN:{port},bind={LOOPBACK},reuseaddr,fork", "PIPE"], plain, port)
    client = apps.start([echo, how, str(port)], plain, pipes=True)
    client.finish()
    if looks.SWITCH:
        assert programs.counters(frozenset({server.pid})).connections == connections
