from __future__ import annotations

import fcntl
import os
import select
import socket
import struct

import pytest
from puppet import Actor, Argument, Buffer, pack_address
from world import LOOPBACK, World

IN = select.POLLIN
CLOEXEC = os.O_CLOEXEC


def works(world: World, fd: int, accepted: int, client: Actor | None = None, server: Actor | None = None) -> None:
    """Bytes flow both ways, and both ends know their names."""
    client, server = client or world.client, server or world.server
    assert client.send(fd, b"ping") == 4
    assert server.recv(accepted, 10) == b"ping"
    assert server.send(accepted, b"pong") == 4
    assert client.recv(fd, 10) == b"pong"
    assert client.getsockname(fd) == server.getpeername(accepted)
    assert server.getsockname(accepted) == client.getpeername(fd)


@pytest.mark.parametrize("way", ["dup", "dup2", "dup3", "dupfd", "dupfd_cloexec"])
def test_duplicates_of_connections(world: World, way: str) -> None:
    """T3, S27: a duplicate of either end is the connection, also after the original was closed."""
    fd, accepted = world.pair()
    copies = []
    for actor, number in ((world.client, fd), (world.server, accepted)):
        copy = {
            "dup": lambda a=actor, n=number: a.dup(n),
            "dup2": lambda a=actor, n=number: a.dup2(n, 40),
            "dup3": lambda a=actor, n=number: a.dup3(n, 41, CLOEXEC),
            "dupfd": lambda a=actor, n=number: a.fcntl(n, fcntl.F_DUPFD, 50),
            "dupfd_cloexec": lambda a=actor, n=number: a.fcntl(n, fcntl.F_DUPFD_CLOEXEC, 50),
        }[way]()
        assert actor.fcntl(copy, fcntl.F_GETFD) == (1 if way in ("dup3", "dupfd_cloexec") else 0)
        copies.append(copy)
    works(world, *copies)
    world.client.close(fd)
    world.server.close(accepted)
    works(world, *copies)
    world.proves(*copies)
    world.client.shutdown(copies[0], socket.SHUT_WR)
    assert world.server.recv(copies[1], 5) == b""


def test_duplicate_before_connect(world: World) -> None:
    """T3: a socket duplicated while fresh: after connect by one number both are the connection, flags kept apart."""
    client = world.client
    listener, address = world.listener()
    fd = client.socket()
    copies = [client.dup(fd), client.dup3(fd, 33, CLOEXEC), client.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 44)]
    assert client.connect(copies[0], address) == 0
    accepted, _ = world.server.accept(listener)
    for copy in (fd, *copies):
        works(world, copy, accepted)
        world.proves(copy, accepted)
        client.fcntl(copy, fcntl.F_GETFD)
    for copy in (fd, copies[0], copies[1]):
        client.close(copy)
        works(world, copies[2], accepted)


def test_dup2_onto_a_connection(world: World) -> None:
    """T10: dup2 of something else onto a connection closes it for the peer; the number has no memory."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert client.dup2(2, fd) == fd
    assert server.recv(accepted, 5) == b""
    assert client.getsockname(fd) == "ENOTSOCK"
    assert client.getsockopt(fd, socket.SOL_SOCKET, 39) == "ENOTSOCK"
    one, two = world.pair()
    other, far = world.pair()
    assert client.dup2(one, other) == other
    assert server.recv(far, 5) == b""
    works(world, other, two)
    assert client.dup2(one, one) == one
    assert client.dup3(one, one, 0) == "EINVAL"
    assert client.dup2(999, one) == "EBADF"
    works(world, one, two)


def test_dup2_onto_a_listener(world: World) -> None:
    """T10, S23: a listener ended by dup2 serves nobody."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, accepted = world.join(listener, address)
    server.dup2(accepted, listener)
    refused = client.socket()
    assert client.connect(refused, address) == "ECONNREFUSED"
    works(world, fd, listener)


