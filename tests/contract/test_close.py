from __future__ import annotations

import select
import signal
import socket
import struct

import pytest
from puppet import Buffer
from world import World

LINGER0 = struct.pack("=ii", 1, 0)
DONTWAIT, NOSIGNAL = socket.MSG_DONTWAIT, socket.MSG_NOSIGNAL
ALL = select.POLLIN | select.POLLOUT | select.POLLPRI | 0x2000


def test_half_close_by_client(world: World) -> None:
    """T9, S28: after SHUT_WR the other direction goes on; events on both sides at each step."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"request")
    assert client.shutdown(fd, socket.SHUT_WR) == 0
    client.send(fd, b"x", NOSIGNAL)
    client.poll([(fd, ALL)], 100)
    assert server.poll([(accepted, select.POLLIN | 0x2000)], 2000)[0] == 1
    client.raw("usleep", 20000)
    server.poll([(accepted, ALL)], 100)
    assert server.recv(accepted, 50) == b"request"
    assert server.recv(accepted, 50) == b""
    assert server.recv(accepted, 50) == b""
    assert server.send(accepted, b"response") == 8
    assert client.recv(fd, 50) == b"response"
    client.poll([(fd, ALL)], 0)
    server.shutdown(accepted, socket.SHUT_WR)
    assert client.recv(fd, 50) == b""
    client.poll([(fd, ALL)], 100)
    server.poll([(accepted, ALL)], 100)
    client.shutdown(fd, socket.SHUT_RD)
    client.close(fd)
    server.poll([(accepted, ALL)], 100)
    server.recv(accepted, 5)
    server.send(accepted, b"x", NOSIGNAL)
    server.close(accepted)


def test_shutdown_read(world: World) -> None:
    """T9: after SHUT_RD recv gives end of file, what the peer sends can still be read, and the peer may send."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert server.shutdown(accepted, socket.SHUT_RD) == 0
    assert server.recv(accepted, 5) == b""
    server.poll([(accepted, ALL)], 0)
    assert client.send(fd, b"late") == 4
    client.raw("usleep", 20000)
    assert server.recv(accepted, 5) == b"late"
    assert server.recv(accepted, 5) == b""
    assert server.read(accepted, 5) == b""
    assert server.readv(accepted, [2, 3]) == b""
    assert server.recvmsg(accepted, [5])[0] == b""
    assert server.send(accepted, b"still") == 5
    assert client.recv(fd, 10) == b"still"
    assert client.send(fd, b"more") == 4
    client.poll([(fd, ALL)], 0)


@pytest.mark.parametrize("waits", ["recv", "read", "poll", "select", "epoll", "no one", "epoll later"])
def test_shutdown_read_is_seen(world: World, waits: str) -> None:
    """T9, T2: SHUT_RD in one thread wakes another's recv or poll, and shows in an epoll; the peer may go on
    sending, and is not told."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    worker = server.thread("worker")
    epfd = server.epoll_create()
    if waits in ("epoll", "no one"):
        server.epoll_ctl(epfd, 1, accepted, select.EPOLLIN | select.EPOLLRDHUP)
    pending = {
        "recv": lambda: worker.start_recv(accepted, 5),
        "read": lambda: worker.start_recv(accepted, 5, call="read"),
        "poll": lambda: worker.start_poll([(accepted, select.POLLIN | select.POLLRDHUP)], 5000),
        "select": lambda: worker.start_select(accepted + 1, [accepted], timeout=5.0),
        "epoll": lambda: worker.start_epoll_wait(epfd, 5000),
        "no one": lambda: None,
        "epoll later": lambda: None,
    }[waits]()
    assert not pending or pending.blocks()
    assert server.shutdown(accepted, socket.SHUT_RD) == 0
    if pending:
        pending.result(2)
    if waits == "epoll later":
        assert server.epoll_ctl(epfd, 1, accepted, select.EPOLLIN | select.EPOLLRDHUP) == 0
    server.epoll_wait(epfd, 0)
    assert server.recv(accepted, 5) == b""
    assert server.send(accepted, b"still") == 5
    assert client.recv(fd, 10) == b"still"
    for _ in range(3):
        assert client.send(fd, b"more") == 4
        assert client.write(fd, b"more") == 4
        assert client.sendmsg(fd, [b"mo", b"re"]) == 4
    client.poll([(fd, ALL)], 0)
    server.shutdown(accepted, socket.SHUT_WR)
    assert client.recv(fd, 10) == b""


def test_shutdown_both_wakes(world: World) -> None:
    """T9: SHUT_RDWR in one thread wakes another's recv."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    worker = server.thread("worker")
    pending = worker.start_recv(accepted, 5)
    assert pending.blocks()
    server.shutdown(accepted, socket.SHUT_RDWR)
    assert pending.result(2) == b""
    assert client.recv(fd, 5) == b""
    server.poll([(accepted, ALL)], 100)
    server.send(accepted, b"x", NOSIGNAL)


