from __future__ import annotations

import os
import select
import socket
import struct
import time

import pytest
from puppet import Actor, Buffer, pack_address
from world import LOOPBACK, World, companion_name

IN = select.POLLIN
ALL = select.POLLIN | select.POLLOUT | 0x2000
F_GETFL, F_SETFL, FIONBIO = 3, 4, 0x5421


def works(client: Actor, fd: int, server: Actor, accepted: int) -> None:
    assert client.send(fd, b"ping") == 4
    assert server.recv(accepted, 10) == b"ping"
    assert server.send(accepted, b"pong") == 4
    assert client.recv(fd, 10) == b"pong"


@pytest.mark.parametrize("moment", ["before listen", "after listen", "after a wait"])
def test_prefork(world: World, moment: str) -> None:
    """T4, S21: workers that share a listener: whoever accepts serves, and the parent can go."""
    client, server = world.client, world.server
    listener = server.socket()
    server.bind(listener, (LOOPBACK, 0))
    if moment != "before listen":
        server.listen(listener, 16)
    address = server.getsockname(listener)
    if moment == "after a wait":
        server.poll([(listener, IN)], 10)
    workers = [server.fork(f"worker{n}") for n in range(3)]
    if moment == "before listen":
        server.listen(listener, 16)
    for worker in workers:
        fd = client.socket()
        assert client.connect(fd, address) == 0
        accepted, peer = worker.accept(listener)
        assert peer == client.getsockname(fd)
        if moment != "before listen":
            world.proves(fd, accepted, server=worker)
        works(client, fd, worker, accepted)
    server.close(listener)
    if moment == "before listen":
        world.tcp_only()
    for worker in reversed(workers):
        pending = worker.start_accept(listener)
        fd = client.socket()
        client.connect(fd, address)
        accepted, _ = pending.result()
        works(client, fd, worker, accepted)


@pytest.mark.parametrize("way", ["accept", "poll", "epoll", "epoll-exclusive"])
def test_prefork_waits(world: World, way: str) -> None:
    """T2, T4: workers wait by each way on one listener; every client wakes somebody and is served."""
    client, server = world.client, world.server
    listener, address = world.listener(kind=0 if way == "accept" else socket.SOCK_NONBLOCK)
    workers = [server.fork(f"worker{n}") for n in range(3)]
    epolls = {}
    if way.startswith("epoll"):
        for worker in workers:
            epolls[worker] = worker.epoll_create()
            worker.epoll_ctl(epolls[worker], 1, listener, select.EPOLLIN | (1 << 28 if way == "epoll-exclusive" else 0))
    served = 0
    for worker in workers:
        if way == "accept":
            pending = worker.start_accept(listener)
        elif way == "poll":
            pending = worker.start_poll([(listener, IN)], 5000)
        else:
            pending = worker.start_epoll_wait(epolls[worker], 5000)
        assert pending.blocks(0.02)
        fd = client.socket()
        client.connect(fd, address)
        got = pending.result()
        accepted = got[0] if way == "accept" else worker.accept(listener)[0]
        world.proves(fd, accepted, server=worker)
        works(client, fd, worker, accepted)
        served += 1
    assert served == 3


@pytest.mark.parametrize("way", ["fcntl", "ioctl"])
def test_listener_flags_shared(world: World, way: str) -> None:
    """T3, T4: O_NONBLOCK of a listener is everybody's who shares it, whoever sets it."""
    client, server = world.client, world.server
    listener, address = world.listener()
    child = server.fork("child")
    grandchild = child.fork("grandchild")

    def switch(actor: Actor, on: bool) -> None:
        if way == "fcntl":
            actor.fcntl(listener, F_SETFL, os.O_NONBLOCK if on else 0)
        else:
            actor.ioctl(listener, FIONBIO, int(on))

    sharers = (server, child, grandchild)
    for setter in sharers:
        switch(setter, True)
        for actor in sharers:
            assert actor.fcntl(listener, F_GETFL) == os.O_RDWR | os.O_NONBLOCK
            assert actor.accept(listener) == "EAGAIN"
        switch(setter, False)
        assert [actor.fcntl(listener, F_GETFL) for actor in sharers] == [os.O_RDWR] * 3
    pending = child.start_accept(listener)
    assert pending.blocks()
    switch(server, True)   # who waits goes on waiting
    assert pending.blocks()
    fd = client.socket()
    client.connect(fd, address)
    accepted, _ = pending.result()
    world.proves(fd, accepted, server=child)