def test_standard_descriptors(world: World) -> None:
    """T3: a connection as standard input and output, as shells make it."""
    fd, accepted = world.pair()
    client = world.client
    assert client.dup2(fd, 1) == 1
    client.close(fd)
    works(world, 1, accepted)
    world.proves(1, accepted)


CLOSERS = ["close", "close_range", "closefrom", "dup2", "fclose", "syscall", "raw"]


@pytest.mark.parametrize("how", CLOSERS)
@pytest.mark.parametrize("next_one", ["socket", "pipe", "udp", "unix"])
def test_number_reused(world: World, how: str, next_one: str) -> None:
    """T10: after any close the number's next owner is what it is, and has nothing of the connection."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if how == "close":
        client.close(fd)
    elif how == "close_range":
        assert client.call("close_range", fd, fd, 0) == 0
    elif how == "closefrom":
        client.call("closefrom", fd)
    elif how == "dup2":
        client.dup2(2, fd)
        client.raw("libc:close", fd)
    elif how == "fclose":
        client.raw("fclose", client.raw("fdopen", fd, Buffer(b"r\0")).result)
    elif how == "syscall":
        assert client.call("syscall", 3, fd) == 0
    else:
        assert client.raw("puppet_unseen_close", fd).result == 0
    assert server.recv(accepted, 5) == b""
    if next_one == "socket":
        assert client.socket(socket.AF_INET6) == fd
        assert client.getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
        assert client.getsockopt(fd, socket.SOL_SOCKET, 39) == 10
    elif next_one == "udp":
        assert client.socket(kind=socket.SOCK_DGRAM) == fd
    elif next_one == "unix":
        assert client.socket(socket.AF_UNIX) == fd
        assert client.getsockopt(fd, socket.SOL_SOCKET, 39) == 1
    else:
        client.raw("pipe", Buffer(bytes(8)))
        client.raw("write", fd + 1, Buffer(b"piped"), 5)
        assert client.read(fd, 10) == b"piped"
        assert client.send(fd, b"x") == "ENOTSOCK"
    client.getpeername(fd)
    client.getsockname(fd)
    client.poll([(fd, IN)])
    client.close(fd)


@pytest.mark.parametrize("how", ["loop", "close_range", "closefrom", "cloexec"])
def test_close_everything(world: World, how: str) -> None:
    """T11: after closing 3 to 1023, as daemons do, new connections and listeners work as before, on the SAN."""
    client, server = world.client, world.server
    listener, address = world.listener()
    world.join(listener, address)
    for actor in (client, server):
        if how == "loop":
            actor.raw("puppet_close_each", 3, 1023)
        elif how == "close_range":
            assert actor.call("close_range", 3, -1, 0) == 0
        elif how == "closefrom":
            actor.call("closefrom", 3)
        else:
            assert actor.call("close_range", 3, 1023, 4) == 0
            actor.raw("puppet_close_each", 3, 20)
    for _ in range(2):
        listener, address = world.listener()
        fd, accepted = world.join(listener, address)
        works(world, fd, accepted)


@pytest.mark.parametrize("how", ["loop", "close_range"])
def test_close_everything_else(world: World, how: str) -> None:
    """T11: a listener and a connection kept through a loop that closes all other numbers go on working."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, accepted = world.join(listener, address)
    for actor, kept in ((client, [fd]), (server, [listener, accepted])):
        first = 3
        for number in [*sorted(kept), 3000]:
            if how == "loop":
                actor.raw("puppet_close_each", first, min(number - 1, 3000))
            elif first < number:
                actor.call("close_range", first, number - 1, 0)
            first = number + 1
    works(world, fd, accepted)
    server.poll([(listener, IN)])
    fd, accepted = world.join(listener, address)
    works(world, fd, accepted)


