"""Readiness of sockets whose numbers, files and registrations change under those who wait."""

from __future__ import annotations

import errno
import fcntl
import itertools
import select
import signal
import socket
import struct

import pytest
from puppet import Actor, Buffer
from test_epoll import ADD, DEL, IN, MOD, MODES, OUT, RDHUP, come, prepared
from world import LOOPBACK, World

SA_RESTART = 0x10000000
F_SETSIG, F_GETSIG, F_GETOWN, O_ASYNC, FIOASYNC = 10, 11, 9, 0o20000, 0x5452


def data_of(actor: Actor, epfd: int) -> list[int]:
    """The data of all events, sorted: a level-triggered epoll has no order."""
    answer = actor.raw("epoll_wait", epfd, Buffer(bytes(12 * 8)), 8, 2000)
    events = sorted(struct.unpack_from("=IQ", answer.memory[0], 12 * i)[::-1] for i in range(answer.result))
    actor.note("epoll_wait", f"{epfd}", events)
    return [data for data, _ in events]


# ---- aliases


@pytest.mark.parametrize("mode", ["level", "edge"])
@pytest.mark.parametrize("beside", [False, True])
def test_registered_alias_closed_before_connect(world: World, mode: str, beside: bool) -> None:
    """T2, T3: an epoll tells of the connection under a number that was closed before connect, and of nothing else."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket()
    copy = client.dup(fd)
    client.epoll_ctl(epfd, ADD, copy, IN | RDHUP | MODES[mode], 77)
    if beside:
        client.epoll_ctl(epfd, ADD, fd, IN | RDHUP | MODES[mode], 78)
    client.epoll_wait(epfd, 0)
    client.close(copy)
    client.connect(fd, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    client.epoll_wait(epfd, 30)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    assert sorted(data_of(client, epfd)) == ([77, 78] if beside else [77])
    assert client.recv(fd, 5) == b"x"
    client.epoll_wait(epfd, 30)
    client.close(fd)
    client.epoll_wait(epfd, 0)


@pytest.mark.parametrize("mode", ["level", "edge", "exclusive"])
@pytest.mark.parametrize("moment", ["fresh", "listening"])
def test_registered_alias_of_listener_closed(world: World, mode: str, moment: str) -> None:
    """T2, T3: a listener goes on to show under a number that was closed, before listen or after."""
    client, server = world.client, world.server
    epfd = server.epoll_create()
    listener = server.socket()
    server.bind(listener, (LOOPBACK, 0))
    copy = server.dup(listener)
    if moment == "fresh":
        server.epoll_ctl(epfd, ADD, copy, IN | MODES[mode], 77)
        server.epoll_wait(epfd, 0)
        server.close(copy)
    server.listen(listener, 8)
    if moment == "listening":
        server.epoll_ctl(epfd, ADD, copy, IN | MODES[mode], 77)
        server.close(copy)
    address = server.getsockname(listener)
    server.epoll_wait(epfd, 0)
    server.epoll_wait(epfd, 30)
    fd = come(world, address)
    assert server.epoll_wait(epfd, 2000) == [(77, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(epfd, 30)
    client.close(come(world, address))
    assert server.epoll_wait(epfd, 2000) == [(77, "IN")]
    server.close(listener)
    server.epoll_wait(epfd, 30)


@pytest.mark.parametrize("mode", ["level", "edge", "exclusive"])
@pytest.mark.parametrize("which", ["original", "copy", "both"])
def test_listener_that_goes_back_to_tcp(world: World, mode: str, which: str) -> None:
    """T2, S13: an option that only TCP can honour takes a registered listener off the SAN: nothing shows that is not
    there, whichever of its numbers was registered and closed."""
    world.tcp_only()
    server = world.server
    epfd = server.epoll_create()
    listener, address = world.listener()
    copy = server.dup(listener)
    if which != "copy":
        server.epoll_ctl(epfd, ADD, listener, IN | MODES[mode], 1)
    if which != "original":
        server.epoll_ctl(epfd, ADD, copy, IN | MODES[mode], 2)
    gone, left = (copy, listener) if which == "copy" else (listener, copy)
    server.close(gone)
    server.setsockopt(left, socket.SOL_SOCKET, 36, 0)  # SO_MARK
    server.fcntl(left, 4, 0o4000)
    assert server.accept(left) == "EAGAIN"
    server.epoll_wait(epfd, 0)
    server.epoll_wait(epfd, 30)
    fd = come(world, address)
    server.poll([(left, IN)], 2000)
    assert sorted(data_of(server, epfd)) == {"original": [1], "copy": [2], "both": [1, 2]}[which]
    accepted, _ = server.accept(left)
    server.epoll_wait(epfd, 30)
    world.client.send(fd, b"x")
    assert server.recv(accepted, 5) == b"x"
    server.close(left)
    server.epoll_wait(epfd, 30)


def test_number_closed_and_taken_by_another(world: World) -> None:
    """T2, T10: a registered number that another socket takes shows its own socket only."""
    client, server = world.client, world.server
    listener, address = world.listener()
    epfd = client.epoll_create()
    fd = client.socket()
    client.epoll_ctl(epfd, ADD, fd, IN, 1)
    client.close(fd)
    again = client.socket()
    assert again == fd
    assert client.epoll_ctl(epfd, DEL, again) == "ENOENT"
    client.epoll_ctl(epfd, ADD, again, IN, 2)
    client.connect(again, address)
    accepted, _ = server.accept(listener)
    world.proves(again, accepted)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    assert client.epoll_wait(epfd, 2000) == [(2, "IN")]


# ---- registrations that follow


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_disconnected_and_connected_again(world: World, when: str, mode: str) -> None:
    """T2: registrations stay through connect(AF_UNSPEC) and the next connect, whenever they were made."""
    client, server = world.client, world.server
    listener, address = world.listener()
    one, two = client.epoll_create(), client.epoll_create()
    fd = client.socket()
    copy = client.dup(fd)
    if when == "after":
        assert client.connect(fd, address) == 0
    client.epoll_ctl(one, ADD, fd, IN | MODES[mode], 71)
    client.epoll_ctl(two, ADD, copy, IN | MODES[mode], 72)
    if when == "before":
        assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    assert client.disconnect(fd) == 0
    assert client.epoll_ctl(one, ADD, fd, IN) == "EEXIST"
    client.poll(fd)
    assert client.epoll_ctl(one, MOD, fd, IN | MODES[mode], 73) == 0
    assert client.epoll_ctl(two, MOD, copy, 0, 74) == 0
    assert client.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    client.epoll_wait(one, 30)
    assert client.connect(copy, address) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    client.epoll_ctl(one, MOD, fd, IN | MODES[mode], 75)
    client.epoll_ctl(two, MOD, copy, IN | MODES[mode], 76)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    assert client.epoll_wait(one, 2000) == [(75, "IN")]
    assert client.epoll_wait(two, 2000) == [(76, "IN")]
    assert client.epoll_ctl(one, DEL, fd) == 0
    assert client.epoll_ctl(two, DEL, copy) == 0


def test_many_epolls_one_after_another(world: World) -> None:
    """T2: epolls that come and go leave nothing behind: the tenth shows a listener, and a socket that then connects."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    for actor, number in ((server, listener), (client, fd)):
        for _ in range(10):
            epfd = actor.epoll_create()
            assert actor.epoll_ctl(epfd, ADD, number, IN) == 0
            if _ < 9:
                actor.close(epfd)
    assert client.connect(fd, address) == 0
    assert server.epoll_wait(epfd, 2000) == [(listener, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    assert client.epoll_wait(epfd, 2000) == [(fd, "IN")]


@pytest.mark.parametrize("mode", MODES)
def test_taken_out_and_put_in_again(world: World, mode: str) -> None:
    """T2: MOD, DEL and ADD again of a listener with a client waiting: each makes an event, and only one."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "bound", IN | MODES[mode])
    server.epoll_wait(epfd, 0)
    fd = come(world, address)
    server.epoll_wait(epfd, 2000)
    for events in (IN, OUT, 0, IN | OUT, IN):
        server.epoll_ctl(epfd, MOD, listener, events | MODES[mode], 5)
        server.epoll_wait(epfd, 30)
        server.epoll_wait(epfd, 0)
        assert server.epoll_ctl(epfd, DEL, listener) == 0
        server.epoll_wait(epfd, 0)
        assert server.epoll_ctl(epfd, ADD, listener, events | MODES[mode], 6) == 0
        server.epoll_wait(epfd, 30)
        server.epoll_wait(epfd, 0)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.epoll_wait(epfd, 0)


def test_duplicated_epoll(world: World) -> None:
    """T2, T3: an epoll's duplicate changes what the original registered, and the other way round."""
    server = world.server
    epfd = server.epoll_create()
    listener, address = prepared(world, epfd, "bound", IN)
    other = server.dup(epfd)
    assert server.epoll_ctl(other, ADD, listener, IN) == "EEXIST"
    assert server.epoll_ctl(other, MOD, listener, IN, 7) == 0
    fd = come(world, address)
    assert server.epoll_wait(epfd, 2000) == [(7, "IN")]
    assert server.epoll_ctl(other, DEL, listener) == 0
    server.epoll_wait(epfd, 0)
    assert server.epoll_ctl(other, ADD, listener, IN, 8) == 0
    server.close(other)
    assert server.epoll_wait(epfd, 2000) == [(8, "IN")]
    assert server.epoll_ctl(epfd, DEL, listener) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


# ---- epolls in epolls


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested(world: World, depth: int, mode: str) -> None:
    """T2: a listener at the bottom of nested epolls shows at the top: one event for each client."""
    server = world.server
    epolls = [server.epoll_create() for _ in range(depth + 1)]
    for inner, outer in itertools.pairwise(epolls):
        server.epoll_ctl(outer, ADD, inner, IN | MODES[mode])
    listener, address = prepared(world, epolls[0], "bound", IN)
    for _ in range(2):
        server.epoll_wait(epolls[-1], 0)
        fd = come(world, address)
        for epfd in reversed(epolls):
            server.epoll_wait(epfd, 2000 if mode == "level" else 100)
            server.epoll_wait(epfd, 0)
        accepted, _ = server.accept(listener)
        world.proves(fd, accepted)
        server.poll([(epolls[-1], IN)], 30)
        server.select(epolls[-1] + 1, [epolls[-1]], [], [])


@pytest.mark.parametrize("order", ["listener first", "epolls first"])
def test_nested_to_the_limit(world: World, order: str) -> None:
    """T2: every depth that TCP allows works, whichever is put in first, and one more is TCP's error."""
    world.tcp_only()
    server = world.server
    listener, address = world.listener()
    epolls = [server.epoll_create() for _ in range(7)]
    if order == "listener first":
        server.epoll_ctl(epolls[0], ADD, listener, IN)
    made = 1
    for inner, outer in itertools.pairwise(epolls):
        if server.epoll_ctl(outer, ADD, inner, IN) == 0:
            made += 1
    if order == "epolls first":
        for epfd in epolls:
            server.epoll_ctl(epfd, ADD, listener, IN)
    fd = come(world, address)
    for epfd in epolls[:made]:
        server.epoll_wait(epfd, 2000)
    accepted, _ = server.accept(listener)
    world.client.send(fd, b"x")
    assert server.recv(accepted, 2) == b"x"
    for epfd in epolls[:made]:
        server.epoll_wait(epfd, 30)


# ---- several who wait


def test_accept_poll_and_epoll_at_once(world: World) -> None:
    """T2, S21: threads in accept, poll and epoll_wait on one listener, with as many clients: nobody sleeps on."""
    server = world.server
    listener, address = world.listener()
    epfd = server.epoll_create()
    server.epoll_ctl(epfd, ADD, listener, IN)
    workers = [server.thread(f"worker{n}") for n in range(6)]
    pending = []
    for worker, way in zip(workers, ["accept", "poll", "epoll", "accept", "poll", "epoll"], strict=True):
        if way == "accept":
            worker.ask("accept", listener, None, None)
            pending.append((worker, "accept"))
        elif way == "poll":
            worker.ask("poll", Buffer(struct.pack("=ihh", listener, IN, 0)), 1, 3000)
            pending.append((worker, "poll"))
        else:
            worker.ask("epoll_wait", epfd, Buffer(bytes(12)), 1, 3000)
            pending.append((worker, "epoll_wait"))
    assert not select.select([worker.channel for worker in workers], [], [], 0.1)[0]
    fds = [come(world, address) for _ in range(6)]
    accepted = []
    for worker, way in pending:
        answer = worker.answer(way, 3)
        assert answer.result > 0, (way, answer)
        if way == "accept":
            accepted.append(answer.result)
    while len(accepted) < 6:
        assert server.poll([(listener, IN)], 1000) == (1, ["IN"])
        accepted.append(server.raw("accept", listener, None, None).result)
    assert server.poll([(listener, IN)], 30) == (0, ["0"])
    server.epoll_wait(epfd, 0)
    for fd, other in zip(fds, sorted(accepted), strict=True):
        world.proves(fd, other)


@pytest.mark.parametrize("mode", ["level", "edge", "oneshot"])
def test_inherited_registration(world: World, mode: str) -> None:
    """T2, T4: parent and child share an epoll with a listener in it: both see, change and take it out."""
    client, server = world.client, world.server
    epfd = server.epoll_create()
    listener, address = world.listener()
    server.epoll_ctl(epfd, ADD, listener, IN | MODES[mode], 1)
    child = server.fork("child")
    fd = come(world, address)
    assert child.epoll_wait(epfd, 2000) == [(1, "IN")]
    server.epoll_wait(epfd, 0)
    accepted, _ = child.accept(listener)
    world.proves(fd, accepted, server=child)
    child.close(accepted)
    client.close(fd)
    assert child.epoll_ctl(epfd, MOD, listener, IN | MODES[mode], 2) == 0
    assert server.epoll_ctl(epfd, ADD, listener, IN) == "EEXIST"
    fd = come(world, address)
    assert server.epoll_wait(epfd, 2000) == [(2, "IN")]
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.close(listener)
    fd = come(world, address)
    child.epoll_wait(epfd, 30)
    accepted, _ = child.accept(listener)
    world.proves(fd, accepted, server=child)
    server.epoll_wait(epfd, 30)
    assert child.epoll_ctl(epfd, DEL, listener) == 0
    server.epoll_wait(epfd, 30)


# ---- accept and those who end it


@pytest.mark.parametrize("by", ["thread", "process"])
def test_closed_under_accept(world: World, by: str) -> None:
    """T9: a listener that is closed while threads are blocked in accept serves each of them once, then nobody."""
    client, server = world.client, world.server
    listener, address = world.listener()
    workers = [server.thread(f"worker{n}") for n in range(2)]
    pending = [worker.start_accept(listener) for worker in workers]
    assert all(each.blocks(0.05) for each in pending)
    server.close(listener)
    if by == "process":  # a child has no thread that waits: it keeps nothing
        server.fork("child")
    assert server.socket() == listener
    assert all(each.blocks(0.05) for each in pending)
    while workers:
        fd = come(world, address)
        ready = select.select([worker.channel for worker in workers], [], [], 3)[0]
        assert len(ready) == 1
        index = [worker.channel for worker in workers].index(ready[0])
        workers.pop(index)
        answer = pending.pop(index).actor.answer("accept")
        assert answer.result > 0, answer
        world.proves(fd, answer.result)
    fd = client.socket()
    client.raw("usleep", 10000)
    assert client.connect(fd, address) == "ECONNREFUSED"


def test_alias_closed_under_accept(world: World) -> None:
    """T3, T9: a listener's number that is closed while a thread is blocked in accept on it; another number stays."""
    server = world.server
    listener, address = world.listener()
    alias = server.dup(listener)
    worker = server.thread("worker")
    pending = worker.start_accept(alias)
    assert pending.blocks(0.05)
    server.close(alias)
    assert server.socket() == alias
    fd = come(world, address)
    accepted, _ = pending.result()
    world.proves(fd, accepted)


def test_restarted_beside_a_crash_handler(world: World) -> None:
    """T9: a handler with SA_RESTART lets accept go on, though one for faults lacks it."""
    server = world.server
    server.handle(signal.SIGUSR1, SA_RESTART)
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
        server.handle(number, 0)
    listener, address = world.listener()
    pending = server.start_accept(listener)
    assert pending.blocks()
    server.kill(signal.SIGUSR1)
    assert pending.blocks()
    fd = come(world, address)
    accepted, _ = pending.result()
    assert server.signals() == 1
    world.proves(fd, accepted)


# ---- signals


def own(actor: Actor, fd: int, number: int = 0) -> None:
    assert actor.raw("fcntl", fd, fcntl.F_SETOWN, actor.pid).result == 0
    if number:
        assert actor.fcntl(fd, F_SETSIG, number) == 0


def owned(actor: Actor, fd: int) -> None:
    mine = actor.raw("fcntl", fd, F_GETOWN, 0).result == actor.pid
    actor.note("F_GETOWN", f"{fd}", "mine" if mine else "not mine")
    actor.fcntl(fd, F_GETSIG)
    actor.fcntl(fd, 3)


@pytest.mark.parametrize("number", [0, signal.SIGUSR2])
@pytest.mark.parametrize("flags", [0, O_ASYNC])
def test_signals_of_a_connection(world: World, flags: int, number: int) -> None:
    """T3: owner, signal and O_ASYNC that were set before connect hold afterwards, and through AF_UNSPEC."""
    client, server = world.client, world.server
    listener, address = world.listener()
    signals = (signal.SIGURG, number or signal.SIGIO)
    for each in signals:
        client.handle(each, SA_RESTART)
    fd = client.socket()
    own(client, fd, number)
    if flags:
        client.fcntl(fd, 4, flags)
    client.connect(fd, address)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    owned(client, fd)
    client.raw("puppet_signals")
    server.send(accepted, b"x")
    client.raw("usleep", 10000)
    client.note("told", "", client.raw("puppet_signals").result > 0)
    server.send(accepted, b"!", socket.MSG_OOB)
    client.raw("usleep", 10000)
    client.note("told", "", client.raw("puppet_signals").result > 0)
    client.disconnect(fd)
    owned(client, fd)


@pytest.mark.parametrize("when", ["before listen", "fcntl", "ioctl"])
def test_signals_of_a_listener(world: World, when: str) -> None:
    """T3: a listener with O_ASYNC tells its owner of each client."""
    client, server = world.client, world.server
    server.handle(signal.SIGIO, SA_RESTART)
    listener = server.socket()
    server.bind(listener, (LOOPBACK, 0))
    if when == "before listen":
        own(server, listener)
        server.fcntl(listener, 4, O_ASYNC)
    server.listen(listener, 8)
    if when == "fcntl":
        own(server, listener)
        server.fcntl(listener, 4, O_ASYNC)
    elif when == "ioctl":
        assert server.raw("ioctl", listener, 0x8901, Buffer(struct.pack("=i", server.pid))).result == 0
        server.ioctl(listener, FIOASYNC, 1)
    address = server.getsockname(listener)
    server.raw("puppet_signals")
    owned(server, listener)
    for _ in range(2):
        fd = come(world, address)
        server.raw("usleep", 10000)
        assert server.signals() == 1
        accepted, _ = server.accept(listener)
        world.proves(fd, accepted)
    if when == "ioctl":
        server.ioctl(listener, FIOASYNC, 0)
    else:
        server.fcntl(listener, 4, 0)
    fd = client.socket()
    client.connect(fd, address)
    server.raw("usleep", 10000)
    assert server.signals() == 0


def test_signal_that_tells_the_number(world: World) -> None:
    """T3, S16: a listener whose signal tells its number tells no other: it is TCP's."""
    world.tcp_only()
    server = world.server
    server.handle(signal.SIGUSR2, SA_RESTART)
    listener, address = world.listener()
    own(server, listener, signal.SIGUSR2)
    server.fcntl(listener, 4, O_ASYNC | 0o4000)
    server.accept(listener)
    server.raw("puppet_signals")
    fd = come(world, address)
    server.raw("usleep", 10000)
    assert server.signals() == 1
    accepted, _ = server.accept(listener)
    world.client.send(fd, b"x")
    assert server.recv(accepted, 2) == b"x"