@pytest.mark.parametrize("child_first", [False, True])
def test_listener_flags_shared_after_exec(world: World, child_first: bool) -> None:
    """T3, T4: O_NONBLOCK of a listener is everybody's who shares it, after one has become another program too."""
    client, server = world.client, world.server
    listener, address = world.listener(kind=socket.SOCK_NONBLOCK)
    child = server.fork("child")
    heir = server.exec("heir")
    setter, other = (child, heir) if child_first else (heir, child)
    assert setter.fcntl(listener, F_SETFL, 0) == 0
    assert [actor.fcntl(listener, F_GETFL) for actor in (setter, other)] == [os.O_RDWR] * 2
    assert other.ioctl(listener, FIONBIO, 1)[0] == 0
    assert [actor.fcntl(listener, F_GETFL) for actor in (setter, other)] == [os.O_RDWR | os.O_NONBLOCK] * 2
    assert [actor.accept(listener) for actor in (setter, other)] == ["EAGAIN"] * 2
    fd = client.socket()
    client.connect(fd, address)
    world.proves(fd, heir.accept(listener)[0], server=heir)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_listener_shut_elsewhere(world: World, how: int, waits: bool) -> None:
    """T2, T4, T9: poll() of who shares a listener shows that another has shut it, and who waits in it is woken."""
    world.tcp_only()
    server = world.server
    listener, _ = world.listener()
    child = server.fork("child")
    server.poll([(listener, ALL)], 0)
    pending = server.start_poll([(listener, IN)], 5000) if waits else None
    assert not pending or pending.blocks()
    child.shutdown(listener, how)
    if pending:
        pending.result()
    for events in (ALL, IN, 0):
        server.poll([(listener, events)], 0)
    server.select(listener + 1, [listener], [listener], [listener], 0)
    child.fcntl(listener, F_SETFL, os.O_NONBLOCK)
    server.fcntl(listener, F_GETFL)
    server.accept(listener)
    server.shutdown(listener, how)
    server.fcntl(listener, F_GETFL)
    server.listen(listener, 5)
    server.poll([(listener, ALL)], 0)
    child.poll([(listener, ALL)], 0)


def test_inherited_epoll(world: World) -> None:
    """T2, T4: a child uses the epoll that its parent filled with a listener."""
    client, server = world.client, world.server
    epfd = server.epoll_create()
    listener, address = world.listener()
    server.epoll_ctl(epfd, 1, listener, select.EPOLLIN)
    child = server.fork("child")
    fd = client.socket()
    client.connect(fd, address)
    assert child.epoll_wait(epfd, 2000) == [(listener, "IN")]
    accepted, _ = child.accept(listener)
    world.proves(fd, accepted, server=child)
    works(client, fd, child, accepted)
    child.epoll_wait(epfd, 0)
    server.epoll_wait(epfd, 0)
    fd = client.socket()
    client.connect(fd, address)
    assert server.epoll_wait(epfd, 2000) == [(listener, "IN")]


def test_fork_per_connection(world: World) -> None:
    """T4, S28: the parent closes its copy and the child serves; the client sees end of file when the child closes."""
    client, server = world.client, world.server
    listener, address = world.listener()
    for n in range(3):
        fd, accepted = world.join(listener, address)
        child = server.fork(f"child{n}")
        server.close(accepted)
        child.close(listener)
        works(client, fd, child, accepted)
        assert child.getpeername(accepted) == client.getsockname(fd)
        client.poll([(fd, IN)], 0)
        child.exit()
        assert client.recv(fd, 5) == b""


def test_shared_connection(world: World) -> None:
    """T4, S27: parent and child use one connection; it ends when the last one closes."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    child = client.fork("child")
    works(client, fd, server, accepted)
    works(child, fd, server, accepted)
    assert child.getsockname(fd) == client.getsockname(fd)
    client.close(fd)
    server.poll([(accepted, IN)], 0)
    works(child, fd, server, accepted)
    child.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    child.close(fd)
    assert server.recv(accepted, 5) == b""


def test_shutdown_in_child(world: World) -> None:
    """T4, T9: shutdown acts on all who share the connection."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    child = client.fork("child")
    child.shutdown(fd, socket.SHUT_WR)
    assert server.recv(accepted, 5) == b""
    assert client.send(fd, b"x", socket.MSG_NOSIGNAL) == "EPIPE"
    server.send(accepted, b"back")
    assert client.recv(fd, 10) == b"back"