def test_shutdown_order(world: World) -> None:
    """T9: SHUT_RD then SHUT_WR, SHUT_WR then SHUT_RD, twice the same, a bad word."""
    for first, second in ((0, 1), (1, 0), (2, 2), (1, 1), (0, 0)):
        client, server = world.client, world.server
        fd, accepted = world.pair()
        client.shutdown(fd, first)
        client.shutdown(fd, second)
        client.poll([(fd, ALL)], 100)
        client.recv(fd, 5, DONTWAIT)
        client.send(fd, b"x", NOSIGNAL)
        client.raw("usleep", 20000)
        server.recv(accepted, 5, DONTWAIT)
        client.close(fd)
        server.close(accepted)
    fd, accepted = world.pair()
    client.shutdown(fd, 7)
    fresh = client.socket()
    client.shutdown(fresh, 2)
    client.shutdown(999, 2)


def test_graceful(world: World) -> None:
    """S28: bytes written before close arrive, then end of file."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"a" * 60000)
    client.close(fd)
    out = server.raw("puppet_receive_stream", accepted, 1 << 20, Buffer(bytes(8)), 4096)
    assert out.result == 60000
    server.poll([(accepted, ALL)], 100)
    server.recv(accepted, 5)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_process_ends(world: World, how: str) -> None:
    """S28: bytes written before the process ended arrive, then end of file."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"last")
    if how == "exit":
        client.exit()
    else:
        client.kill()
    server.raw("usleep", 20000)
    assert server.recv(accepted, 50) == b"last"
    assert server.recv(accepted, 50) == b""


def test_close_with_unread_data(world: World) -> None:
    """T9, S28: the peer of who closed with unread data gets ECONNRESET once, then end of file and EPIPE."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"never read")
    assert server.poll([(accepted, select.POLLIN)], 2000)[0] == 1
    server.close(accepted)
    client.raw("usleep", 20000)
    client.poll([(fd, ALL)], 2000)
    assert client.recv(fd, 50) == "ECONNRESET"
    assert client.recv(fd, 50) == b""
    client.poll([(fd, ALL)], 100)
    assert client.send(fd, b"x", NOSIGNAL) == "EPIPE"
    assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_reset_seen_by_send(world: World) -> None:
    """T9, S19: the reset is told once to a writer: ECONNRESET without a signal, then EPIPE."""
    client, server = world.client, world.server
    client.handle(signal.SIGPIPE)
    fd, accepted = world.pair()
    client.send(fd, b"never read")
    assert server.poll([(accepted, select.POLLIN)], 2000)[0] == 1
    server.close(accepted)
    client.raw("usleep", 20000)
    assert client.send(fd, b"x") == "ECONNRESET"
    assert client.signals() == 0
    assert client.send(fd, b"x") == "EPIPE"
    assert client.signals() == 1
    client.recv(fd, 5)


@pytest.mark.parametrize("call", ["write", "send", "sendmsg", "writev"])
def test_broken_pipe(world: World, call: str) -> None:
    """T7: after the peer has gone the first write is taken, and the next ends in EPIPE and SIGPIPE."""
    client, server = world.client, world.server
    client.handle(signal.SIGPIPE)
    fd, accepted = world.pair()
    server.close(accepted)
    client.raw("usleep", 20000)
    argument = [b"x"] if call in ("sendmsg", "writev") else b"x"
    assert getattr(client, call)(fd, argument) == 1
    assert client.signals() == 0
    client.raw("usleep", 20000)
    assert getattr(client, call)(fd, argument) == "EPIPE"
    assert client.signals() == 1
    assert client.recv(fd, 5) == b""
    assert client.getpeername(fd) == "ENOTCONN"


def test_no_signal(world: World) -> None:
    """T7: MSG_NOSIGNAL keeps SIGPIPE away."""
    client, server = world.client, world.server
    client.handle(signal.SIGPIPE)
    fd, accepted = world.pair()
    server.close(accepted)
    client.raw("usleep", 20000)
    client.send(fd, b"x", NOSIGNAL)
    client.raw("usleep", 20000)
    client.recv(fd, 5)
    assert client.send(fd, b"x", NOSIGNAL) == "EPIPE"
    assert client.sendmsg(fd, [b"x"], NOSIGNAL) == "EPIPE"
    assert client.signals() == 0


def test_signal_kills(world: World) -> None:
    """T7: SIGPIPE's default is death."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    server.close(accepted)
    client.raw("usleep", 20000)
    client.raw("send", fd, Buffer(b"x"), 1, NOSIGNAL)
    client.raw("usleep", 20000)
    client.raw("recv", fd, Buffer(b"x"), 1, 0)
    client.ask("send", fd, Buffer(b"x"), 1, 0)
    assert client.ended() == -signal.SIGPIPE


