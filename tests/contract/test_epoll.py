from __future__ import annotations

import select
import socket

import pytest
from world import LOOPBACK, World

ADD, DEL, MOD = 1, 2, 3
IN, OUT, RDHUP = select.EPOLLIN, select.EPOLLOUT, 0x2000
ET, ONESHOT, EXCLUSIVE = 1 << 31, 1 << 30, 1 << 28
NONBLOCK = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
MODES = {"level": 0, "edge": ET, "oneshot": ONESHOT, "exclusive": EXCLUSIVE, "edge-oneshot": ET | ONESHOT}
MOMENTS = ["fresh", "bound", "listening"]


def prepared(world: World, epfd: int, moment: str, events: int) -> tuple[int, tuple[str, int]]:
    """A listener that was registered at a moment of its life."""
    server = world.server
    listener = server.socket()
    if moment == "fresh":
        server.epoll_ctl(epfd, ADD, listener, events)
    server.bind(listener, (LOOPBACK, 0))
    if moment == "bound":
        server.epoll_ctl(epfd, ADD, listener, events)
    server.listen(listener, 16)
    if moment == "listening":
        server.epoll_ctl(epfd, ADD, listener, events)
    return listener, server.getsockname(listener)


def come(world: World, address: tuple[str, int]) -> int:
    fd = world.client.socket()
    assert world.client.connect(fd, address) == 0
    return fd


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("mode", MODES)
def test_listener(world: World, mode: str, moment: str) -> None:
    """T2: one event per readiness of a listener, in each mode, whenever it was registered."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, moment, IN | MODES[mode])
    if moment != "listening":
        server.epoll_wait(epfd, 0)  # what a socket that does not listen shows
    server.epoll_wait(epfd, 0)
    fd = come(world, address)
    server.epoll_wait(epfd, 2000)
    server.epoll_wait(epfd, 0)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(epfd, 0)
    come(world, address)
    server.epoll_wait(epfd, 100)
    server.epoll_wait(epfd, 0)
    if mode != "exclusive":
        server.epoll_ctl(epfd, MOD, listener, IN | MODES[mode])
        server.epoll_wait(epfd, 100)
        server.epoll_wait(epfd, 0)
    assert server.epoll_ctl(epfd, DEL, listener) == 0
    server.epoll_wait(epfd, 0)
    assert server.epoll_ctl(epfd, DEL, listener) == "ENOENT"


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot", "edge-oneshot"])
@pytest.mark.parametrize("blocking", [True, False])
def test_connection_registered_before_connect(world: World, mode: str, blocking: bool) -> None:
    """T2: a connecting socket registered before connect, in each mode."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket(kind=socket.SOCK_STREAM if blocking else NONBLOCK)
    assert client.epoll_ctl(epfd, ADD, fd, IN | OUT | RDHUP | MODES[mode], 77) == 0
    assert client.connect(fd, address) == (0 if blocking else "EINPROGRESS")
    client.epoll_wait(epfd, 2000)
    client.epoll_wait(epfd, 0)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.send(accepted, b"bytes")
    client.raw("usleep", 10000)
    client.epoll_wait(epfd, 100)
    client.epoll_ctl(epfd, MOD, fd, IN | MODES[mode], 78)
    client.epoll_wait(epfd, 100)
    client.recv(fd, 50)
    client.epoll_wait(epfd, 0)
    assert client.epoll_ctl(epfd, ADD, fd, IN) == "EEXIST"
    assert client.epoll_ctl(epfd, DEL, fd) == 0
    assert client.epoll_ctl(epfd, MOD, fd, IN) == "ENOENT"


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot"])
def test_fired_before_connect(world: World, mode: str) -> None:
    """T2: an event of the unconnected socket was taken before connect: ONESHOT stays spent, the others go on."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket()
    client.epoll_ctl(epfd, ADD, fd, IN | OUT | MODES[mode])
    client.epoll_wait(epfd, 100)
    client.epoll_wait(epfd, 0)
    client.connect(fd, address)
    client.epoll_wait(epfd, 100)
    client.epoll_wait(epfd, 0)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    client.epoll_wait(epfd, 100)
    client.epoll_ctl(epfd, MOD, fd, IN | MODES[mode])
    client.epoll_wait(epfd, 100)


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot"])
def test_connection_registered_after(world: World, mode: str) -> None:
    """T2: connected and accepted sockets, registered afterwards."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    for actor, number in ((client, fd), (server, accepted)):
        epfd = actor.epoll_create()
        actor.epoll_ctl(epfd, ADD, number, IN | RDHUP | MODES[mode])
        actor.epoll_wait(epfd, 0)
        far, other = (server, accepted) if actor is client else (client, fd)
        far.send(other, b"one")
        actor.epoll_wait(epfd, 100)
        actor.epoll_wait(epfd, 0)
        far.send(other, b"two")
        actor.raw("usleep", 10000)
        actor.epoll_wait(epfd, 0)
        actor.recv(number, 50)
        actor.epoll_wait(epfd, 0)
        actor.epoll_ctl(epfd, MOD, number, IN | OUT | MODES[mode])
        actor.epoll_wait(epfd, 100)
        actor.close(number)
        actor.epoll_wait(epfd, 0)
        if actor is client:
            fd, accepted = world.pair()