@pytest.mark.parametrize("waits", ["accept", "poll"])
def test_close_unseen(world: World, waits: str) -> None:
    """T11: a listener whose hidden descriptors the program closed by instructions of its own goes on accepting."""
    client, server = world.client, world.server
    listener, address = world.listener()
    server.poll([(listener, IN)])
    fd, accepted = world.join(listener, address)
    for name in os.listdir(f"/proc/{server.pid}/fd"):
        if int(name) > 100:
            assert server.raw("puppet_unseen_close", int(name)).result == 0
    works(world, fd, accepted)
    for _ in range(2):
        fd = client.socket()
        assert client.connect(fd, address) == 0
        if waits == "poll":
            assert server.poll([(listener, IN)], 2000) == (1, ["IN"])
        accepted, _ = server.accept(listener)
        works(world, fd, accepted)


def test_write_to_another_file(world: World) -> None:
    """T10: write() and writev() reach what took the number where no hook saw it; a vfork child does the same."""
    client = world.client
    fd, _ = world.pair()
    assert client.raw("puppet_unseen_close", fd).result == 0
    assert client.raw("posix_openpt", os.O_RDWR | os.O_NOCTTY).result == fd
    assert client.write(fd, b"word") == 4
    assert client.writev(fd, [b"one", b"two"]) == 6
    client.close(fd)


def test_close_range_flags(world: World) -> None:
    """T10, T12: close_range's errors and its CLOEXEC."""
    client = world.client
    fd, accepted = world.pair()
    assert client.call("close_range", 9, 5, 0) == "EINVAL"
    assert client.call("close_range", fd, fd, 64) == "EINVAL"
    assert client.call("close_range", fd, fd, 4) == 0
    assert client.fcntl(fd, fcntl.F_GETFD) == 1
    works(world, fd, accepted)
    assert client.call("close_range", 500, 600, 0) == 0
    works(world, fd, accepted)
    assert client.call("close_range", 3, 600, 2) == 0
    assert world.server.recv(accepted, 5) == b""


def test_close_on_exec_flags(world: World) -> None:
    """T3: FD_CLOEXEC of connecting and accepted sockets is the program's."""
    client, server = world.client, world.server
    listener, address = world.listener()
    for kind in (0, socket.SOCK_CLOEXEC):
        fd = client.socket(kind=socket.SOCK_STREAM | kind)
        client.connect(fd, address)
        client.fcntl(fd, fcntl.F_GETFD)
        accepted, _ = server.accept(listener)
        world.proves(fd, accepted)
        server.fcntl(accepted, fcntl.F_GETFD)
        for actor, number in ((client, fd), (server, accepted)):
            actor.fcntl(number, fcntl.F_SETFD, 1)
            actor.fcntl(number, fcntl.F_GETFD)
            actor.fcntl(number, fcntl.F_SETFD, 0)
            actor.fcntl(number, fcntl.F_GETFD)


@pytest.mark.parametrize("arrange", ["before", "after"])
def test_listener_flags(world: World, arrange: str) -> None:
    """T3: O_NONBLOCK, O_ASYNC and FIONBIO on listeners, and what accept does then."""
    server = world.server
    listener = server.socket()
    server.bind(listener, (LOOPBACK, 0))
    if arrange == "after":
        server.listen(listener, 5)
    server.fcntl(listener, fcntl.F_GETFL)
    server.fcntl(listener, fcntl.F_SETFL, os.O_NONBLOCK)
    server.fcntl(listener, fcntl.F_GETFL)
    if arrange == "before":
        server.listen(listener, 5)
    assert server.accept(listener) == "EAGAIN"
    server.fcntl(listener, fcntl.F_GETFL)
    server.ioctl(listener, 0x5421, 0)
    server.fcntl(listener, fcntl.F_GETFL)
    pending = server.start_accept(listener)
    assert pending.blocks()
    fd = world.client.socket()
    world.client.connect(fd, _address(world, listener))
    accepted, _ = pending.result()
    world.proves(fd, accepted)
    server.ioctl(listener, 0x5421, 1)
    assert server.accept(listener) == "EAGAIN"
    server.fcntl(listener, fcntl.F_GETFL)
    copy = server.dup(listener)
    server.fcntl(copy, fcntl.F_GETFL)
    server.fcntl(copy, fcntl.F_SETFL, 0)
    server.fcntl(listener, fcntl.F_GETFL)


