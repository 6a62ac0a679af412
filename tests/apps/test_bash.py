from __future__ import annotations

import hashlib
from pathlib import Path

import looks
import pytest
import servers
from programs import LOOPBACK, Policy, Program, Programs

# cat, which bash becomes, reads the connection on a descriptor that it inherited.
FETCH = """\
exec 3<>/dev/tcp/$0/$1 || exit
printf 'GET /large HTTP/1.0\\r\\n\\r\\n' >&3
read -r status <&3
while read -r line <&3 && [ "$line" != $'\\r' ]; do :; done
read -r
exec cat <&3
"""


def bash(apps: Programs, policy: Policy | None, port: int) -> Program:
    return apps.start(["bash", "-c", FETCH, LOOPBACK, str(port)], policy, pipes=True)


def same(client: Program, site: Path) -> bool:
    client.send("go on")
    return hashlib.sha256(client.finish()).digest() == hashlib.sha256((site / "large").read_bytes()).digest()


def test_bash(apps: Programs, site: Path, policy: Policy) -> None:
    """P1, P5, S15, S27, T4: bash's /dev/tcp is on the SAN, and so is what it execs with the connection."""
    port = apps.port()
    server = servers.http_server(apps, policy, port, site)
    client = bash(apps, policy, port)
    looks.on_san(port, client, server)
    looks.engine(client, policy)
    assert same(client, site)


@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_bash_mixed(apps: Programs, site: Path, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: the same with one plain side, by TCP."""
    port = apps.port()
    server = servers.http_server(apps, None if plain_side == "server" else policy, port, site)
    client = bash(apps, None if plain_side == "client" else policy, port)
    looks.on_tcp(port, client, server)
    assert same(client, site)
