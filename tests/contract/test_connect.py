from __future__ import annotations

import errno
import select
import signal
import socket
import struct

import pytest
from puppet import Address, Buffer, pack_address
from world import LOOPBACK, World

NONBLOCK = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
TIMEVAL = struct.Struct("=qq")


def test_blocking(world: World) -> None:
    """T1, S17: a blocking connect returns 0, and bytes flow both ways."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert client.send(fd, b"ping") == 4
    assert server.recv(accepted, 100) == b"ping"
    assert server.send(accepted, b"pong!") == 5
    assert client.recv(fd, 100) == b"pong!"
    assert client.close(fd) == 0
    assert server.recv(accepted, 100) == b""


def test_nonblocking(world: World) -> None:
    """T1, S17, S20: EINPROGRESS, writable, 0 once or EISCONN, then EISCONN for ever."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket(kind=NONBLOCK)
    assert client.connect(fd, address) == "EINPROGRESS"
    assert client.poll(fd, 2000) == (1, ["OUT"])
    assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert client.connect(fd, address) == 0
    assert client.connect(fd, address) == "EISCONN"
    assert client.connect(fd, (LOOPBACK, 1)) == "EISCONN"
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert client.connect(fd, address) == "EISCONN"
    assert client.raw("connect", fd, Buffer(b"\2\0"), 1).value == "EINVAL"   # no room for a family
    assert client.recv(fd, 10) == "EAGAIN"
    assert client.fcntl(fd, 3) & 0o4000


def test_nonblocking_by_ioctl(world: World) -> None:
    """T1, T3: the same when FIONBIO or F_SETFL made it non-blocking."""
    client = world.client
    listener, address = world.listener()
    for arrange in ("ioctl", "fcntl"):
        fd = client.socket()
        if arrange == "ioctl":
            assert client.ioctl(fd, 0x5421, 1)[0] == 0
        else:
            assert client.fcntl(fd, 4, 0o4000) == 0
        assert client.connect(fd, address) == "EINPROGRESS"
        assert client.poll(fd, 2000) == (1, ["OUT"])
        accepted, _ = world.server.accept(listener)
        world.proves(fd, accepted)
        assert client.recv(fd, 1) == "EAGAIN"
        client.fcntl(fd, 4, 0)
        assert client.fcntl(fd, 3) == 2
        pending = client.start_recv(fd, 10)
        assert pending.blocks()
        world.server.send(accepted, b"x")
        assert pending.result() == b"x"


def test_timed(world: World) -> None:
    """T1: SO_SNDTIMEO set before connect, SO_RCVTIMEO before and after."""
    client = world.client
    limit = TIMEVAL.pack(0, 80000)
    listener, address = world.listener()
    fd = client.socket()
    client.setsockopt(fd, socket.SOL_SOCKET, 21, limit)
    client.setsockopt(fd, socket.SOL_SOCKET, 20, limit)
    assert client.connect(fd, address) == 0
    accepted, _ = world.server.accept(listener)
    world.proves(fd, accepted)
    assert client.recv(fd, 10) == "EAGAIN"
    assert client.getsockopt(fd, socket.SOL_SOCKET, 20, 16) == limit
    assert client.getsockopt(fd, socket.SOL_SOCKET, 21, 16) == limit
    client.setsockopt(fd, socket.SOL_SOCKET, 20, TIMEVAL.pack(0, 0))
    pending = client.start_recv(fd, 10)
    assert pending.blocks(0.15)
    world.server.send(accepted, b"late")
    assert pending.result() == b"late"


@pytest.mark.parametrize("blocking", [True, False])
def test_refused(world: World, blocking: bool) -> None:
    """T1, S18: nobody listens: ECONNREFUSED, and the socket can connect elsewhere afterwards."""
    world.tcp_only()
    client = world.client
    address = (LOOPBACK, world.port())
    fd = client.socket(kind=socket.SOCK_STREAM if blocking else NONBLOCK)
    if blocking:
        assert client.connect(fd, address) == "ECONNREFUSED"
    else:
        assert client.connect(fd, address) == "EINPROGRESS"
        assert client.poll(fd, 2000)[0] == 1
        assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert client.getpeername(fd) == "ENOTCONN"
    client.close(fd)


