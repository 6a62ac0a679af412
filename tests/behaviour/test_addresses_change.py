"""Addresses that come and go while programs run, in a network name space of the test's own."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from puppet import Actor, Address, Stage, plain_environment
from world import LOOPBACK, World, companion_name

from interposer.diag import addresses, stats

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a network name space")
CLONE_NEWNET = 0x40000000
SECOND = 1.0
SETTLED = 3.0
"""Seconds after which a change that was not followed never will be."""
NOBODY = 65534
LATE = "10.9.0.1", "fd09::1"
ADD = "addr add 10.9.0.1/24 dev d0", "-6 addr add fd09::1/64 dev d0 nodad"
REMOVE = "addr del 10.9.0.1/24 dev d0", "-6 addr del fd09::1/64 dev d0"
libc = ctypes.CDLL(None, use_errno=True)


def ip(*commands: str) -> float:
    """Runs them, and returns the time of the last one's end."""
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, timeout=10)
    return time.monotonic()


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    """The test, and what it starts, in a network name space with a pair of links and a loopback that is down."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    assert libc.unshare(CLONE_NEWNET) == 0
    try:
        ip("link add d0 type veth peer name d1")
        for link in ("d0", "d1"):
            ip(f"link set {link} addrgenmode none", f"link set {link} up")
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


@pytest.fixture
def oracle() -> Iterator[Actor]:
    """A client without the switch."""
    stage = Stage({"plain": plain_environment()})
    yield stage.start("oracle", "plain")
    assert not stage.close()


def attempt(world: World, client: Actor, listener: int, address: Address, bound: bool = False) -> str:
    """ "san", "tcp" or the error of a connection, which carries a byte and is closed at both ends. `bound`: the client
    has its port before it connects."""
    v6 = ":" in address[0]
    fd = client.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    if bound:
        assert client.bind(fd, ("::" if v6 else "0.0.0.0", 0)) == 0
    result = client.connect(fd, address)
    if result == 0:
        result = "san" if companion_name(client, fd) else "tcp"
        accepted, _ = world.server.accept(listener)
        assert client.send(fd, b"x") == 1
        assert world.server.recv(accepted, 1) == b"x"
        assert client.getpeername(fd) == address
        world.server.close(accepted)
    client.close(fd)
    return str(result)


def becomes(want: str, change: float, look: Callable[[], str]) -> None:
    """No look that began more than a second after the change saw anything else."""
    late, seen = 0.0, ""
    while (start := time.monotonic()) < change + SETTLED and (seen := look()) != want:
        late = start - change
    assert seen == want and late < SECOND, f"{seen} instead of {want}, {late:.2f} s after the change"


def nothing_waits(world: World, listener: int) -> None:
    """S23: no client is in any backlog of the listener."""
    assert world.server.poll([(listener, select.POLLIN)]) == (0, ["0"])


def counted(actor: Actor) -> int:
    return stats.process(actor.pid).connections["unix"]


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("wildcard", [True, False], ids=["wildcard", "concrete"])
def test_added_and_removed(san: World, oracle: Actor, wildcard: bool, bound: bool) -> None:
    """S25, S5, S7: programs that run reach an address by the SAN within a second of its coming, and after its going get
    TCP's error and no companion; so do they when it comes again. The listener is on the wildcard, or on the address."""
    ip("link set lo up", *([] if wildcard else ADD))
    port = 8000
    hosts = ("::",) if wildcard else LATE
    listeners = [san.listener(host=host, port=port)[0] for host in hosts]
    home, _ = san.listener(port=port + 1)
    assert attempt(san, san.client, home, (LOOPBACK, port + 1)) == "san"
    targets = [(listeners[-1 if ":" in host else 0], (host, port)) for host in LATE]
    outcomes = ["san", "ENETUNREACH", "san"] if not wildcard else ["ENETUNREACH", "san", "ENETUNREACH", "san"]
    for number, want in enumerate(outcomes):
        change = ip(*(ADD if want == "san" else REMOVE)) if number else time.monotonic()
        for listener, address in targets:
            becomes(want, change, partial(attempt, san, san.client, listener, address, bound))
            before = counted(san.client), counted(san.server)
            for _ in range(3):
                assert attempt(san, san.client, listener, address, bound) == want
            expected = 3 if want == "san" else 0
            assert (counted(san.client) - before[0], counted(san.server) - before[1]) == (expected, expected)
            assert attempt(san, oracle, listener, address) == want.replace("san", "tcp")
            nothing_waits(san, listener)
    assert set(stats.process(san.client.pid).reasons) == {"OTHER_MACHINE"}
    assert attempt(san, san.client, home, (LOOPBACK, port + 1)) == "san"


def test_link_down_and_up(san: World, oracle: Actor) -> None:
    """S25: where TCP still reaches the address of a link that is down, so does the SAN; where it does not, neither."""
    ip("link set lo up", *ADD)
    listener, (_, port) = san.listener(host="::")
    for command in ("link set d0 down", "link set d0 up"):
        change = ip(command)
        for host in LATE:
            want = attempt(san, oracle, listener, (host, port)).replace("tcp", "san")
            becomes(want, change, partial(attempt, san, san.client, listener, (host, port)))
    assert {want, attempt(san, san.client, listener, (LATE[0], port))} == {"ENETUNREACH", "san"}