def test_linger_zero(world: World) -> None:
    """T9, D3: an abortive close."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, LINGER0)
    client.close(fd)
    client.raw("usleep", 20000)
    server.recv(accepted, 5)
    assert server.recv(accepted, 5) == b""


def test_linger_zero_with_unread_data(world: World) -> None:
    """T9: an abortive close with unread data is ECONNRESET."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    server.send(accepted, b"unread")
    assert client.poll([(fd, select.POLLIN)], 2000)[0] == 1
    client.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, LINGER0)
    client.close(fd)
    client.raw("usleep", 20000)
    assert server.recv(accepted, 5) == "ECONNRESET"


def test_linger(world: World) -> None:
    """T9: SO_LINGER with time closes gracefully."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 2))
    client.send(fd, b"lingering")
    client.close(fd)
    assert server.recv(accepted, 50) == b"lingering"
    assert server.recv(accepted, 50) == b""


def test_close_while_another_waits(world: World) -> None:
    """T9: close in one thread does not end another's recv, which gets the bytes that come."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    worker = server.thread("worker")
    pending = worker.start_recv(accepted, 5)
    assert pending.blocks()
    assert server.close(accepted) == 0
    assert pending.blocks()
    client.send(fd, b"bytes")
    assert pending.result() == b"bytes"


def test_close_twice(world: World) -> None:
    """T10: the second close is EBADF."""
    client = world.client
    fd, _ = world.pair()
    client.close(fd)
    assert client.close(fd) == "EBADF"
    assert client.getsockname(fd) == "EBADF"
    assert client.send(fd, b"x") == "EBADF"
    assert client.getsockopt(fd, socket.SOL_SOCKET, 3) == "EBADF"


def test_events_after_peer_closed(world: World) -> None:
    """T2, D1: poll, select and epoll after the peer's close, with bytes to read and without."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    epfd = client.epoll_create()
    client.epoll_ctl(epfd, 1, fd, ALL)
    server.send(accepted, b"bytes")
    server.close(accepted)
    client.raw("usleep", 20000)
    client.poll([(fd, ALL)], 1000)
    client.poll([(fd, ALL)], 1000, "ppoll")
    client.poll([(fd, 0)], 0)
    client.poll([(fd, select.POLLIN)], 0)
    client.poll([(fd, select.POLLOUT)], 0)
    client.select(fd + 1, [fd], [fd], [fd])
    client.epoll_wait(epfd, 100)
    client.recv(fd, 50)
    client.poll([(fd, ALL)], 1000)
    client.select(fd + 1, [fd], [fd], [fd])
    client.epoll_wait(epfd, 100)
    client.recv(fd, 50)
    client.shutdown(fd, socket.SHUT_WR)
    client.poll([(fd, ALL)], 1000)
    client.poll([(fd, 0)], 0)


def test_listener_closed_with_waiting_clients(world: World) -> None:
    """S23, T9: clients in the backlog of a listener that closes are reset."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    assert client.connect(fd, address) == 0
    world.proves(client_fd=fd)
    client.send(fd, b"hello")
    server.close(listener)
    client.raw("usleep", 20000)
    assert client.recv(fd, 10) == "ECONNRESET"
    assert client.recv(fd, 10) == b""
    again = client.socket()
    assert client.connect(again, address) == "ECONNREFUSED"


