from __future__ import annotations

import select
import signal
import socket
import struct

import pytest
from puppet import Buffer, Pending
from world import LOOPBACK, World

IN, OUT, PRI, RDHUP, RDNORM, RDBAND = select.POLLIN, select.POLLOUT, select.POLLPRI, 0x2000, 0x40, 0x80
ALL = IN | OUT | PRI | RDHUP
WAYS = ["poll", "ppoll", "select", "pselect"]


def start(world: World, fd: int, way: str, timeout: int, actor: object = None) -> Pending:
    actor = actor or world.server
    if way.endswith("select"):
        return actor.start_select(fd + 1, [fd], [], [], None if timeout < 0 else timeout / 1000, way)
    return actor.start_poll([(fd, IN)], timeout, way)


@pytest.mark.parametrize("way", WAYS)
def test_listener(world: World, way: str) -> None:
    """T2, S21: a listener is readable when a client waits, and only then."""
    client, server = world.client, world.server
    listener, address = world.listener()
    start(world, listener, way, 0).result()
    start(world, listener, way, 30).result()
    pending = start(world, listener, way, -1)
    assert pending.blocks()
    fd = client.socket()
    client.connect(fd, address)
    pending.result()
    start(world, listener, way, 0).result()
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    start(world, listener, way, 0).result()


