"""What the kernel shows of companions: names with fully qualified addresses, and nothing once they are gone."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from world import LOOPBACK, World, companion_name, names_of


def text(address: tuple[str, int]) -> str:
    if ":" not in address[0]:
        return f"{address[0]}:{address[1]}"
    return f"{socket.inet_pton(socket.AF_INET6, address[0]).hex()}:{address[1]}"


@pytest.mark.parametrize(
    ("host", "own"),
    [
        (LOOPBACK, None),
        (LOOPBACK, LOOPBACK),
        (LOOPBACK, "127.0.0.7"),
        (LOOPBACK, "0.0.0.0"),
        ("::1", None),
        ("::1", "::"),
    ],
)
def test_qualified(san: World, host: str, own: str | None) -> None:
    """S11, S12: however the client was bound, its companion has a concrete address and port, those that it sees."""
    client = san.client
    listener, address = san.listener(host=host)
    fd = client.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if own:
        client.bind(fd, (own, 0))
    assert client.connect(fd, address) == 0
    name, peer = client.getsockname(fd), client.getpeername(fd)
    assert name[1]
    assert name[0] == (own if own and own not in ("0.0.0.0", "::") else host)
    assert companion_name(client, fd) == f"@san1/C/{text(name)}/{text(peer)}"
    assert san.server.accept(listener)[1] == name
    other = client.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    assert client.bind(other, name) == "EADDRINUSE"


@pytest.mark.parametrize(("host", "kind"), [("0.0.0.0", "L"), ("::", "D"), (LOOPBACK, "L"), ("::1", "L")])
def test_listener(san: World, host: str, kind: str) -> None:
    """S12: a listener's companion, a stream and a beacon, bears the bound address or the wildcard and the port."""
    _, address = san.listener(host=host)
    assert names_of(address[1]) == [f"@san1/{kind}/{text(address)}/0"] * 2


def test_fresh_and_bound(san: World) -> None:
    """S1, S4, S6: no companion exists before listen or connect."""
    port = san.port()
    fd = san.server.socket()
    san.server.bind(fd, (LOOPBACK, port))
    san.server.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert names_of(port) == []
    san.server.listen(fd, 5)
    assert len(names_of(port)) == 2


def test_both_ends_close(san: World) -> None:
    """X5: after close no name is left of the connection, after the listener's close none of the port."""
    listener, address = san.listener()
    fd, accepted = san.join(listener, address)
    port = san.client.getsockname(fd)[1]
    assert names_of(port)
    san.client.close(fd)
    san.server.close(accepted)
    assert names_of(port) == []
    san.server.close(listener)
    assert names_of(address[1]) == []


@pytest.mark.parametrize("side", ["client", "server", "both"])
def test_killed(san: World, side: str) -> None:
    """X5: kill -9 with connections open leaves no name, no process and no file."""
    listener, address = san.listener()
    fd, _ = san.join(listener, address)
    child = san.server.fork("child")
    before = set(os.listdir("/dev/shm"))
    victims = {"client": [san.client], "server": [san.server, child], "both": [san.client, san.server, child]}[side]
    ports = [address[1], san.client.getsockname(fd)[1]]
    for victim in victims:
        victim.kill(signal.SIGKILL)
    if side == "client":
        assert san.server.recv(4, 5) == b""
    elif side == "server":
        assert san.client.recv(fd, 5) == b""
    for victim in victims:
        end = time.monotonic() + 5
        while _alive(victim.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not _alive(victim.pid)
    if side != "client":
        assert not [name for name in names_of(address[1]) if "/L/" in name]
    if side == "both":
        assert names_of(ports[0]) + names_of(ports[1]) == []
    assert set(os.listdir("/dev/shm")) <= before


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_listener_lives_with_its_last_holder(san: World) -> None:
    """X5, S23: a prefork server whose parent was killed serves on; when the last worker dies the name goes."""
    listener, address = san.listener()
    worker = san.server.fork("worker")
    san.server.kill()
    fd = san.client.socket()
    assert san.client.connect(fd, address) == 0
    accepted, _ = worker.accept(listener)
    san.proves(fd, accepted, server=worker)
    worker.kill()
    time.sleep(0.05)
    assert san.client.recv(fd, 5) == b""
    refused = san.client.socket()
    assert san.client.connect(refused, address) == "ECONNREFUSED"