def test_over_by_shutdown_elsewhere(world: World) -> None:
    """T4, T9: the peer has closed, and another process ends the other direction: nobody is connected any more."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    child = client.fork("child")
    server.close(accepted)
    assert client.recv(fd, 5) == b""
    assert child.getpeername(fd) == client.getpeername(fd)
    client.shutdown(fd, socket.SHUT_WR)
    assert child.getpeername(fd) == "ENOTCONN"
    assert child.shutdown(fd, socket.SHUT_RDWR) == "ENOTCONN"


def test_child_connects(world: World) -> None:
    """T4: a socket made before a fork and connected after it works, in parent and child."""
    world.tcp_only()
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    child = client.fork("child")
    assert child.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    works(client, fd, server, accepted)
    works(child, fd, server, accepted)
    assert client.getpeername(fd) == address


def test_child_makes_its_own(world: World) -> None:
    """T4, S27: sockets made in a child, and in its child, go on the SAN."""
    client, server = world.client, world.server
    listener, address = world.listener()
    child = client.fork("child")
    grandchild = child.fork("grandchild")
    for actor in (grandchild, child, client):
        fd = actor.socket()
        assert actor.connect(fd, address) == 0
        accepted, _ = server.accept(listener)
        world.proves(fd, accepted, client=actor)
        works(actor, fd, server, accepted)


def test_child_listens(world: World) -> None:
    """T4: a listener made in a child; the parent's later one is another."""
    client, server = world.client, world.server
    child = server.fork("child")
    listener, address = world.listener(child)
    fd = client.socket()
    client.connect(fd, address)
    accepted, _ = child.accept(listener)
    world.proves(fd, accepted, server=child)
    works(client, fd, child, accepted)


def test_fork_in_a_threaded_program(world: World) -> None:
    """T4: fork while other threads sleep in accept and recv."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, accepted = world.join(listener, address)
    one, two = server.thread("one"), server.thread("two")
    waiting, reading = one.start_accept(listener), two.start_recv(accepted, 5)
    assert waiting.blocks()
    child = server.fork("child")
    client.send(fd, b"read")
    assert reading.result() == b"read"
    other = client.socket()
    client.connect(other, address)
    got, _ = waiting.result()
    works(client, other, server, got)
    third = client.socket()
    client.connect(third, address)
    mine, _ = child.accept(listener)
    works(client, third, child, mine)
    world.proves(third, mine, server=child)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("way", ["exec", "spawn", "vfork_exec"])
def test_connection_inherited_by_program(world: World, way: str, plain: bool) -> None:
    """T4, S27, D7: a connection goes on in a program that inherits it; bytes flow, and an interposed one sees TCP."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"before")
    heir = getattr(client, way)("heir", plain)
    assert server.recv(accepted, 10) == b"before"
    works(heir, fd, server, accepted)
    if not plain:
        assert heir.getsockname(fd) == server.getpeername(accepted)
        assert heir.getpeername(fd) == server.getsockname(accepted)
        for name in (39, 38, 3, 4, socket.SO_KEEPALIVE):
            heir.getsockopt(fd, socket.SOL_SOCKET, name)
        heir.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heir.getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        heir.connect(fd, (LOOPBACK, 9))
        heir.sendto(fd, b"x", 0, (LOOPBACK, 9))
        assert server.recv(accepted, 5) == b"x"
        heir.poll([(fd, 0x2005)])
    if way != "exec":
        client.close(fd)
        works(heir, fd, server, accepted)
    heir.close(fd)
    assert server.recv(accepted, 5) == b""


@pytest.mark.parametrize("way", ["exec", "spawn", "vfork_exec"])
def test_accepted_connection_inherited(world: World, way: str) -> None:
    """T4, S27: the same with the accepted end, as inetd does it."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    heir = getattr(server, way)("heir")
    if way != "exec":
        server.close(accepted)
    works(client, fd, heir, accepted)
    assert heir.getpeername(accepted) == client.getsockname(fd)
    assert heir.getsockname(accepted) == client.getpeername(fd)
    heir.getsockopt(accepted, socket.SOL_SOCKET, 39)
    heir.close(accepted)
    assert client.recv(fd, 5) == b""


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("way", ["exec", "spawn"])
def test_listener_inherited_by_program(world: World, way: str, plain: bool) -> None:
    """T4, T5, S23: a listener that a program inherits serves its clients there; none waits at a companion that nobody
    accepts from."""
    world.tcp_only()
    client, server = world.client, world.server
    listener, address = world.listener(kind=0)
    heir = getattr(server, way)("heir", plain)
    if way != "exec":
        server.close(listener)
    time.sleep(0.02)
    assert heir.fcntl(listener, 3) == 2
    for _ in range(2):
        fd = client.socket()
        client.setsockopt(fd, socket.SOL_SOCKET, 20, struct.pack("=qq", 3, 0))
        assert client.connect(fd, address) == 0
        accepted, _ = heir.accept(listener)
        works(client, fd, heir, accepted)
    if not plain:
        heir.poll([(listener, IN)])
        heir.getsockname(listener)


@pytest.mark.parametrize("plain", [False, True])
def test_listener_shared_with_program(world: World, plain: bool) -> None:
    """T4, S23: a listener inherited by a spawned program while the parent keeps it and never accepts."""
    world.tcp_only()
    client, server = world.client, world.server
    listener, address = world.listener()
    heir = server.spawn("heir", plain)
    fd = client.socket()
    client.setsockopt(fd, socket.SOL_SOCKET, 20, struct.pack("=qq", 3, 0))
    assert client.connect(fd, address) == 0
    client.send(fd, b"ping")
    pending = heir.start_accept(listener)
    accepted, _ = pending.result(5)
    assert heir.recv(accepted, 10) == b"ping"


def test_close_on_exec(world: World) -> None:
    """T4: close-on-exec sockets are gone in the heir, and their peers see it."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.fcntl(fd, 2, 1)
    heir = client.exec("heir")
    assert heir.getsockname(fd) == "EBADF"
    assert server.recv(accepted, 5) == b""
    assert heir.socket() == fd