@pytest.mark.parametrize("blocking", [True, False])
def test_refused_then_connected(world: World, blocking: bool) -> None:
    """S18, S7: after a refusal the same socket reaches a listener."""
    world.tcp_only()
    client = world.client
    port = world.port()
    fd = client.socket(kind=socket.SOCK_STREAM if blocking else NONBLOCK)
    client.connect(fd, (LOOPBACK, port))
    client.poll(fd, 1000)
    client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR)
    listener, address = world.listener(port=port, options=[(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)])
    if not blocking:
        assert client.connect(fd, address) == "ECONNABORTED"  # once: the end of the first attempt
    assert client.connect(fd, address) == (0 if blocking else "EINPROGRESS")
    assert client.poll(fd, 2000) == (1, ["OUT"])
    accepted, _ = world.server.accept(listener)
    client.send(fd, b"hello")
    assert world.server.recv(accepted, 10) == b"hello"


def test_bad_arguments(world: World) -> None:
    """T12: errors of connect that come before any connection."""
    world.tcp_only()
    client = world.client
    _, address = world.listener()
    fd = client.socket()
    assert client.call("connect", fd, None, 16) == "EFAULT"
    packed = struct.pack("=HH4s8x", socket.AF_INET, 0, bytes(4))
    assert client.call("connect", fd, Buffer(packed), 3) == "EINVAL"
    assert client.call("connect", fd, Buffer(struct.pack("=HH4s8x", 77, 0, bytes(4))), 16) == "EAFNOSUPPORT"
    assert client.call("connect", 999, Buffer(packed), 16) == "EBADF"
    assert client.connect(fd, ("::1", address[1])) == "EAFNOSUPPORT"
    assert client.call("connect", fd, Buffer(packed), -1) == "EINVAL"
    dgram = client.socket(kind=socket.SOCK_DGRAM)
    assert client.connect(dgram, address) == 0
    assert client.getpeername(dgram) == address


def test_connect_to_wildcard(world: World) -> None:
    """T1, S26: connecting to 0.0.0.0 reaches this machine."""
    world.tcp_only()  # TCP or SAN: the addresses must be TCP's
    listener, address = world.listener(host="0.0.0.0")
    fd = world.client.socket()
    assert world.client.connect(fd, ("0.0.0.0", address[1])) == 0
    accepted, _ = world.server.accept(listener)
    assert world.client.getpeername(fd) == (LOOPBACK, address[1])
    assert world.server.getsockname(accepted) == (LOOPBACK, address[1])


@pytest.mark.parametrize("bound", ["127.0.0.1", "127.0.0.9"])
def test_connect_to_wildcard_from_an_address(world: World, bound: str) -> None:
    """T1: 0.0.0.0 is the socket's own address where it has one: a listener on another is not reached."""
    listener, address = world.listener()
    fd = world.client.socket()
    assert world.client.bind(fd, (bound, 0)) == 0
    if bound == address[0]:
        assert world.client.connect(fd, ("0.0.0.0", address[1])) == 0
        accepted, _ = world.server.accept(listener)
        world.proves(fd, accepted)
    else:
        assert world.client.connect(fd, ("0.0.0.0", address[1])) == "ECONNREFUSED"
        world.tcp_only()