@pytest.mark.parametrize("way", WAYS)
def test_connection(world: World, way: str) -> None:
    """T2: a connection is readable when bytes wait."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    start(world, accepted, way, 0).result()
    pending = start(world, accepted, way, 2000)
    assert pending.blocks()
    client.send(fd, b"x")
    pending.result()
    server.recv(accepted, 1)
    start(world, accepted, way, 0).result()


def test_masks(world: World) -> None:
    """T2: every mask on a listener with and without a client, and on a connection."""
    client, server = world.client, world.server
    listener, address = world.listener()
    masks = (0, IN, OUT, PRI, RDHUP, RDNORM, RDBAND, ALL, IN | RDNORM)
    for mask in masks:
        server.poll([(listener, mask)])
    fd = client.socket()
    client.connect(fd, address)
    server.poll([(listener, IN)], 2000)
    for mask in masks:
        server.poll([(listener, mask)])
    server.select(listener + 1, [listener], [listener], [listener])
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    for mask in masks:
        server.poll([(accepted, mask)])
    server.select(accepted + 1, [accepted], [accepted], [accepted])


def test_fresh_sockets(world: World) -> None:
    """T2: unconnected, bound and shut listeners under poll and select."""
    world.tcp_only()
    server = world.server
    fd = server.socket()
    server.poll([(fd, ALL)])
    server.select(fd + 1, [fd], [fd], [fd])
    server.bind(fd, (LOOPBACK, 0))
    server.poll([(fd, ALL)])
    server.listen(fd, 5)
    server.poll([(fd, ALL)])
    server.shutdown(fd, socket.SHUT_RD)
    server.poll([(fd, ALL)])
    server.poll([(fd, 0)])
    server.select(fd + 1, [fd], [fd], [fd])


def test_shutdown_wakes_poll(world: World) -> None:
    """T9: shutdown of a listener wakes a poll in another thread."""
    world.tcp_only()
    server = world.server
    listener, _ = world.listener()
    worker = server.thread("worker")
    pending = worker.start_poll([(listener, ALL)], 3000)
    assert pending.blocks()
    server.shutdown(listener, socket.SHUT_RD)
    assert pending.result()[0] == 1


def test_many_descriptors(world: World) -> None:
    """T2: listeners, connections, bad and negative descriptors in one call, in order; one of them twice."""
    client, server = world.client, world.server
    first, one = world.listener()
    second, two = world.listener()
    fd, accepted = world.join(first, one)
    client.send(fd, b"x")
    other = client.socket()
    client.connect(other, two)
    server.poll([(accepted, IN)], 2000)
    server.poll([(second, IN)], 2000)
    asked = [
        (first, IN),
        (-1, IN),
        (second, IN),
        (999, IN),
        (accepted, ALL),
        (second, IN | OUT),
        (accepted, 0),
        (2, IN),
    ]
    server.poll(asked)
    server.poll(asked, call="ppoll")
    server.poll([(second, IN)] * 100)
    server.select(accepted + 1, [first, second, accepted], [accepted, first], [accepted])
    server.select(60, [first, second, 50], [], [])
    server.select(first, [first], [], [])


@pytest.mark.parametrize("way", WAYS)
def test_interrupted(world: World, way: str) -> None:
    """T9: a signal ends a wait on a listener with EINTR, SA_RESTART or not."""
    world.tcp_only()
    server = world.server
    listener, _ = world.listener()
    for flags in (0, 0x10000000):
        server.handle(signal.SIGUSR1, flags)
        pending = start(world, listener, way, 5000)
        assert pending.blocks()
        server.kill(signal.SIGUSR1)
        assert pending.result() == "EINTR"


@pytest.mark.parametrize("way", WAYS)
def test_threads_wait(world: World, way: str) -> None:
    """T2: three threads wait on one listener: a client wakes all of them."""
    client, server = world.client, world.server
    listener, address = world.listener()
    pending = [start(world, listener, way, 3000, server.thread(f"worker{n}")) for n in range(3)]
    assert all(each.blocks(0.02) for each in pending)
    fd = client.socket()
    client.connect(fd, address)
    for each in pending:
        each.result()
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_duplicated_listener(world: World) -> None:
    """T2, T3: poll and accept by a duplicate, after the original was closed."""
    client, server = world.client, world.server
    listener, address = world.listener()
    copy = server.dup(listener)
    server.poll([(copy, IN), (listener, IN)])
    server.close(listener)
    fd = client.socket()
    client.connect(fd, address)
    server.poll([(copy, IN)], 2000)
    accepted, _ = server.accept(copy)
    world.proves(fd, accepted)


def test_poll_then_accept_in_turn(world: World) -> None:
    """T2: the loop of a select server over five clients."""
    client, server = world.client, world.server
    listener, address = world.listener(kind=socket.SOCK_NONBLOCK)
    for n in range(5):
        fd = client.socket()
        client.connect(fd, address)
        assert server.poll([(listener, IN)], 2000) == (1, ["IN"])
        accepted, _ = server.accept(listener)
        world.proves(fd, accepted)
        assert server.accept(listener) == "EAGAIN"
        client.send(fd, b"%d" % n)
        assert server.poll([(listener, IN), (accepted, IN)], 2000) == (1, ["0", "IN"])
        assert server.recv(accepted, 5) == b"%d" % n


@pytest.mark.parametrize("events", [0, PRI])
def test_neither_direction_asked(world: World, events: int) -> None:
    """T2: after the peer's close poll shows no hang-up, and waits on, until the program's own direction ends too."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    worker = client.thread("worker")
    before = worker.start_poll([(fd, events)], 3000)
    assert before.blocks()
    server.close(accepted)
    assert before.blocks()
    for timeout in (0, 30):
        client.poll([(fd, events)], timeout)
        client.poll([(fd, events)], timeout, "ppoll")
        client.poll([(2, 0), (fd, events), (-1, 0)], timeout)
    after = client.thread("other").start_poll([(fd, events)], 3000)
    assert after.blocks()
    client.shutdown(fd, socket.SHUT_WR)
    assert before.result() == after.result() == (1, ["HUP"])
    client.poll([(fd, events)], 30)