def test_listener_closed_with_silent_clients(world: World) -> None:
    """S23: the same when the client had sent nothing."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    client.connect(fd, address)
    world.proves(client_fd=fd)
    server.close(listener)
    client.raw("usleep", 20000)
    assert client.recv(fd, 10) == "ECONNRESET"


def test_over_by_shutdown(world: World) -> None:
    """T9: both directions that end after the peer's SHUT_WR end the connection."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    server.shutdown(accepted, socket.SHUT_WR)
    assert client.poll([(fd, select.POLLRDHUP)], 2000)[0] == 1
    assert client.shutdown(fd, socket.SHUT_RDWR) == 0
    client.raw("usleep", 20000)
    assert client.getpeername(fd) == "ENOTCONN"
    assert client.shutdown(fd, socket.SHUT_RD) == "ENOTCONN"
    assert client.send(fd, b"x", NOSIGNAL) == "EPIPE"
    assert client.recv(fd, 5) == b""
    server.getpeername(accepted)
    server.recv(accepted, 5)


def test_nothing_written_after_the_end(world: World) -> None:
    """T7, T9: writev() of nothing succeeds after SHUT_WR, without a signal; send() of nothing does not."""
    client = world.client
    client.handle(signal.SIGPIPE)
    fd, _ = world.pair()
    client.shutdown(fd, socket.SHUT_WR)
    assert client.writev(fd, [b"", b""]) == 0
    assert client.signals() == 0
    assert client.send(fd, b"") == "EPIPE"
    assert client.sendmsg(fd, [b"", b""]) == "EPIPE"
    client.signals()


@pytest.mark.parametrize("ends", ["close", "shutdown", "reset"])
def test_over_after_shutdown_read(world: World, ends: str) -> None:
    """T9: a connection whose peer has answered bytes with a reset has no peer any more, after a SHUT_RD too."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.shutdown(fd, socket.SHUT_RD)
    if ends == "reset":
        client.send(fd, b"unread")
        assert server.poll([(accepted, select.POLLIN)], 2000)[0] == 1
    if ends == "shutdown":
        server.shutdown(accepted, socket.SHUT_RDWR)
    else:
        server.close(accepted)
    client.raw("usleep", 20000)
    client.send(fd, b"x", NOSIGNAL)
    client.raw("usleep", 20000)
    assert client.getpeername(fd) == "ENOTCONN"
    assert client.shutdown(fd, socket.SHUT_WR) == "ENOTCONN"
    assert client.send(fd, b"x", NOSIGNAL) == "EPIPE"
    assert client.recv(fd, 5) == b""


@pytest.mark.parametrize("says", ["nothing", "something"])
def test_listener_shut_down_with_waiting_clients(world: World, says: str) -> None:
    """S23, T9: clients in the backlog of a listener that is shut down are reset; it can listen again."""
    client, server = world.client, world.server
    listener, address = world.listener()
    waiting = [client.socket() for _ in range(3)]
    for fd in waiting:
        assert client.connect(fd, address) == 0
        world.proves(client_fd=fd)
        if says == "something":
            client.send(fd, b"hello")
    worker = client.thread("worker")
    pending = worker.start_recv(waiting[0], 10)
    assert pending.blocks()
    assert server.shutdown(listener, socket.SHUT_RD) == 0
    assert pending.result(2) == "ECONNRESET"
    for fd in waiting[1:]:
        client.raw("usleep", 20000)
        assert client.recv(fd, 10) == "ECONNRESET"
        assert client.recv(fd, 10) == b""
    assert server.accept(listener) == "EINVAL"
    again = client.socket()
    assert client.connect(again, address) == "ECONNREFUSED"
    assert server.listen(listener, 4) == 0
    address = server.getsockname(listener)[:2]
    fd, accepted = world.join(listener, address)
    client.send(fd, b"again")
    assert server.recv(accepted, 10) == b"again"