def test_redirected_spawn(world: World) -> None:
    """T4: a shell's redirection: the connection becomes the heir's descriptor 1 by a file action."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    heir = client.spawn("heir", False, (fd, 1))
    client.close(fd)
    works(heir, 1, server, accepted)
    heir.getpeername(1)


def test_hidden_descriptors_do_not_leak(world: World) -> None:
    """T4, T11: a spawned program has no descriptor but those that were meant for it."""
    client = world.client
    world.pair()
    heir = client.spawn("heir", True)
    time.sleep(0.02)
    seen = sorted(int(name) for name in os.listdir(f"/proc/{heir.pid}/fd"))
    heir.note("descriptors", "", seen)


def test_no_descriptor_leaks(world: World) -> None:
    """X6: a hundred connections made and closed leave neither side with more descriptors than before."""
    client, server = world.client, world.server
    listener, address = world.listener()
    counts = []
    for _ in range(3):
        for _ in range(50):
            fd = client.raw("socket", socket.AF_INET, socket.SOCK_STREAM, 0).result
            assert client.raw("connect", fd, Buffer(pack_address(address)), 16).result == 0
            accepted = server.raw("accept", listener, None, None).result
            client.raw("close", fd)
            server.raw("close", accepted)
        counts.append([len(os.listdir(f"/proc/{actor.pid}/fd")) for actor in (client, server)])
    assert counts[0] == counts[1] == counts[2]
    fd, accepted = world.join(listener, address)


def test_reuseport_group(world: World) -> None:
    """T8: three listeners of two processes on one port all get clients; a dead one's share goes to the others."""
    client, server = world.client, world.server
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port = world.port()
    second = world.stage.start("second", "server")
    listeners = [
        (server, world.listener(server, port=port, options=[reuse])[0]),
        (server, world.listener(server, port=port, options=[reuse])[0]),
        (second, world.listener(second, port=port, options=[reuse])[0]),
    ]
    threads = [actor.thread(f"thread{n}") for n, (actor, _) in enumerate(listeners)]
    for n, (thread, (_, listener)) in enumerate(zip(threads, listeners, strict=True)):
        thread.ask("puppet_serve_bytes", listener, ord("a") + n, 1 << 30)
    address = Buffer(pack_address((LOOPBACK, port)))
    answer = client.raw("puppet_ask_bytes", address, 16, 300, Buffer(bytes(1024)))
    assert answer.result == 300
    tally = struct.unpack("=256I", answer.memory[1])
    shares = [tally[ord("a") + n] for n in range(3)]
    assert min(shares) > 20, shares
    second.kill()
    time.sleep(0.05)
    answer = client.raw("puppet_ask_bytes", address, 16, 100, Buffer(bytes(1024)))
    assert answer.result == 100
    tally = struct.unpack("=256I", answer.memory[1])
    assert tally[ord("a")] and tally[ord("b")] and not tally[ord("c")]
    fd = client.socket()
    assert client.connect(fd, (LOOPBACK, port)) == 0
    world.proves(client_fd=fd)


def test_kill_during_connections(world: World) -> None:
    """X5, S28: after the server was killed its clients see the end, and the port is refused."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, _ = world.join(listener, address)
    server.kill()
    assert client.recv(fd, 5) == b""
    time.sleep(0.02)
    again = client.socket()
    assert client.connect(again, address) == "ECONNREFUSED"
    assert not companion_name(client, again)
