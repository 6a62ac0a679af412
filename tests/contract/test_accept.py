from __future__ import annotations

import select
import signal
import socket
import struct

import pytest
from puppet import Buffer
from world import LOOPBACK, World

NONBLOCK = socket.SOCK_NONBLOCK
SA_RESTART = 0x10000000


def connect(world: World, address: tuple[str, int]) -> int:
    fd = world.client.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    assert world.client.connect(fd, address) == 0
    return fd


def test_blocks(world: World) -> None:
    """T1, S22: accept sleeps until a client comes."""
    listener, address = world.listener()
    pending = world.server.start_accept(listener)
    assert pending.blocks()
    fd = connect(world, address)
    accepted, peer = pending.result()
    assert peer == world.client.getsockname(fd)
    world.proves(fd, accepted)


def test_nonblocking_listener(world: World) -> None:
    """T1, T3: EAGAIN until a client comes; the accepted socket does not inherit O_NONBLOCK."""
    server = world.server
    listener, address = world.listener(kind=NONBLOCK)
    assert server.accept(listener) == "EAGAIN"
    fd = connect(world, address)
    assert server.poll([(listener, select.POLLIN)], 2000) == (1, ["IN"])
    accepted, _ = server.accept(listener)
    assert server.accept(listener) == "EAGAIN"
    assert server.fcntl(accepted, 3) == 2
    world.proves(fd, accepted)


@pytest.mark.parametrize(
    "flags", [0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC]
)
def test_accept4(world: World, flags: int) -> None:
    """S22, T3: accept4's flags, as fcntl shows them."""
    server = world.server
    listener, address = world.listener()
    fd = connect(world, address)
    accepted, _ = server.accept(listener, flags)
    server.fcntl(accepted, 3)
    server.fcntl(accepted, 1)
    world.proves(fd, accepted)


def test_bad_flags(world: World) -> None:
    """T12: EINVAL for unknown flags, EBADF, ENOTSOCK, EOPNOTSUPP, EINVAL for what does not listen."""
    world.tcp_only()
    server = world.server
    listener, _ = world.listener()
    assert server.accept(listener, 1) == "EINVAL"
    assert server.accept(999) == "EBADF"
    assert server.accept(999, 1) in ("EBADF", "EINVAL")
    fresh = server.socket()
    assert server.accept(fresh) == "EINVAL"
    udp = server.socket(kind=socket.SOCK_DGRAM)
    assert server.accept(udp) == "EOPNOTSUPP"
    assert server.accept(2) == "ENOTSOCK"


def test_accept_on_connection(world: World) -> None:
    """T12: accept on a connection is EINVAL."""
    fd, accepted = world.pair()
    assert world.client.accept(fd) == "EINVAL"
    assert world.server.accept(accepted) == "EINVAL"
    assert world.server.listen(accepted) == "EINVAL"
    assert world.client.bind(fd, (LOOPBACK, 0)) == "EINVAL"


def test_timed(world: World) -> None:
    """T1: SO_RCVTIMEO bounds accept, and is inherited by what it returns."""
    server = world.server
    listener, address = world.listener()
    limit = struct.pack("=qq", 0, 80000)
    server.setsockopt(listener, socket.SOL_SOCKET, 20, limit)
    assert server.accept(listener) == "EAGAIN"
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert server.recv(accepted, 10) == "EAGAIN"
    assert server.getsockopt(accepted, socket.SOL_SOCKET, 20, 16) == limit


@pytest.mark.parametrize("flags", [0, SA_RESTART])
def test_interrupted(world: World, flags: int) -> None:
    """T9: a signal ends accept with EINTR, unless its handler restarts calls."""
    server = world.server
    server.handle(signal.SIGUSR1, flags)
    listener, address = world.listener()
    pending = server.start_accept(listener)
    assert pending.blocks()
    server.kill(signal.SIGUSR1)
    if flags:
        assert pending.blocks()
        fd = connect(world, address)
        accepted, _ = pending.result()
    else:
        assert pending.result() == "EINTR"
        fd = connect(world, address)
        accepted, _ = server.accept(listener)
    assert server.signals() == 1
    world.proves(fd, accepted)