def test_loopback_down_and_up(san: World, oracle: Actor) -> None:
    """S25, S7: while the loopback is down TCP reaches nothing on this machine, and the SAN does not either."""
    ip("link set lo up")
    listener, address = san.listener(host="0.0.0.0")
    address = LOOPBACK, address[1]

    def outcome(client: Actor) -> str:
        fd = client.socket(kind=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        assert client.connect(fd, address) == "EINPROGRESS"
        connected = client.poll([(fd, select.POLLOUT)], 30) == (1, ["OUT"])
        if connected:
            san.server.close(san.server.accept(listener)[0])
        client.close(fd)
        return "connected" if connected else "waits"

    assert outcome(san.client) == outcome(oracle) == "connected"
    change = ip("link set lo down")
    becomes("waits", change, lambda: outcome(san.client))
    assert outcome(oracle) == "waits"
    nothing_waits(san, listener)
    assert stats.process(san.client.pid).reasons["NOT_SERVED"] >= 1
    change = ip("link set lo up")
    becomes("san", change, lambda: attempt(san, san.client, listener, address))


def test_listener_older_than_all_addresses(san: World) -> None:
    """S5, S25: a server that is started before the machine has any address is on the SAN when it has."""
    listeners = {host: san.listener(host=host, port=8000 + number)[0] for number, host in enumerate(("0.0.0.0", "::"))}
    change = ip("link set lo up", *ADD)
    for host, listener in listeners.items():
        port = san.server.getsockname(listener)[1]
        for to in (LOOPBACK, LATE[0], *(["::1", LATE[1]] if ":" in host else [])):
            becomes("san", change, partial(attempt, san, san.client, listener, (to, port)))


def test_local_by_a_route_alone(san: World) -> None:
    """S25: so is a whole net that is local by a route, while it is."""
    ip("link set lo up")
    listener, (_, port) = san.listener(host="0.0.0.0")
    for want, command in (("san", "add"), ("ENETUNREACH", "del")):
        change = ip(f"route {command} local 10.7.0.0/16 dev lo")
        becomes(want, change, lambda: attempt(san, san.client, listener, ("10.7.1.2", port)))


def test_gone_for_one_is_not_gone_for_all(san: World) -> None:
    """S25, O1: a connection that fails because its address has just gone does not keep others off the SAN."""
    ip("link set lo up", *ADD)
    listener, (_, port) = san.listener(host="::")
    assert attempt(san, san.client, listener, (LATE[0], port)) == "san"
    ip(*REMOVE)
    assert attempt(san, san.client, listener, (LATE[0], port)) != "san"
    assert stats.process(san.client.pid).reasons == {"OTHER_MACHINE": 1}
    assert attempt(san, san.client, listener, (LOOPBACK, port)) == "san"


def test_server_that_did_not_know_the_address(san: World) -> None:
    """S25, X2: a server that has just learnt that an address is another machine's does not turn a client away, who
    comes from there a moment after the address has come here."""
    ip("link set lo up")
    listener, (_, port) = san.listener(host="0.0.0.0")
    assert san.client.raw("setresuid", NOBODY, NOBODY, NOBODY).result == 0
    assert attempt(san, san.client, listener, (LOOPBACK, port)) == "san"
    fd = san.server.socket()
    assert san.server.connect(fd, (LATE[0], port)) == "ENETUNREACH"
    ip(*ADD)
    assert attempt(san, san.client, listener, (LATE[0], port)) == "san"


def test_sockets_of_the_name_space_before(san: World) -> None:
    """X9: a process that has connected and then goes to another name space finds the companions there."""
    ip("link set lo up")
    listener, address = san.listener()
    assert attempt(san, san.client, listener, address) == "san"
    assert san.client.raw("unshare", CLONE_NEWNET).value == 0
    subprocess.run(["nsenter", f"--net=/proc/{san.client.pid}/ns/net", "ip", "link", "set", "lo", "up"], check=True)
    there, (_, port) = san.listener(san.client)
    fd = san.client.socket()
    assert san.client.connect(fd, (LOOPBACK, port)) == 0
    accepted, _ = san.client.accept(there)
    assert san.client.send(fd, b"there") == 5 and san.client.recv(accepted, 9) == b"there"
    assert counted(san.client) == 3


def test_command_line_follows() -> None:
    """S25, O2: what `sanctl addresses` shows is the kernel's answer of now."""

    def shown() -> set[str]:
        return {str(entry.subnet.address.ip) for entry in addresses.table().entries if entry.providers == ("unix",)}

    ip("link set lo up")
    assert shown() == {LOOPBACK, "::1"}
    ip(*ADD)
    assert shown() == {LOOPBACK, "::1", *LATE}
    ip(*REMOVE)
    assert shown() == {LOOPBACK, "::1"}
