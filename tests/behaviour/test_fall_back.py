"""A SAN connect that does not succeed is followed by TCP, and the program notices nothing."""

from __future__ import annotations

import socket
import time

import pytest
from puppet import Actor
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

NONBLOCK = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


def reasons(actor: Actor) -> dict[str, int]:
    return dict(stats.process(actor.pid).reasons)


def listener_name(port: int, slot: int = 0) -> str:
    return f"\0san1/L/{LOOPBACK}:{port}/{slot}"


def test_full_backlog(san: World) -> None:
    """S18, S23, O1: when the companion's backlog is full the next client goes by TCP at once, and all are served."""
    listener, address = san.listener(backlog=2)
    fds = []
    for _ in range(5):
        fd = san.client.socket(kind=NONBLOCK)
        assert san.client.connect(fd, address) == "EINPROGRESS"
        fds.append(fd)
    for fd in fds:
        assert san.client.poll([(fd, 4)], 3000) == (1, ["OUT"])
    on_san = [bool(companion_name(san.client, fd)) for fd in fds]
    assert True in on_san
    assert False in on_san
    assert reasons(san.client).get("BACKLOG_FULL") == on_san.count(False)
    for n, fd in enumerate(fds):
        assert san.client.send(fd, b"%d" % n) == 1
    accepted = [san.server.accept(listener)[0] for _ in fds]
    assert sorted(san.server.recv(fd, 5) for fd in accepted) == [b"%d" % n for n in range(5)]


def test_beacon_without_listener(san: World) -> None:
    """S18, X4: a name that answers but does not listen sends the client to TCP."""
    with socket.create_server((LOOPBACK, 0)) as plain, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as beacon:
        beacon.bind(listener_name(plain.getsockname()[1]))
        fd = san.client.socket()
        assert san.client.connect(fd, plain.getsockname()) == 0
        assert not companion_name(san.client, fd)
        accepted, peer = plain.accept()
        with accepted:
            assert peer == san.client.getsockname(fd)
            san.client.send(fd, b"by TCP")
            assert accepted.recv(10) == b"by TCP"
        assert sum(reasons(san.client).values()) == 1


def test_plain_server(san: World) -> None:
    """S18, O1: a server without the switch is reached by TCP, with the reason, and by the same port afterwards too."""
    with socket.create_server((LOOPBACK, 0)) as plain:
        for count in (1, 2):
            fd = san.client.socket()
            assert san.client.connect(fd, plain.getsockname()) == 0
            accepted, _ = plain.accept()
            accepted.close()
            assert reasons(san.client) == {"NO_COMPANION": count}


def test_companion_ends_within_the_second(san: World) -> None:
    """S18, S23: a server that ends and is replaced by a plain one within a second gets its clients by TCP."""
    port = san.port()
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener, address = san.listener(port=port, options=[reuse])
    san.join(listener, address)
    san.server.close(listener)
    with socket.create_server((LOOPBACK, port)) as plain:
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        accepted, peer = plain.accept()
        accepted.close()
        assert peer == san.client.getsockname(fd)


def test_companion_appears(san: World) -> None:
    """S18, S25: a server that starts later under the switch is found within a second."""
    port = san.port()
    with socket.create_server((LOOPBACK, port)):
        fd = san.client.socket()
        san.client.connect(fd, (LOOPBACK, port))
        assert not companion_name(san.client, fd)
    listener, address = san.listener(port=port, options=[(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)])
    time.sleep(1.05)
    san.join(listener, address)


@pytest.mark.parametrize("option", [socket.SOL_SOCKET, socket.IPPROTO_TCP])
def test_fallback_leaves_no_trace(san: World, option: int) -> None:
    """S7, S14: options set before a connect that fell back are TCP's own, and the source port is free to choose."""
    with socket.create_server((LOOPBACK, 0)) as plain:
        fd = san.client.socket()
        name = socket.SO_KEEPALIVE if option == socket.SOL_SOCKET else socket.TCP_NODELAY
        san.client.setsockopt(fd, option, name, 1)
        assert san.client.connect(fd, plain.getsockname()) == 0
        assert san.client.getsockopt(fd, option, name) == 1
        assert san.client.shutdown(fd, socket.SHUT_WR) == 0
        accepted, _ = plain.accept()
        assert accepted.recv(5) == b""
        accepted.close()