@pytest.mark.parametrize("flags", [0, SA_RESTART])
def test_interrupted_and_timed(world: World, flags: int) -> None:
    """T9: with SO_RCVTIMEO set a signal interrupts accept always."""
    world.tcp_only()
    server = world.server
    server.handle(signal.SIGUSR1, flags)
    listener, _ = world.listener()
    server.setsockopt(listener, socket.SOL_SOCKET, 20, struct.pack("=qq", 5, 0))
    pending = server.start_accept(listener)
    assert pending.blocks()
    server.kill(signal.SIGUSR1)
    assert pending.result() == "EINTR"


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_shutdown_wakes(world: World, how: int) -> None:
    """T9: shutdown of a listener wakes accept in another thread with EINVAL; listen makes it serve again."""
    server = world.server
    listener, address = world.listener(port=world.port())
    worker = server.thread("worker")
    pending = worker.start_accept(listener)
    assert pending.blocks()
    assert server.shutdown(listener, how) == 0
    assert pending.result() == "EINVAL"
    assert server.accept(listener) == "EINVAL"
    refused = world.client.socket()
    assert world.client.connect(refused, address) == "ECONNREFUSED"
    assert server.listen(listener, 16) == 0
    assert server.getsockname(listener) == address
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_shutdown_write_of_listener(world: World) -> None:
    """T9: SHUT_WR of a listener changes nothing."""
    server = world.server
    listener, address = world.listener()
    server.shutdown(listener, socket.SHUT_WR)
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_close_while_waiting(world: World) -> None:
    """T9: closing a listener in one thread does not wake another's accept, which takes one more client."""
    world.tcp_only()
    server = world.server
    listener, _ = world.listener()
    worker = server.thread("worker")
    pending = worker.start_accept(listener)
    assert pending.blocks()
    assert server.close(listener) == 0
    assert pending.blocks()


def test_listen_twice(world: World) -> None:
    """S21: a second listen changes the backlog and nothing else."""
    server = world.server
    listener, address = world.listener()
    assert server.listen(listener, 64) == 0
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_no_address_wanted(world: World) -> None:
    """T7: accept with NULL for the address."""
    listener, address = world.listener()
    fd = connect(world, address)
    accepted = world.server.accept_anonymously(listener)
    assert world.server.getpeername(accepted) == world.client.getsockname(fd)
    world.proves(fd, accepted)


@pytest.mark.parametrize("room", [0, 1, 2, 8, 15, 16, 28])
def test_cut_address(world: World, room: int) -> None:
    """T7: accept, getsockname, getpeername with little room tell the whole length."""
    listener, address = world.listener()
    fd = connect(world, address)
    accepted = world.server.start_accept(listener, None, room).result()[0]
    world.proves(fd, accepted)
    for actor, number in ((world.client, fd), (world.server, accepted)):
        actor.getsockname(number, room)
        actor.getpeername(number, room)


def test_bad_address_buffer(world: World) -> None:
    """T12: EFAULT and EINVAL of getsockname and getpeername on a connection."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        for call in ("getsockname", "getpeername"):
            assert actor.call(call, number, None, None) == "EFAULT"
            assert actor.call(call, number, Buffer(bytes(16)), None) == "EFAULT"
            assert actor.call(call, number, Buffer(bytes(16)), Buffer(struct.pack("=i", -1))) == "EINVAL"
            assert actor.call(call, number, None, Buffer(struct.pack("=i", 16))) == "EFAULT"


def test_bad_pointer(world: World) -> None:
    """T12: a buffer that is not in memory is EFAULT, not a crash."""
    fd, _ = world.pair()
    for call in ("getsockname", "getpeername"):
        assert world.client.call(call, fd, 8, Buffer(struct.pack("=i", 16))) == "EFAULT"
        assert world.client.call(call, fd, Buffer(bytes(16)), 8) == "EFAULT"


def test_client_gone_before_accept(world: World) -> None:
    """S23, T9: a client that wrote and closed before accept is still accepted, with its bytes."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = connect(world, address)
    world.proves(client_fd=fd)
    client.send(fd, b"last words")
    client.close(fd)
    accepted, _ = server.accept(listener)
    assert server.recv(accepted, 100) == b"last words"
    assert server.recv(accepted, 100) == b""


def test_options_inherited(world: World) -> None:
    """S22: options of the listener appear on what it accepts, whatever their level."""
    server = world.server
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, 18, 4321),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
        (socket.IPPROTO_IP, socket.IP_TTL, 33),
    ]
    listener, address = world.listener(options=options)
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    for level, name, value in options:
        assert server.getsockopt(accepted, level, name) == value
    assert server.getsockopt(accepted, socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0


def test_option_set_after_listen(world: World) -> None:
    """S13, S22: an option set on the listener after listen is inherited too."""
    server = world.server
    listener, address = world.listener()
    server.setsockopt(listener, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.setsockopt(listener, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    fd = connect(world, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert server.getsockopt(accepted, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert server.getsockopt(accepted, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert world.client.getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0


def test_threads_accept(world: World) -> None:
    """T2, T9: four threads in accept on one listener: each client wakes one."""
    server = world.server
    listener, address = world.listener()
    workers = [server.thread(f"worker{n}") for n in range(4)]
    for worker in workers:
        worker.ask("accept", listener, Buffer(bytes(16)), Buffer(struct.pack("=I", 16)))
    fds = [connect(world, address) for _ in range(4)]
    accepted = sorted(worker.answer("accept").result for worker in workers)
    for fd, other in zip(fds, accepted, strict=True):
        world.proves(fd, other)