def test_disconnect(world: World) -> None:
    """T1, S20: connect(AF_UNSPEC) ends the connection, and the socket can connect again."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, _ = world.join(listener, address)
    assert client.disconnect(fd) == 0
    assert client.getpeername(fd) == "ENOTCONN"
    assert client.connect(fd, address) == 0
    again, _ = server.accept(listener)
    client.send(fd, b"again")
    assert server.recv(again, 10) == b"again"


@pytest.mark.parametrize("side", ["client", "bound", "wildcard", "accepted", "accepted from any"])
@pytest.mark.parametrize("first", ["send", "recv", "error", "poll", "shutdown"])
def test_disconnect_leaves(world: World, side: str, first: str) -> None:
    """T1, S26: what connect(AF_UNSPEC) leaves at either end: a reset that is told once, and the local name as TCP keeps
    it; the peer is told where bytes were unread. The socket can be used again."""
    client, server = world.client, world.server
    listener, address = world.listener(host="0.0.0.0" if side == "accepted from any" else LOOPBACK)
    fd = client.socket()
    if side in ("bound", "wildcard"):
        assert client.bind(fd, (LOOPBACK if side == "bound" else "0.0.0.0", world.port())) == 0
    assert client.connect(fd, (LOOPBACK, address[1])) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    actor, ended = (server, accepted) if side.startswith("accepted") else (client, fd)
    peer, other = (client, fd) if side.startswith("accepted") else (server, accepted)
    name = actor.getsockname(ended)
    peer.send(other, b"never read")
    assert actor.poll([(ended, select.POLLIN)], 2000)[0] == 1
    assert actor.disconnect(ended) == 0
    if first == "send":
        assert actor.send(ended, b"x", socket.MSG_NOSIGNAL) == "ECONNRESET"
    elif first == "recv":
        assert actor.recv(ended, 5) == "ECONNRESET"
    elif first == "error":
        assert actor.getsockopt(ended, socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    elif first == "poll":
        actor.poll([(ended, select.POLLIN | select.POLLOUT)], 0)
    else:
        actor.shutdown(ended, socket.SHUT_WR)
    assert actor.getsockname(ended)[1] == name[1]
    actor.getpeername(ended)
    actor.recv(ended, 5)
    actor.send(ended, b"x", socket.MSG_NOSIGNAL)
    actor.poll([(ended, select.POLLIN | select.POLLOUT)], 0)
    assert peer.recv(other, 50) == "ECONNRESET"
    peer.getsockname(other)
    peer.getpeername(other)
    assert actor.connect(ended, (LOOPBACK, address[1])) == 0
    actor.getpeername(ended)
    if side in ("bound", "wildcard"):
        assert actor.getsockname(ended)[1] == name[1]
    again = world.server.accept(listener)
    if first != "shutdown":            # which holds on: TCP sends no more
        assert actor.send(ended, b"again") == 5
        assert server.recv(again[0], 10) == b"again"


def test_disconnect_after_both_ends_closed(world: World) -> None:
    """T1: no reset is told where the connection was over."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    server.close(accepted)
    client.shutdown(fd, socket.SHUT_WR)
    client.raw("usleep", 20000)
    assert client.disconnect(fd) == 0
    assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert client.recv(fd, 5) == "ENOTCONN"


