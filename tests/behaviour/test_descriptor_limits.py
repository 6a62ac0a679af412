"""A program that uses all its descriptors has as many as without the switch, and what it has goes on working."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Callable

import pytest
from puppet import Actor, Buffer, build, plain_environment, switched_environment
from world import World, companion_name

LIMITS = {"room above": (200, 4096), "no room above": (200, 200)}
PATH = Buffer(b"/dev/null\0")
PAIR = Buffer(bytes(8))
MAKERS: dict[str, Callable[[Actor], int]] = {
    "dup": lambda actor: actor.raw("dup", 2).result,
    "fcntl": lambda actor: actor.raw("fcntl", 2, 0, 0).result,
    "socket": lambda actor: actor.raw("socket", socket.AF_INET, socket.SOCK_STREAM, 0).result,
    "unix socket": lambda actor: actor.raw("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0).result,
    "open": lambda actor: actor.raw("open", PATH, 0, 0).result,
    "open, fortified": lambda actor: actor.raw("__open64_2", PATH, 0).result,
    "creat": lambda actor: actor.raw("creat", PATH, 0o600).result,
    "tmpfile": lambda actor: -(not actor.raw("tmpfile").result),
    "openat": lambda actor: actor.raw("openat64", -100, PATH, 0, 0).result,
    "epoll": lambda actor: actor.raw("epoll_create1", 0).result,
    "eventfd": lambda actor: actor.raw("eventfd", 0, 0).result,
    "memfd": lambda actor: actor.raw("memfd_create", PATH, 0).result,
    "timer": lambda actor: actor.raw("timerfd_create", 1, 0).result,
    "pipe": lambda actor: actor.raw("pipe", PAIR).result,
    "socketpair": lambda actor: actor.raw("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, PAIR).result,
    "fopen": lambda actor: -(not actor.raw("fopen", PATH, Buffer(b"r\0")).result),
    "opendir": lambda actor: -(not actor.raw("opendir", Buffer(b"/\0")).result),
}


def limited(world: World, name: str, side: str, limits: tuple[int, int]) -> Actor:
    return world.stage.start(name, side, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))


def fill(actor: Actor, maker: Callable[[Actor], int]) -> int:
    """Makes descriptors until no number is free, and gives how many the program could make."""
    count = 0
    while maker(actor) >= 0:
        count += 1
        assert count < 1000
    return count


def use_sockets(world: World, actor: Actor, port: int) -> tuple[list[tuple[int, int]], int, int]:
    """Six connections to a server, a listener that was polled and one in an epoll: all that has hidden descriptors."""
    pairs = []
    for _ in range(6):
        fd = actor.socket()
        assert actor.connect(fd, ("127.0.0.1", port)) == 0
        pairs.append((fd, world.server.accept(3)[0]))
    listeners = []
    for _ in range(2):
        fd = actor.socket()
        assert actor.bind(fd, ("127.0.0.1", 0)) == 0
        assert actor.listen(fd, 5) == 0
        listeners.append(fd)
    assert actor.poll([(listeners[0], 1)])[0] == 0
    epfd = actor.epoll_create()
    assert actor.epoll_ctl(epfd, 1, listeners[1], 1) == 0
    return pairs, listeners[0], listeners[1]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("limits", LIMITS)
def test_as_many_as_without(san: World, limits: str, maker: str) -> None:
    """X6: with connections, listeners and epolls the program can make as many descriptors of each kind as without the
    switch; its connections and listeners go on."""
    san.stage.environments = {**san.stage.environments, "plain": {"PATH": "/bin"}}
    listener, (_, port) = san.listener(backlog=64)
    assert listener == 3
    counts = {}
    for name, side in (("plain", "plain"), ("switched", "client")):
        actor = limited(san, name, side, LIMITS[limits])
        pairs, polled, watched = use_sockets(san, actor, port)
        if side == "client":
            assert all(companion_name(actor, fd) for fd, _ in pairs), san.counted(actor)
        counts[name] = fill(actor, MAKERS[maker])
        for fd, accepted in pairs:
            actor.send(fd, b"out")
            assert san.server.recv(accepted, 5) == b"out"
            san.server.send(accepted, b"in")
            assert actor.recv(fd, 5) == b"in"
        for number in (polled, watched):  # both are still served
            to = actor.getsockname(number)
            client = san.server.socket()
            assert san.server.connect(client, to) == 0
            assert actor.poll([(number, 1)], 2000)[0] == 1
            assert actor.accept(number) == "EMFILE"
            actor.raw("close", 100)
            accepted, _ = actor.accept(number)
            san.server.send(client, b"x")
            assert actor.recv(accepted, 5) == b"x"
            assert fill(actor, MAKERS["dup"]) == 0
            actor.close(accepted)
            assert MAKERS["dup"](actor) == accepted
            san.server.close(client)
        actor.exit()
    assert counts["switched"] == counts["plain"]


@pytest.mark.parametrize("limits", LIMITS)
def test_accepts_as_many(san: World, limits: str) -> None:
    """X6: a program that has sockets can accept as many AF_UNIX connections as without the switch."""
    _, (_, port) = san.listener(backlog=64)
    san.stage.environments = {**san.stage.environments, "plain": {"PATH": "/bin"}}
    counts = {}
    for name, side in (("plain", "plain"), ("switched", "client")):
        actor = limited(san, name, side, LIMITS[limits])
        use_sockets(san, actor, port)
        fd = actor.raw("socket", socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0).result
        address = f"\0limits-{actor.pid}"
        assert actor.raw("bind", fd, Buffer(b"\1\0" + address.encode()), 2 + len(address)).value == 0
        assert actor.raw("listen", fd, 256).value == 0
        clients = [socket.socket(socket.AF_UNIX) for _ in range(220)]
        try:
            for client in clients:
                client.connect(address)
            counts[name] = fill(actor, lambda actor, fd=fd: actor.raw("accept", fd, None, None).result)  # type: ignore[misc]
        finally:
            for client in clients:
                client.close()
        actor.exit()
    assert 100 < counts["switched"] == counts["plain"]


def test_numbers_of_its_own_choice(san: World) -> None:
    """X6: dup2() puts a descriptor at any number below the limit, whatever is hidden there."""
    _, (_, port) = san.listener(backlog=64)
    actor = limited(san, "chooser", "client", (200, 200))
    pairs, *_ = use_sockets(san, actor, port)
    assert all(companion_name(actor, fd) for fd, _ in pairs)
    assert actor.raw("dup2", 100, 199).value == "EBADF"
    for number in range(100, 200):
        assert actor.raw("dup2", 2, number).result == number
    assert actor.raw("dup2", 2, 200).value == "EBADF"
    for fd, accepted in pairs:
        actor.send(fd, b"out")
        assert san.server.recv(accepted, 5) == b"out"


@pytest.mark.parametrize("limits", LIMITS)
def test_back_on_the_san(san: World, limits: str) -> None:
    """X6: when the program has closed some, its next connections and listeners are on the SAN again."""
    listener, address = san.listener(backlog=64)
    actor = limited(san, "full", "client", LIMITS[limits])
    use_sockets(san, actor, address[1])
    fill(actor, MAKERS["open"])
    for number in range(100, 160):
        actor.raw("close", number)
    fd = actor.socket()
    assert actor.connect(fd, address) == 0
    assert companion_name(actor, fd), san.counted(actor)
    accepted, _ = san.server.accept(listener)
    actor.send(fd, b"x")
    assert san.server.recv(accepted, 5) == b"x"


def test_a_hang_up_not_asked_for(san: World) -> None:
    """X6, T2: with no descriptor free, poll() that asks for neither direction waits out its time after a close."""
    listener, address = san.listener()
    actor = limited(san, "full", "client", (200, 200))
    fd = actor.socket()
    assert actor.connect(fd, address) == 0
    accepted, _ = san.server.accept(listener)
    assert companion_name(actor, fd)
    fill(actor, MAKERS["open"])
    san.server.close(accepted)
    for call in ("poll", "ppoll"):
        assert actor.poll([(fd, 0)], 50, call) == (0, ["0"])


def test_nobody_waits_in_vain(san: World) -> None:
    """X6, S23: a client that waits at a listener which runs out of descriptors is accepted as soon as there is one."""
    actor = limited(san, "busy", "client", (200, 200))
    fd = actor.socket()
    actor.bind(fd, ("127.0.0.1", 0))
    actor.listen(fd, 5)
    client = san.server.socket()
    assert san.server.connect(client, actor.getsockname(fd)) == 0
    assert companion_name(san.server, client)
    fill(actor, MAKERS["open"])
    assert actor.accept(fd) == "EMFILE"
    actor.raw("close", 100)
    accepted, _ = actor.accept(fd)
    assert accepted == 100
    san.server.send(client, b"served")
    assert actor.recv(accepted, 10) == b"served"


@pytest.mark.parametrize("way", ["posix_spawn", "vfork", "clone", "fork"])
def test_limit_of_a_child(way: str) -> None:
    """X6, X8: a process that one thread starts while another connects has the program's limit of open files, which is
    raised for a moment to place a hidden descriptor."""
    command = [build("start_race", "-pthread"), way]
    run = subprocess.run(command, env=switched_environment(), capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "0\n"), run.stderr


@pytest.mark.parametrize("spare", [0, 100_000, 1_000_000])
def test_memory_runs_out(spare: int) -> None:
    """X6, S7, T12: in an address space that cannot grow connections and listeners work, by TCP or known by their names
    alone where not by the SAN, errno is kept, and no descriptor is lost."""
    run = subprocess.run(
        [build("no_memory"), "300", str(spare)], env=switched_environment(), capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    words = run.stdout.split()
    assert words[:5] == ["begins", "300", "rounds,", "300", "kept,"]
    assert 300 <= int(words[5]) <= 300 + 150 + 8  # a parked socket for each connection


@pytest.mark.skipif(os.geteuid() != 0, reason="a network name space of its own needs root")
def test_ports_run_out() -> None:
    """X6: with thirty ports for the whole machine a program gets at least as far as by TCP."""
    few = "ip link set lo up; echo 40000 40029 > /proc/sys/net/ipv4/ip_local_port_range; exec "
    done = {}
    for name, environment in (("tcp", plain_environment()), ("san", switched_environment())):
        command = ["unshare", "-n", "sh", "-c", f"{few}{build('no_memory')} 60 1000000000"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert run.stderr == ""
        done[name] = next(int(word) for word in run.stdout.replace(":", "").split() if word.isdigit())
    assert 10 < done["tcp"] <= done["san"], done
