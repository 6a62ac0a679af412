from __future__ import annotations

import socket
import time
from subprocess import run

import pytest
from world import LOOPBACK, World

V6ONLY = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
REUSEADDR = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


@pytest.mark.parametrize(
    ("bound", "to"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.5.6.7"),
        ("127.0.0.5", "127.0.0.5"),
        ("::1", "::1"),
        ("::", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
        ("0.0.0.0", "::ffff:127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::ffff:0.0.0.0", "127.0.0.1"),
    ],
)
def test_names(world: World, bound: str, to: str) -> None:
    """S5, S26, T8: all four addresses of a connection, in the family of each socket."""
    client, server = world.client, world.server
    listener, address = world.listener(host=bound)
    fd = client.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
    assert client.connect(fd, (to, address[1])) == 0
    accepted, peer = server.accept(listener)
    world.proves(fd, accepted)
    assert client.getpeername(fd) == (to, address[1])
    assert server.getpeername(accepted) == peer
    assert client.getsockname(fd)[1] == peer[1]
    server.getsockname(accepted)
    server.getsockname(listener)
    assert server.getpeername(listener) == "ENOTCONN"
    for actor, number in ((client, fd), (server, accepted)):
        actor.getsockopt(number, socket.SOL_SOCKET, 39)
        actor.getsockopt(number, socket.SOL_SOCKET, 38)


def test_v6only_refuses_v4(world: World) -> None:
    """T8, S5: an IPv6-only wildcard listener takes no IPv4 clients, another listener on 0.0.0.0 does."""
    client, server = world.client, world.server
    six, address = world.listener(host="::", options=[(*V6ONLY, 1)], port=world.port())
    fd = client.socket()
    assert client.connect(fd, (LOOPBACK, address[1])) == "ECONNREFUSED"
    client.close(fd)
    four, _ = world.listener(host="0.0.0.0", port=address[1])
    for host, listener in ((LOOPBACK, four), ("::1", six)):
        fd, accepted = world.join(listener, (host, address[1]))
        client.send(fd, host.encode())
        assert server.recv(accepted, 50) == host.encode()


def test_dual_stack_takes_the_port(world: World) -> None:
    """T8: beside a dual-stack listener 0.0.0.0 is in use."""
    world.tcp_only()
    server = world.server
    _, address = world.listener(host="::")
    fd = server.socket()
    assert server.bind(fd, ("0.0.0.0", address[1])) == "EADDRINUSE"
    assert server.bind(fd, (LOOPBACK, address[1])) == "EADDRINUSE"


def test_exact_shadows_wildcard(world: World) -> None:
    """T8, S5: of two listeners the one at the exact address gets the clients of that address."""
    client, server = world.client, world.server
    port = world.port()
    wide, _ = world.listener(host="0.0.0.0", options=[REUSEADDR], port=port)
    exact = server.socket()
    server.setsockopt(exact, *REUSEADDR)
    if server.bind(exact, (LOOPBACK, port)) != 0:  # in use while the other listens: then the other way round
        server.close(wide)
        assert server.bind(exact, (LOOPBACK, port)) == 0
        wide = server.socket()
        server.setsockopt(wide, *REUSEADDR)
        server.bind(wide, ("0.0.0.0", port))
        server.listen(wide, 16)
        world.tcp_only()
        return
    server.listen(exact, 16)
    for host, listener in ((LOOPBACK, exact), ("127.0.0.2", wide)):
        fd, accepted = world.join(listener, (host, port))
        client.send(fd, host.encode())
        assert server.recv(accepted, 50) == host.encode()


def test_exact_shadows_wildcard_with_reuseport(world: World) -> None:
    """T8, S5: the same by SO_REUSEPORT, when the exact listener comes later, and after it has gone."""
    client, server = world.client, world.server
    port = world.port()
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    wide, _ = world.listener(host="0.0.0.0", options=[reuse], port=port)
    fd, _ = world.join(wide, (LOOPBACK, port))
    exact, _ = world.listener(host=LOOPBACK, options=[reuse], port=port)
    time.sleep(1.1)  # what a client learned is good for a second (S25)
    fd, accepted = world.join(exact, (LOOPBACK, port))
    client.send(fd, b"exact")
    assert server.recv(accepted, 50) == b"exact"
    fd, accepted = world.join(wide, ("127.0.0.3", port))
    server.close(exact)
    time.sleep(1.1)
    fd, accepted = world.join(wide, (LOOPBACK, port))


def test_plain_exact_listener_shadows(world: World) -> None:
    """X1, S5: a plain program's listener at the exact address gets its clients, by TCP, though a companion exists at
    the wildcard."""
    world.tcp_only()
    client, server = world.client, world.server
    port = world.port()
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    world.listener(host="0.0.0.0", options=[reuse], port=port)
    plain = world.stage.start("plain", "client" if not world.pairing.client else "server")
    exact = plain.socket()
    plain.setsockopt(exact, *reuse)
    plain.bind(exact, (LOOPBACK, port))
    plain.listen(exact, 16)
    fd = client.socket()
    assert client.connect(fd, (LOOPBACK, port)) == 0
    accepted, peer = plain.accept(exact)
    assert peer == client.getsockname(fd)
    client.send(fd, b"exact")
    assert plain.recv(accepted, 50) == b"exact"
    del server


def test_port_zero(world: World) -> None:
    """T8: bind to port 0 gives a port, at bind, at listen without bind, and to a connecting socket."""
    client, server = world.client, world.server
    bound = server.socket()
    assert server.getsockname(bound) == ("0.0.0.0", 0)
    server.bind(bound, (LOOPBACK, 0))
    address = server.getsockname(bound)
    assert server.listen(bound, 5) == 0
    assert server.getsockname(bound) == address
    fd, _ = world.join(bound, address)
    unbound = server.socket()
    assert server.listen(unbound, 5) == 0
    name = server.getsockname(unbound)
    assert name[0] == "0.0.0.0"
    fd, _ = world.join(unbound, (LOOPBACK, name[1]))
    six = server.socket(socket.AF_INET6)
    assert server.listen(six, 5) == 0
    fd, _ = world.join(six, ("::1", server.getsockname(six)[1]))
    client.getsockname(fd)


def test_names_before_connecting(world: World) -> None:
    """S4, S26: names of fresh and bound sockets."""
    world.tcp_only()
    client = world.client
    for family, host in ((socket.AF_INET, LOOPBACK), (socket.AF_INET6, "::1")):
        fd = client.socket(family)
        client.getsockname(fd)
        assert client.getpeername(fd) == "ENOTCONN"
        client.bind(fd, (host, 0))
        client.getsockname(fd)
        assert client.bind(fd, (host, 0)) == "EINVAL"
        assert client.getpeername(fd) == "ENOTCONN"


def test_bind_errors(world: World) -> None:
    """T12: EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT of bind."""
    world.tcp_only()
    server = world.server
    _, address = world.listener()
    fd = server.socket()
    assert server.bind(fd, address) == "EADDRINUSE"
    assert server.bind(fd, ("192.0.2.77", 0)) == "EADDRNOTAVAIL"
    assert server.bind(fd, ("::1", 0)) in ("EAFNOSUPPORT", "EINVAL")
    server.listen(fd, 5)
    assert server.connect(fd, address) == "EISCONN"


def test_machine_address(world: World) -> None:
    """S5, S25: the machine's own non-loopback address is local too."""
    text = run(["ip", "-4", "-o", "addr", "show", "scope", "global"], capture_output=True, text=True, timeout=10).stdout
    if not text:
        pytest.skip("the machine has loopback only")
    host = text.split("inet ")[1].split("/")[0]
    listener, address = world.listener(host="0.0.0.0")
    fd, accepted = world.join(listener, (host, address[1]))
    assert world.server.getsockname(accepted)[0] == host
    assert world.client.getsockname(fd)[0] == host


def test_other_machine(world: World) -> None:
    """S7, S18: an address that is not here stays with TCP."""
    world.tcp_only()
    fd = world.client.socket(kind=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    assert world.client.connect(fd, ("192.0.2.1", 9)) in ("EINPROGRESS", "ENETUNREACH", "EHOSTUNREACH")
    assert world.client.getpeername(fd) == "ENOTCONN"
