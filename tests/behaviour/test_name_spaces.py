"""Network name spaces: nothing crosses them."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from puppet import Actor, Buffer
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a network name space")
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914


def leave(actor: Actor) -> None:
    """Puts the process in a network name space of its own, with a loopback."""
    assert actor.raw("unshare", CLONE_NEWNET).value == 0
    fd = actor.raw("socket", socket.AF_INET, socket.SOCK_DGRAM, 0).result
    request = struct.pack("16sh22x", b"lo", 0x1 | 0x40)
    assert actor.raw("ioctl", fd, SIOCSIFFLAGS, Buffer(request)).value == 0
    assert actor.raw("close", fd).value == 0


def test_other_side(san: World) -> None:
    """X9: after unshare() the same address is another place: refused, although a companion exists outside."""
    listener, address = san.listener()
    san.join(listener, address)
    leave(san.client)
    fd = san.client.socket()
    assert san.client.connect(fd, address) == "ECONNREFUSED"


def test_socket_from_before(san: World) -> None:
    """X9, O1: a socket made before unshare() is of the old name space: TCP carries it there."""
    listener, address = san.listener()
    fd = san.client.socket()
    leave(san.client)
    assert san.client.connect(fd, address) == 0
    assert not companion_name(san.client, fd)
    accepted, _ = san.server.accept(listener)
    san.client.send(fd, b"across")
    assert san.server.recv(accepted, 10) == b"across"
    assert sum(dict(stats.process(san.client.pid).reasons).values()) == 1


def test_socket_from_before_beside_a_twin(san: World) -> None:
    """X9, O1: the same, with a companion at the same address in the new name space: it is not taken."""
    listener, address = san.listener()
    fd = san.client.socket()
    leave(san.client)
    san.listener(san.client, port=address[1])
    assert san.client.connect(fd, address) == 0
    assert not companion_name(san.client, fd)
    accepted, _ = san.server.accept(listener)
    san.client.send(fd, b"across")
    assert san.server.recv(accepted, 10) == b"across"
    assert dict(stats.process(san.client.pid).reasons) == {"NETNS": 1}


def test_listener_from_before(san: World) -> None:
    """X9: a listener of the old name space that listens after unshare() serves there by TCP."""
    fd = san.server.socket()
    san.server.bind(fd, (LOOPBACK, 0))
    address = san.server.getsockname(fd)
    leave(san.server)
    assert san.server.listen(fd, 5) == 0
    client = san.client.socket()
    assert san.client.connect(client, address) == 0
    accepted, _ = san.server.accept(fd)
    san.client.send(client, b"across")
    assert san.server.recv(accepted, 10) == b"across"
    assert not companion_name(san.client, client)


def test_both_inside(san: World) -> None:
    """X9: a child of the process that left shares its new name space, and their connections are on the SAN there."""
    leave(san.server)
    child = san.server.fork("child")
    listener, address = san.listener()
    fd = child.socket()
    assert child.connect(fd, address) == 0
    accepted, _ = san.server.accept(listener)
    child.send(fd, b"inside")
    assert san.server.recv(accepted, 10) == b"inside"
    assert dict(stats.process(child.pid).connections)["unix"] == 1


def test_established_goes_on(san: World) -> None:
    """X9, S27: a connection made before goes on after unshare()."""
    listener, address = san.listener()
    fd, accepted = san.join(listener, address)
    leave(san.client)
    san.client.send(fd, b"still")
    assert san.server.recv(accepted, 10) == b"still"
    assert san.client.getpeername(fd) == address


def test_back_again(san: World) -> None:
    """X9: after setns() back to the first name space new connections are on the SAN again."""
    client = san.client
    listener, address = san.listener()
    home = client.raw("open", Buffer(b"/proc/self/ns/net\0"), 0).result
    leave(client)
    fd = client.socket()
    assert client.connect(fd, address) == "ECONNREFUSED"
    client.close(fd)
    assert client.raw("setns", home, CLONE_NEWNET).value == 0
    fd = client.socket()
    assert client.connect(fd, address) == 0
    accepted, _ = san.server.accept(listener)
    san.proves(fd, accepted)