def test_edge_fires_again(world: World) -> None:
    """T2: edge-triggered, a second client makes a second event without an accept between."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "listening", IN | ET)
    first = come(world, address)
    server.epoll_wait(epfd, 2000)
    come(world, address)
    server.epoll_wait(epfd, 2000)
    server.epoll_wait(epfd, 0)
    accepted, _ = server.accept(listener)
    world.proves(first, accepted)
    server.accept(listener)
    server.epoll_wait(epfd, 0)


def test_waits(world: World) -> None:
    """T2: epoll_wait sleeps until a client comes to a listener."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "listening", IN)
    pending = server.start_epoll_wait(epfd, -1)
    assert pending.blocks()
    fd = come(world, address)
    assert pending.result() == [(listener, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_two_epolls(world: World) -> None:
    """T2: a listener in two epolls shows in both; taken out of one it stays in the other."""
    server = world.server
    one, two = server.epoll_create(), server.epoll_create()
    listener, address = prepared(world, one, "listening", IN)
    server.epoll_ctl(two, ADD, listener, IN, 5)
    fd = come(world, address)
    server.epoll_wait(one, 2000)
    server.epoll_wait(two, 2000)
    server.epoll_ctl(one, DEL, listener)
    server.epoll_wait(one, 0)
    server.epoll_wait(two, 0)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.close(two)
    come(world, address)
    server.epoll_wait(one, 0)
    server.epoll_ctl(one, ADD, listener, IN)
    server.epoll_wait(one, 100)


def test_aliases_in_one_epoll(world: World) -> None:
    """T2, T3: a listener and its duplicate in one epoll are two registrations."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "listening", IN)
    copy = server.dup(listener)
    server.epoll_ctl(epfd, ADD, copy, IN)
    server.epoll_ctl(epfd, ADD, copy, IN)
    fd = come(world, address)
    events = server.epoll_wait(epfd, 2000)
    assert sorted(events) == [(listener, "IN"), (copy, "IN")]
    accepted, _ = server.accept(copy)
    world.proves(fd, accepted)
    server.epoll_ctl(epfd, DEL, copy)
    come(world, address)
    server.epoll_wait(epfd, 2000)
    server.close(copy)
    server.epoll_wait(epfd, 0)


def test_alias_connected(world: World) -> None:
    """T2, T3: a socket and its duplicate, both registered before connect by one of them."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket()
    copy = client.dup(fd)
    client.epoll_ctl(epfd, ADD, fd, IN, 1)
    client.epoll_ctl(epfd, ADD, copy, IN, 2)
    assert client.connect(copy, address) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    world.proves(copy, accepted)
    client.epoll_wait(epfd, 0)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    assert sorted(client.epoll_wait(epfd, 2000)) == [(1, "IN"), (2, "IN")]
    client.close(fd)
    client.recv(copy, 1)
    client.epoll_wait(epfd, 0)


def test_nested(world: World) -> None:
    """T2: an epoll inside an epoll, with a listener in the inner one."""
    server = world.server
    inner, outer = server.epoll_create(), server.epoll_create()
    listener, address = prepared(world, inner, "listening", IN)
    server.epoll_ctl(outer, ADD, inner, IN)
    server.epoll_wait(outer, 0)
    fd = come(world, address)
    server.epoll_wait(outer, 2000)
    server.epoll_wait(inner, 2000)
    server.poll([(outer, IN)], 100)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(outer, 0)


def test_an_epoll_for_each_thread(world: World) -> None:
    """T2: a client that waits at a listener is there for every epoll that the listener is put into, and stays."""
    server = world.server
    listener, address = world.listener()
    fd = come(world, address)
    epolls = [server.epoll_create() for _ in range(12)]
    for index, epfd in enumerate(epolls):
        assert server.epoll_ctl(epfd, ADD, listener, IN, index) == 0
    for index, epfd in enumerate(epolls):
        assert server.epoll_wait(epfd, 2000) == [(index, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    for epfd in epolls:
        server.epoll_wait(epfd, 0)
        assert server.epoll_ctl(epfd, DEL, listener) == 0


def test_nested_deep(world: World) -> None:
    """T2: as many levels as TCP allows, and its error for one more; the listener serves all the same."""
    world.tcp_only()
    server = world.server
    listener, address = world.listener()
    epolls = [server.epoll_create() for _ in range(7)]
    for level in range(6):
        server.epoll_ctl(epolls[level + 1], ADD, epolls[level], IN)
    for epfd in epolls:
        server.epoll_ctl(epfd, ADD, listener, IN)
    fd = come(world, address)
    server.epoll_wait(epolls[0], 2000)
    accepted, _ = server.accept(listener)
    world.client.send(fd, b"x")
    assert server.recv(accepted, 2) == b"x"


def test_errors(world: World) -> None:
    """T12: EEXIST, ENOENT, EBADF, EINVAL, EPERM of epoll_ctl on listeners and connections."""
    world.tcp_only()
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "listening", IN)
    fd = come(world, address)
    accepted, _ = server.accept(listener)
    server.epoll_ctl(epfd, ADD, listener, IN)
    server.epoll_ctl(epfd, 9, listener, IN)
    server.epoll_ctl(999, ADD, listener, IN)
    server.epoll_ctl(listener, ADD, listener, IN)
    server.epoll_ctl(epfd, ADD, epfd, IN)
    server.epoll_ctl(epfd, MOD, listener, IN | EXCLUSIVE)
    server.epoll_ctl(epfd, ADD, accepted, IN | EXCLUSIVE | ONESHOT)
    server.epoll_ctl(epfd, MOD, accepted, IN)
    server.epoll_ctl(epfd, DEL, accepted)
    server.call("epoll_ctl", epfd, ADD, accepted, None)
    server.call("epoll_ctl", epfd, ADD, accepted, 8)
    server.epoll_ctl(epfd, DEL, listener)
    server.epoll_ctl(epfd, ADD, listener, IN | EXCLUSIVE | ONESHOT)
    server.epoll_ctl(epfd, ADD, listener, IN | EXCLUSIVE)
    server.epoll_ctl(epfd, MOD, listener, IN)
    world.client.close(fd)


def test_closed_listener_leaves(world: World) -> None:
    """T2, T10: closing a listener takes it out of its epoll; the number's next socket is not registered."""
    client, server = world.client, world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "listening", IN)
    fd = come(world, address)
    world.proves(client_fd=fd)
    server.close(listener)
    server.epoll_wait(epfd, 0)
    again, address = world.listener()
    assert again == listener
    come(world, address)
    server.epoll_wait(epfd, 50)
    assert server.epoll_ctl(epfd, MOD, again, IN) == "ENOENT"
    assert server.epoll_ctl(epfd, ADD, again, IN) == 0
    server.epoll_wait(epfd, 1000)
    client.close(fd)


def test_exclusive_threads(world: World) -> None:
    """T2: EXCLUSIVE in two epolls of two threads: a client wakes at least one, and is accepted once."""
    server = world.server
    one, two = server.epoll_create(), server.epoll_create()
    listener, address = prepared(world, one, "listening", IN | EXCLUSIVE)
    server.epoll_ctl(two, ADD, listener, IN | EXCLUSIVE)
    fd = come(world, address)
    assert server.raw("usleep", 10000).result == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(one, 0)
    server.epoll_wait(two, 0)


def test_shutdown_and_listen_again(world: World) -> None:
    """T2, T9: a registered listener that was shut down and listens again serves its epoll."""
    server = world.server
    epfd = server.epoll_create()
    port = world.port()
    listener, address = world.listener(port=port)
    server.epoll_ctl(epfd, ADD, listener, IN)
    server.shutdown(listener, socket.SHUT_RD)
    server.epoll_wait(epfd, 100)
    server.listen(listener, 5)
    server.epoll_wait(epfd, 0)
    fd = come(world, address)
    server.epoll_wait(epfd, 2000)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_epoll_number_again(world: World) -> None:
    """T2: an epoll that was closed leaves nothing behind for the next of its number, which watches the listener in
    another way."""
    server = world.server
    epfd = server.epoll_create()
    listener, _ = prepared(world, epfd, "listening", IN)
    for events in (IN | EXCLUSIVE, IN, IN | EXCLUSIVE):
        server.close(epfd)
        assert server.epoll_create() == epfd
        assert server.epoll_ctl(epfd, ADD, listener, events) == 0
    world.tcp_only()


def test_epoll_with_two_descriptors(world: World) -> None:
    """T2, T3: two aliases of a listener, each registered, changed and taken out through any descriptor of the epoll."""
    server = world.server
    one = server.epoll_create()
    listener, address = prepared(world, one, "listening", IN)
    two, copy, third = server.dup(one), server.dup(listener), server.dup(listener)
    assert server.epoll_ctl(two, ADD, copy, IN, 70) == 0
    for epfd in (one, two):
        for alias in (listener, copy):
            assert server.epoll_ctl(epfd, ADD, alias, IN) == "EEXIST"
            server.epoll_ctl(epfd, ADD, alias, IN | EXCLUSIVE)
        assert server.epoll_ctl(epfd, MOD, third, IN) == "ENOENT"
    other = server.epoll_create()
    assert server.epoll_ctl(other, ADD, copy, IN, 90) == 0
    fd = come(world, address)
    assert sorted(server.epoll_wait(two, 2000)) == [(listener, "IN"), (70, "IN")]
    assert server.epoll_ctl(one, MOD, copy, IN | ET, 80) == 0
    assert sorted(server.epoll_wait(two, 2000)) == [(listener, "IN"), (80, "IN")]
    assert server.epoll_ctl(two, DEL, listener) == 0
    assert server.epoll_ctl(one, DEL, listener) == "ENOENT"
    assert server.epoll_wait(other, 0) == [(90, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert server.epoll_ctl(two, ADD, third, IN, 60) == 0
    assert server.epoll_ctl(one, DEL, third) == 0
    server.shutdown(listener, socket.SHUT_RD)   # what is changed through one is known of the other
    assert server.epoll_wait(one, 100) == [(80, "HUP")]
    assert server.epoll_ctl(one, DEL, copy) == 0
    server.epoll_wait(two, 0)
    assert server.epoll_wait(other, 100) == [(90, "HUP")]


def test_changed_through_another_descriptor(world: World) -> None:
    """T2, T3: a registration that was changed through a duplicate of its epoll goes on changed after connect."""
    client, server = world.client, world.server
    listener, address = world.listener()
    one = client.epoll_create()
    two, fd = client.dup(one), client.socket()
    client.epoll_ctl(one, ADD, fd, IN, 1)
    client.epoll_ctl(two, MOD, fd, OUT, 2)
    client.connect(fd, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert client.epoll_wait(one, 100) == [(2, "OUT")]
    assert client.epoll_ctl(one, DEL, fd) == 0
    assert client.epoll_wait(two, 0) == []


@pytest.mark.parametrize("who", ["parent", "child"])
@pytest.mark.parametrize("mode", ["level", "edge", "exclusive"])
def test_shared_epoll(world: World, mode: str, who: str) -> None:
    """T2, T4: what one process registers in an epoll that both have is the other's to see, to change, to take out."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = world.listener()
    child = server.fork("child")
    maker, other = (server, child) if who == "parent" else (child, server)
    assert maker.epoll_ctl(epfd, ADD, listener, IN | MODES[mode], 7) == 0
    assert other.epoll_ctl(epfd, ADD, listener, IN | MODES[mode]) == "EEXIST"
    fd = come(world, address)
    assert other.epoll_wait(epfd, 2000) == [(7, "IN")]
    if mode != "exclusive":
        assert other.epoll_ctl(epfd, MOD, listener, IN | MODES[mode], 8) == 0
        assert maker.epoll_wait(epfd, 2000) == [(8, "IN")]
    accepted, _ = other.accept(listener)
    world.proves(fd, accepted, server=other)
    maker.epoll_wait(epfd, 0)
    assert other.epoll_ctl(epfd, DEL, listener) == 0
    come(world, address)
    assert maker.epoll_wait(epfd, 0) == []
    assert maker.epoll_ctl(epfd, DEL, listener) == "ENOENT"
    assert maker.epoll_ctl(epfd, ADD, listener, IN | MODES[mode], 9) == 0
    assert other.epoll_wait(epfd, 2000) == [(9, "IN")]


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot", "exclusive"])
def test_registered_by_a_child_that_ends(world: World, mode: str) -> None:
    """T2, T4: a listener that a child registers in an inherited epoll stays there when the child has ended."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = world.listener()
    child = server.fork("child")
    assert child.epoll_ctl(epfd, ADD, listener, IN | MODES[mode]) == 0
    child.exit()
    assert server.epoll_wait(epfd, 0) == []
    fd = come(world, address)
    assert server.epoll_wait(epfd, 2000) == [(listener, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(epfd, 0)
    assert server.epoll_ctl(epfd, ADD, listener, IN) == "EEXIST"
    assert server.epoll_ctl(epfd, DEL, listener) == 0


@pytest.mark.parametrize("edge", [0, ET])
def test_spent(world: World, edge: int) -> None:
    """T2: ONESHOT that has fired before connect, and before connect(AF_UNSPEC), is silent until it is armed again."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket()
    client.epoll_ctl(epfd, ADD, fd, IN | OUT | ONESHOT | edge, 1)
    client.epoll_wait(epfd, 100)
    client.connect(fd, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.close(accepted)
    client.poll([(fd, IN)], 1000)
    assert client.epoll_wait(epfd, 0) == []
    assert client.epoll_ctl(epfd, ADD, fd, IN) == "EEXIST"
    assert client.epoll_ctl(epfd, MOD, fd, IN | ONESHOT | edge, 2) == 0
    client.epoll_wait(epfd, 100)
    assert client.epoll_wait(epfd, 0) == []
    client.disconnect(fd)
    assert client.epoll_wait(epfd, 0) == []
    assert client.epoll_ctl(epfd, ADD, fd, IN) == "EEXIST"
    assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    server.send(accepted, b"x")
    client.poll([(fd, IN)], 1000)
    assert client.epoll_wait(epfd, 0) == []
    assert client.epoll_ctl(epfd, MOD, fd, IN | ONESHOT | edge, 3) == 0
    assert client.epoll_wait(epfd, 100) == [(3, "IN")]
    client.disconnect(fd)
    assert client.epoll_ctl(epfd, DEL, fd) == 0
    assert client.epoll_ctl(epfd, DEL, fd) == "ENOENT"