def test_listener_becomes_a_connection(world: World) -> None:
    """T2, T9: what once was polled as a listener is polled as a connection, for neither direction as well."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    assert client.bind(fd, (LOOPBACK, 0)) == 0
    assert client.listen(fd) == 0
    assert client.poll([(fd, IN)], 0)[0] == 0
    assert client.shutdown(fd, socket.SHUT_RDWR) == 0
    assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
    server.close(accepted)
    assert client.poll([(fd, 0)], 50)[0] == 0


def wide(*fds: int, fill: int = 0) -> Buffer:
    """A set for select() beyond FD_SETSIZE; `fill` is what stands behind an ordinary fd_set."""
    data = bytearray(128) + bytearray([fill]) * 2432
    for fd in fds:
        data[fd // 8] |= 1 << fd % 8
    return Buffer(bytes(data))


@pytest.mark.parametrize("way", ["select", "pselect"])
def test_select_beyond_its_set(world: World, way: str) -> None:
    """T2: counts beyond FD_SETSIZE reach as far as the program's own descriptors do; what lies behind an fd_set is
    neither read nor written."""
    server, client = world.server, world.client
    listener, address = world.listener()
    fd = client.socket()
    client.connect(fd, address)
    server.poll([(listener, IN)], 2000)
    at_once = Buffer(bytes(16))

    def select_in(*fds: int, fill: int = 0) -> bytes:
        answer = server.raw(way, 20000, wide(*fds, fill=fill), None, None, at_once, None)
        seen = sorted(each for each in range(8 * 128 if fill else 20000) if answer.memory[0][each // 8] >> each % 8 & 1)
        server.note(way, f"{fds}, {fill}", (answer.value, seen, answer.memory[0][128:140].hex()))
        return answer.memory[0]

    assert select_in(listener, fill=0xA5)[128:] == b"\xa5" * 2432
    assert select_in(2, fill=0xA5)[128:] == b"\xa5" * 2432
    assert server.dup2(listener, 3000) == 3000
    select_in(3000)
    select_in(3000, listener)
    select_in(3000, 3001)
    select_in(3000, 9000)
    accepted, _ = server.accept(3000)
    world.proves(fd, accepted)
    select_in(3000)


def test_select_errors(world: World) -> None:
    """T2, T12: with a listener among them, sets and timeouts come back as from the kernel, on errors too."""
    server, client = world.server, world.client
    listener, address = world.listener()
    fd = client.socket()
    client.connect(fd, address)
    server.poll([(listener, IN)], 2000)
    for count, read, seconds, fraction in (
        (listener + 1, [listener, 50], 0, 0),
        (61, [listener, 60], 5, 0),
        (listener + 1, [listener, 60, 70], 5, 0),
        (listener + 1, [listener], -1, 5),
        (listener + 1, [listener], 0, -5),
        (listener + 1, [listener], 0, 2_500_000),
        (listener + 1, [listener], 1 << 62, 1_500_000_000),
        (listener + 1, [listener], (1 << 63) - 1, 2_000_000),
        (-1, [listener], 0, 0),
    ):
        for way in ("select", "pselect"):
            data = bytearray(128)
            for each in read:
                data[each // 8] |= 1 << each % 8
            limit = Buffer(struct.pack("=qq", seconds, fraction))
            answer = server.raw(way, count, Buffer(bytes(data)), None, None, limit, None)
            after = struct.unpack("=qq", answer.memory[1])
            # The time left of a long one is not the same twice.
            left = after if after[0] < 1 or answer.error == "EINVAL" else "some time"
            seen = answer.value, answer.memory[0][:16].hex(), left
            server.note(way, f"{count}, {read}, {seconds}, {fraction}", seen)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)


def test_poll_errors(world: World) -> None:
    """T12: more descriptors than the limit allows, and wrong times, with a listener among them."""
    server, client = world.server, world.client
    listener, address = world.listener()
    fd = client.socket()
    client.connect(fd, address)
    server.poll([(listener, IN)], 2000)
    one = Buffer(struct.pack("=ihh", listener, IN, 0))
    for count in (0x7FFFFFFF, 1 << 19):
        assert server.call("poll", one, count, 0) == "EINVAL"
    for time in ((-1, 0), (0, 1_000_000_000), (0, -1)):
        assert server.call("ppoll", one, 1, Buffer(struct.pack("=qq", *time)), None) == "EINVAL"
    server.call("ppoll", one, 1, Buffer(struct.pack("=qq", (1 << 63) - 1, 999_999_999)), None)
    accepted, _ = server.accept(listener)
    world.proves(fd, accepted)