def test_disconnect_unconnected(world: World) -> None:
    """T1: connect(AF_UNSPEC) on a fresh socket leaves it usable."""
    client = world.client
    listener, address = world.listener()
    fd = client.socket()
    assert client.disconnect(fd) == 0
    assert client.connect(fd, address) == 0
    accepted, _ = world.server.accept(listener)
    world.proves(fd, accepted)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_shut_before_connect(world: World, how: int) -> None:
    """T1, T9: a socket that was shut down before it connects is shut when it is connected."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    assert client.shutdown(fd, how) == "ENOTCONN"
    assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    client.poll([(fd, select.POLLIN | select.POLLOUT)], 0)
    client.send(fd, b"x", socket.MSG_NOSIGNAL)
    if how != socket.SHUT_WR:
        assert client.recv(fd, 5) == b""
    server.close(accepted)
    world.tcp_only()


def test_disconnect_of_a_listener(world: World) -> None:
    """T1, S23: connect(AF_UNSPEC) on a listener ends it for TCP and SAN clients, and it can listen again."""
    client, server = world.client, world.server
    listener, address = world.listener()
    assert server.disconnect(listener) == 0
    server.poll([(listener, select.POLLIN | select.POLLOUT)], 0)
    assert server.getsockopt(listener, socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
    assert server.accept(listener) == "EINVAL"
    assert client.connect(client.socket(), address) == "ECONNREFUSED"
    assert server.listen(listener) == 0
    world.join(listener, server.getsockname(listener))


def test_bind_then_connect(world: World) -> None:
    """T8, S11, S12: a socket bound to an address and port connects from there."""
    client = world.client
    listener, address = world.listener()
    fd = client.socket()
    assert client.bind(fd, ("127.0.0.1", 0)) == 0
    own = client.getsockname(fd)
    assert client.connect(fd, address) == 0
    accepted, peer = world.server.accept(listener)
    assert peer == own == client.getsockname(fd)
    assert world.server.getpeername(accepted) == own
    world.proves(fd, accepted)


def test_bind_other_loopback_then_connect(world: World) -> None:
    """T8, S12, S26: the source address that the program chose is the one that the server sees."""
    client = world.client
    listener, address = world.listener()
    fd = client.socket()
    assert client.bind(fd, ("127.0.0.9", 0)) == 0
    assert client.connect(fd, address) == 0
    accepted, peer = world.server.accept(listener)
    assert peer[0] == "127.0.0.9"
    assert peer == client.getsockname(fd)
    world.proves(fd, accepted)


def test_bind_on_a_connection(world: World) -> None:
    """T12, S16: whatever is bound, in whatever family and length, TCP's errno."""
    fd, accepted = world.pair()
    for actor, end in ((world.client, fd), (world.server, accepted)):
        for family in (socket.AF_UNSPEC, socket.AF_INET, socket.AF_UNIX, socket.AF_INET6):
            for length in (-1, 0, 2, 15, 16, 28, 128, 129):
                actor.call("bind", end, Buffer(struct.pack("=H", family) + bytes(126)), length)
        actor.call("bind", end, 8, 16)
        actor.getsockname(end)


def test_bind_wildcard_then_connect(world: World) -> None:
    """S12, S26: bound to the wildcard, the socket gets a concrete address at connect."""
    client = world.client
    listener, address = world.listener()
    fd = client.socket()
    assert client.bind(fd, ("0.0.0.0", 0)) == 0
    assert client.getsockname(fd)[0] == "0.0.0.0"
    assert client.connect(fd, address) == 0
    accepted, peer = world.server.accept(listener)
    assert peer == client.getsockname(fd)
    assert peer[0] == LOOPBACK
    world.proves(fd, accepted)


