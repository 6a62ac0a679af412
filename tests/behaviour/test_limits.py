"""Scarce descriptors, ports and memory: the switch takes none that the program could have used."""

from __future__ import annotations

import os
import resource
import socket

import pytest
from puppet import Actor, Buffer, pack_address
from world import World, companion_name

LIMITS = {"room above": (200, 4096)}


def limited(world: World, name: str, side: str, limits: tuple[int, int]) -> Actor:
    return world.stage.start(name, side, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))


def fill(actor: Actor) -> int:
    """Duplicates descriptor 2 until no number is free, and gives how many descriptors the program has then."""
    count = 0
    while actor.raw("dup", 2).result >= 0:
        count += 1
        assert count < 5000
    return count


@pytest.mark.parametrize("limits", LIMITS)
def test_numbers_are_the_programs(san: World, limits: str) -> None:
    """X6: with connections and a listener open a program can have as many descriptors as without the switch."""
    san.stage.environments = {**san.stage.environments, "plain": {"PATH": "/bin"}}
    counts = {}
    _, address = san.listener(backlog=64)
    for name, side in (("plain", "plain"), ("switched", "client")):
        actor = limited(san, name, side, LIMITS[limits])
        own = actor.socket()
        actor.bind(own, ("127.0.0.1", 0))
        actor.listen(own, 5)
        for _ in range(20):
            fd = actor.socket()
            assert actor.connect(fd, address) == 0
            if side == "client":
                assert companion_name(actor, fd), san.counted(actor)
        actor.poll([(own, 1)])
        counts[name] = fill(actor)
    assert counts["switched"] == counts["plain"]


@pytest.mark.parametrize("limits", LIMITS)
def test_full_table(san: World, limits: str) -> None:
    """X6, S7: with the last free descriptor a connection works, if not by the SAN then by TCP."""
    listener, address = san.listener()
    actor = limited(san, "full", "client", LIMITS[limits])
    fill(actor)
    actor.raw("close", 50)
    fd = actor.socket()
    assert fd == 50
    assert actor.connect(fd, address) == 0
    accepted, _ = san.server.accept(listener)
    actor.send(fd, b"served")
    assert san.server.recv(accepted, 10) == b"served"
    assert actor.socket() == "EMFILE"


@pytest.mark.parametrize("limits", LIMITS)
def test_full_table_of_the_server(san: World, limits: str) -> None:
    """X6, S23: a server with one free descriptor accepts; with none accept is EMFILE, and the client is not lost."""
    server = limited(san, "full", "server", LIMITS[limits])
    listener, address = san.listener(server)
    fill(server)
    fd = san.client.socket()
    assert san.client.connect(fd, address) == 0
    assert server.accept(listener) == "EMFILE"
    server.raw("close", 50)
    accepted, _ = server.accept(listener)
    assert accepted == 50
    san.client.send(fd, b"served")
    assert server.recv(accepted, 10) == b"served"


def test_limit_is_not_changed(san: World) -> None:
    """X6: the program's limits read as they were set."""
    _, address = san.listener()
    for limits in LIMITS.values():
        actor = limited(san, f"limited{limits[1]}", "client", limits)
        fd = actor.socket()
        assert actor.connect(fd, address) == 0
        assert resource.prlimit(actor.pid, resource.RLIMIT_NOFILE) == limits


def test_lowered_limit(san: World) -> None:
    """X6, T11: a program that lowers its limit after the first connections goes on."""
    listener, address = san.listener()
    actor = limited(san, "lowering", "client", (1024, 4096))
    fd = actor.socket()
    actor.connect(fd, address)
    accepted, _ = san.server.accept(listener)
    resource.prlimit(actor.pid, resource.RLIMIT_NOFILE, (64, 64))
    for _ in range(5):
        other = actor.socket()
        assert actor.connect(other, address) == 0
        got, _ = san.server.accept(listener)
        actor.send(other, b"x")
        assert san.server.recv(got, 5) == b"x"
        actor.close(other)
    actor.send(fd, b"old")
    assert san.server.recv(accepted, 5) == b"old"


def test_hidden_numbers_cannot_be_touched(san: World) -> None:
    """T11, S16: a program cannot close or overwrite what the switch keeps above its limit."""
    listener, address = san.listener()
    actor = limited(san, "curious", "client", (200, 4096))
    fd = actor.socket()
    actor.connect(fd, address)
    accepted, _ = san.server.accept(listener)
    numbers = [int(name) for name in os.listdir(f"/proc/{actor.pid}/fd")]
    assert max(numbers) >= 200
    for number in (n for n in numbers if n >= 200):
        assert actor.raw("close", number).error == "EBADF"
        assert actor.raw("dup2", 2, number).error == "EBADF"
        assert actor.raw("dup3", 2, number, 0).error == "EBADF"
    assert [int(name) for name in os.listdir(f"/proc/{actor.pid}/fd")] == numbers
    actor.send(fd, b"whole")
    assert san.server.recv(accepted, 10) == b"whole"


def test_two_thousand_connections(san: World) -> None:
    """X6: more connections than the ceiling of a small table, one after another, leak nothing."""
    listener, address = san.listener(backlog=64)
    packed = Buffer(pack_address(address))
    san.server.ask("puppet_serve_bytes", listener, ord("x"), 2000)
    answer = san.client.raw("puppet_ask_bytes", packed, 16, 2000, Buffer(bytes(1024)))
    assert answer.result == 2000
    assert san.server.answer("serve").result == 2000
    assert len(os.listdir(f"/proc/{san.client.pid}/fd")) < 20
    assert socket.socket().close() is None


def test_limit_below_the_socket(san: World) -> None:
    """X6, S7: a socket of which a duplicate is above a limit that came later connects by TCP: no companion could take
    that number. The server sees one connection."""
    listener, address = san.listener()
    actor = limited(san, "lowered", "client", (1024, 4096))
    for above, limit in ((False, 60), (True, 40)):
        fd = actor.socket()
        copy = actor.fcntl(fd, 0, 50)
        low, high = sorted((fd, copy))
        resource.prlimit(actor.pid, resource.RLIMIT_NOFILE, (limit, 4096))
        assert actor.connect(low, address) == 0
        assert bool(companion_name(actor, high)) is not above
        accepted, _ = san.server.accept(listener)
        actor.send(high, b"x")
        assert san.server.recv(accepted, 5) == b"x"
        assert san.server.poll([(listener, 1)])[0] == 0
        actor.close(copy)
        actor.close(fd)
        resource.prlimit(actor.pid, resource.RLIMIT_NOFILE, (1024, 4096))