def _address(world: World, listener: int) -> tuple[str, int]:
    """The listener's address from outside, while its process sleeps in accept."""
    inode = os.readlink(f"/proc/{world.server.pid}/fd/{listener}")[8:-1]
    with open("/proc/net/tcp") as file:
        for line in file:
            words = line.split()
            if len(words) > 9 and words[9] == inode:
                return LOOPBACK, int(words[1].partition(":")[2], 16)
    raise AssertionError("no such listener")


def test_connection_flags(world: World) -> None:
    """T3: O_NONBLOCK and FIONBIO on connections, seen through duplicates."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        actor.fcntl(number, fcntl.F_GETFL)
        actor.ioctl(number, 0x5421, 1)
        copy = actor.dup(number)
        actor.fcntl(copy, fcntl.F_GETFL)
        actor.recv(copy, 5)
        actor.fcntl(number, fcntl.F_SETFL, 0)
        actor.fcntl(copy, fcntl.F_GETFL)
        assert actor.raw("fcntl", copy, fcntl.F_SETOWN, actor.pid).result == 0
        assert actor.raw("fcntl", number, fcntl.F_GETOWN, 0).result == actor.pid


def test_signal_driven(world: World) -> None:
    """T3: O_ASYNC and F_SETOWN set before connect go on: SIGIO when bytes come."""
    client = world.client
    listener, address = world.listener()
    client.handle(29)
    fd = client.socket()
    client.raw("fcntl", fd, fcntl.F_SETOWN, client.pid)
    client.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC)
    client.raw("connect", fd, Buffer(pack_address(address)), 16)  # on TCP its own signal may interrupt it
    client.raw("usleep", 10000)
    accepted, _ = world.server.accept(listener)
    world.proves(fd, accepted)
    client.fcntl(fd, fcntl.F_GETFL)
    client.raw("usleep", 10000)
    client.raw("puppet_signals")
    world.server.send(accepted, b"x")
    client.raw("usleep", 20000)
    assert client.raw("puppet_signals").result >= 1


def test_passing(world: World) -> None:
    """T5, S27: an accepted connection passed over AF_UNIX to a sibling process goes on there, with its names."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    ends = struct.unpack(
        "=ii", server.raw("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM, 0, Buffer(bytes(8))).memory[0]
    )
    other = server.spawn("other")
    rights = struct.pack("=QiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, accepted) + bytes(4)
    assert server.sendmsg(ends[0], [b"take"], 0, None, rights) == 4
    answer = other.raw("recvmsg", ends[1], *_room())
    assert answer.result == 4
    received = struct.unpack_from("=i", answer.memory[1], 16)[0]
    server.close(accepted)
    other.close(accepted)  # which it has inherited as well
    assert other.getpeername(received) == client.getsockname(fd)
    other.getsockname(received)
    other.getsockopt(received, socket.SOL_SOCKET, 39)
    other.getsockopt(received, socket.SOL_SOCKET, 38)
    other.setsockopt(received, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.send(fd, b"to the other")
    assert other.recv(received, 50) == b"to the other"
    other.send(received, b"from the other")
    assert client.recv(fd, 50) == b"from the other"
    other.close(received)
    assert client.recv(fd, 50) == b""


def _room() -> list[Argument]:
    header = struct.pack("=QIxxxxQQQQIxxxx", 0, 0, 0, 1, 0, 64, 0)
    return [
        Buffer(bytes(8), passed=False),
        Buffer(bytes(64), passed=False),
        Buffer(struct.pack("=QQ", 0, 8), ((0, 1),), passed=False),
        Buffer(header, ((16, 3), (32, 2))),
        0,
    ]