def test_bind_fixed_port_then_connect(world: World) -> None:
    """T8: bind with SO_REUSEADDR to a chosen port, twice in a row after a close."""
    client = world.client
    listener, address = world.listener()
    port = world.port()
    for _ in range(2):
        fd = client.socket()
        client.setsockopt(fd, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert client.bind(fd, (LOOPBACK, port)) == 0
        other = client.socket()
        assert client.bind(other, (LOOPBACK, port)) == "EADDRINUSE"
        assert client.connect(fd, address) == 0
        accepted, peer = world.server.accept(listener)
        assert peer == (LOOPBACK, port)
        world.proves(fd, accepted)
        world.server.close(accepted)
        client.recv(fd, 1)
        client.close(fd)
        client.close(other)
        port = world.port()


def test_ports_differ(world: World) -> None:
    """T8: connections have local ports of their own, which nobody can bind meanwhile."""
    client = world.client
    listener, address = world.listener()
    own: set[Address] = set()
    for _ in range(8):
        fd, _ = world.join(listener, address)
        own.add(client.getsockname(fd))
        last = client.getsockname(fd)
    assert len(own) == 8
    fd = client.socket()
    assert client.bind(fd, last) == "EADDRINUSE"


def test_many(world: World) -> None:
    """T1: 200 connections at once, each its own peer."""
    client, server = world.client, world.server
    listener, address = world.listener(backlog=256)
    own, peers = [], []
    for _ in range(200):
        fd = client.socket()
        assert client.connect(fd, address) == 0
        own.append(fd)
    for _ in range(200):
        peers.append(server.accept(listener)[0])
    world.proves(own[0], peers[0])
    world.proves(own[199], peers[199])
    for number, fd in enumerate(own):
        client.send(fd, b"%d" % number)
    assert sorted(int(server.recv(fd, 10)) for fd in peers) == list(range(200))


def test_backlog_full(world: World) -> None:
    """S23, T1: more clients than the backlog holds: none is lost once the server accepts."""
    client, server = world.client, world.server
    listener, address = world.listener(backlog=4)
    fds = []
    for _ in range(4):
        fd = client.socket(kind=NONBLOCK)
        assert client.connect(fd, address) == "EINPROGRESS"
        fds.append(fd)
    for number, fd in enumerate(fds):
        assert client.poll(fd, 2000) == (1, ["OUT"])
        assert client.send(fd, b"%d" % number) == 1
    world.proves(client_fd=fds[0])
    for number in range(4):
        accepted, _ = server.accept(listener)
        assert server.recv(accepted, 10) == b"%d" % number


def test_backlog_overflow(world: World) -> None:
    """S23: clients beyond the backlog wait, and are served when the server accepts."""
    world.tcp_only()
    listener, address = world.listener(backlog=1)
    packed, tally = Buffer(pack_address(address)), Buffer(bytes(1024))
    threads = [world.client.thread(f"client{n}") for n in range(5)]
    for thread in threads:
        thread.ask("puppet_ask_bytes", packed, 16, 1, tally)
    assert world.server.call("puppet_serve_bytes", listener, ord("x"), 5) == 5
    assert [thread.answer("puppet_ask_bytes").result for thread in threads] == [1] * 5


@pytest.mark.parametrize("restart", [True, False])
def test_interrupted_connect(world: World, restart: bool) -> None:
    """T9: a signal does not disturb a connect that finishes at once."""
    client = world.client
    client.handle(signal.SIGUSR1, 0x10000000 if restart else 0)
    listener, address = world.listener()
    client.kill(signal.SIGUSR1)
    fd = client.socket()
    assert client.connect(fd, address) == 0
    accepted, _ = world.server.accept(listener)
    world.proves(fd, accepted)


def test_fast_open(world: World) -> None:
    """S6, T7: sendto with MSG_FASTOPEN connects and sends."""
    world.tcp_only()
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    assert client.sendto(fd, b"early", socket.MSG_FASTOPEN, address) == 5
    accepted, _ = server.accept(listener)
    assert server.recv(accepted, 10) == b"early"
    assert client.getpeername(fd) == address


def test_sockets_of_other_kinds(world: World) -> None:
    """S8: UDP, and TCP by protocol number."""
    client, server = world.client, world.server
    udp, other = client.socket(kind=socket.SOCK_DGRAM), server.socket(kind=socket.SOCK_DGRAM)
    server.bind(other, (LOOPBACK, 0))
    to = server.getsockname(other)
    assert client.sendto(udp, b"datagram", 0, to) == 8
    assert server.recv(other, 100) == b"datagram"
    listener, address = world.listener()
    fd = client.socket(protocol=socket.IPPROTO_TCP)
    client.connect(fd, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_bad_pointer(world: World) -> None:
    """T12: an address that is not in memory is EFAULT, not a crash."""
    world.tcp_only()
    fd = world.client.socket()
    assert world.client.call("connect", fd, 8, 16) == "EFAULT"
    assert world.client.call("bind", fd, 8, 16) == "EFAULT"
