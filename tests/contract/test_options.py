from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest
from puppet import Actor, Argument, Buffer
from world import World, companion_name

SOL, TCP, IP, IPV6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
READ_ONLY = [(SOL, 3), (SOL, 38), (SOL, 39), (SOL, socket.SO_ACCEPTCONN), (SOL, socket.SO_ERROR)]
SETTABLE = {
    "nodelay": (TCP, socket.TCP_NODELAY, 1),
    "cork": (TCP, socket.TCP_CORK, 1),
    "keepidle": (TCP, socket.TCP_KEEPIDLE, 61),
    "keepintvl": (TCP, socket.TCP_KEEPINTVL, 11),
    "keepcnt": (TCP, socket.TCP_KEEPCNT, 4),
    "user_timeout": (TCP, 18, 9000),
    "syncnt": (TCP, 7, 3),
    "linger2": (TCP, 8, 20),
    "defer_accept": (TCP, 9, 1),
    "notsent_lowat": (TCP, 25, 16384),
    "keepalive": (SOL, socket.SO_KEEPALIVE, 1),
    "reuseaddr": (SOL, socket.SO_REUSEADDR, 1),
    "oobinline": (SOL, 10, 1),
    "reuseport": (SOL, socket.SO_REUSEPORT, 1),
    "sndbuf": (SOL, socket.SO_SNDBUF, 70000),
    "rcvbuf": (SOL, socket.SO_RCVBUF, 70000),
    "rcvlowat": (SOL, socket.SO_RCVLOWAT, 3),
    "priority": (SOL, socket.SO_PRIORITY, 4),
    "broadcast": (SOL, 6, 1),
    "timestamp": (SOL, 29, 1),
    "busy_poll": (SOL, 46, 10),
    "passcred": (SOL, 16, 1),
    "dontroute": (SOL, 5, 1),
    "linger": (SOL, socket.SO_LINGER, struct.pack("=ii", 1, 2)),
    "rcvtimeo": (SOL, 20, struct.pack("=qq", 1, 504000)),
    "sndtimeo": (SOL, 21, struct.pack("=qq", 2, 0)),
    "tos": (IP, socket.IP_TOS, 8),
    "ttl": (IP, socket.IP_TTL, 44),
    "recvtos": (IP, 13, 1),
    "mtu_discover": (IP, 10, 0),
    "pktinfo": (IP, 8, 1),
    "recverr": (IP, 11, 1),
    "freebind": (IP, 15, 1),
    "bind_address_no_port": (IP, 24, 1),
    "congestion": (TCP, 13, b"reno"),
    "max_pacing": (SOL, 47, 1000000),
    "nodefrag": (TCP, 14, b""),
    "thin": (TCP, 16, 1),
    "save_syn": (TCP, 27, 1),
    "inq": (TCP, 36, 1),
    "keepidle_bad": (TCP, 4, 0),
    "keepcnt_bad": (TCP, 6, 128),
    "unknown_tcp": (TCP, 999, 1),
    "unknown_sol": (SOL, 999, 1),
    "unknown_level": (77, 1, 1),
    "short": (TCP, 1, b"\1\0"),
    "empty": (SOL, 9, b""),
    "long": (TCP, 1, bytes([1] + [0] * 15)),
}


GROUPS = {
    "tcp": [
        "nodelay",
        "cork",
        "keepidle",
        "keepintvl",
        "keepcnt",
        "user_timeout",
        "syncnt",
        "linger2",
        "defer_accept",
        "notsent_lowat",
        "congestion",
        "thin",
        "inq",
        "keepalive",
    ],
    "socket": ["oobinline", "reuseport", "sndbuf", "rcvbuf", "linger", "rcvtimeo", "sndtimeo"],
    "shadowed": ["reuseaddr", "priority", "broadcast", "timestamp", "busy_poll", "passcred", "dontroute", "max_pacing"],
    "ip": ["tos", "ttl", "recvtos", "mtu_discover", "pktinfo", "recverr", "freebind"],
    "late port": ["bind_address_no_port"],
    "kept on tcp": ["save_syn", "rcvlowat"],
    "bad": [
        "nodefrag",
        "keepidle_bad",
        "keepcnt_bad",
        "unknown_tcp",
        "unknown_sol",
        "unknown_level",
        "short",
        "empty",
        "long",
    ],
}


def read(actor: Actor, fd: int, level: int, name: int, value: int | bytes) -> None:
    actor.getsockopt(fd, level, name, 4 if isinstance(value, int) else max(len(value), 4))


@pytest.mark.parametrize("group", GROUPS)
def test_before_and_after(world: World, group: str) -> None:
    """S13, T6: options set before connect, after connect, and after accept: the results, and what reads back."""
    client, server = world.client, world.server
    listener, address = world.listener()
    options = [SETTABLE[name] for name in GROUPS[group]]
    for some in (options[:7], options[7:]):
        fd = client.socket()
        for option in some:
            client.setsockopt(fd, *option)
            read(client, fd, *option)
        assert client.connect(fd, address) == 0
        accepted, _ = server.accept(listener)
        if group == "kept on tcp" and some:
            world.tcp_only()
            assert not companion_name(client, fd)
        else:
            world.proves(fd, accepted)
        for option in some:
            read(client, fd, *option)
        for actor, number in ((client, fd), (server, accepted)):
            for option in some:
                actor.setsockopt(number, *option)
                read(actor, number, *option)
        assert client.send(fd, b"12345") == 5
        assert server.recv(accepted, 10) == b"12345"


@pytest.mark.parametrize("group", GROUPS)
def test_inherited(world: World, group: str) -> None:
    """S22, T6: options of the listener, set before listen, read back from what it accepts as from TCP's."""
    server = world.server
    options = [SETTABLE[name] for name in GROUPS[group]]
    for some in (options[:7], options[7:]):
        listener = server.socket()
        for option in some:
            server.setsockopt(listener, *option)
        server.bind(listener, ("127.0.0.1", 0))
        server.listen(listener, 5)
        for option in some:
            read(server, listener, *option)
        if group == "kept on tcp" and some:
            world.tcp_only()
            fd = world.client.socket()
            world.client.connect(fd, server.getsockname(listener))
            accepted, _ = server.accept(listener)
            assert not companion_name(server, accepted)
        else:
            fd, accepted = world.join(listener, server.getsockname(listener))
        for option in some:
            read(server, accepted, *option)
        world.client.send(fd, b"12345")
        assert server.recv(accepted, 10) == b"12345"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_read_only(world: World, family: int) -> None:
    """T6: domain, protocol, type, ACCEPTCONN and ERROR of a listener and of both ends."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    listener, address = world.listener(host=host)
    fd, accepted = world.join(listener, address)
    for actor, number in ((world.server, listener), (world.server, accepted), (world.client, fd)):
        for level, name in READ_ONLY:
            actor.getsockopt(number, level, name)
            actor.setsockopt(number, level, name, 1)


def test_defaults(world: World) -> None:
    """T6: what was never set reads as from a TCP socket."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        for level, name, value in SETTABLE.values():
            if (level, name) not in ((TCP, 13), (SOL, 8), (SOL, 7)):
                read(actor, number, level, name, value)
        buffers = actor.raw("getsockopt", number, SOL, socket.SO_RCVBUF, *_out(4)).memory[0]
        assert struct.unpack("=i", buffers)[0] > 2000


def _out(size: int) -> list[Argument]:
    return [Buffer(bytes(size)), Buffer(struct.pack("=I", size))]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 100])
def test_sizes(world: World, size: int) -> None:
    """T6, T12: getsockopt with little or much room."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        for level, name in (
            (TCP, socket.TCP_NODELAY),
            (SOL, 39),
            (SOL, 38),
            (SOL, 3),
            (SOL, socket.SO_KEEPALIVE),
            (IP, 1),
            (TCP, socket.TCP_KEEPIDLE),
            (TCP, 13),
            (SOL, 20),
            (TCP, 8),
        ):
            actor.getsockopt(number, level, name, size)


def test_bad_buffers(world: World) -> None:
    """T12: NULL pointers and negative lengths."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        for level, name in ((TCP, 1), (SOL, 9), (SOL, 39)):
            actor.call("getsockopt", number, level, name, Buffer(bytes(4)), None)
            actor.call("getsockopt", number, level, name, None, Buffer(struct.pack("=i", 4)))
            actor.call("getsockopt", number, level, name, Buffer(bytes(4)), Buffer(struct.pack("=i", -1)))
            actor.call("setsockopt", number, level, name, None, 4)
            actor.call("setsockopt", number, level, name, Buffer(bytes(4)), -1)


def test_info(world: World) -> None:
    """T6: TCP_INFO says LISTEN of a listener and ESTABLISHED of a connection."""
    listener, address = world.listener()
    fd, accepted = world.join(listener, address)
    for actor, number, state in ((world.server, listener, 10), (world.client, fd, 1), (world.server, accepted, 1)):
        answer = actor.raw("getsockopt", number, TCP, socket.TCP_INFO, *_out(104))
        assert answer.value == 0
        assert answer.memory[0][0] == state
        assert struct.unpack("=I", answer.memory[1])[0] == 104
        actor.getsockopt(number, TCP, socket.TCP_INFO, 1)


@pytest.mark.parametrize(
    ("name", "option"), [("ulp", (TCP, 31, b"tls\0")), ("zerocopy", (SOL, 60, 1)), ("repair", (TCP, 19, 1))]
)
def test_refused_on_companions(world: World, name: str, option: tuple[int, int, int | bytes]) -> None:
    """T6: what a companion cannot do is refused with an errno that makes programs fall back."""
    fd, accepted = world.pair()
    for actor, number in ((world.client, fd), (world.server, accepted)):
        answer = actor.raw("setsockopt", number, option[0], option[1], *_in(option[2]))
        if world.pairing.san:
            assert answer.value in ("ENOENT", "EOPNOTSUPP", "EPERM", "ENOPROTOOPT"), name


def _in(value: int | bytes) -> list[Argument]:
    data = struct.pack("=i", value) if isinstance(value, int) else value
    return [Buffer(data), len(data)]


BEFORE: dict[str, Callable[[Actor, int], object]] = {
    "mark": lambda actor, fd: actor.setsockopt(fd, SOL, 36, 7),
    "bindtodevice": lambda actor, fd: actor.setsockopt(fd, SOL, 25, b"lo\0"),
    "transparent": lambda actor, fd: actor.setsockopt(fd, IP, 19, 1),
}


@pytest.mark.parametrize("name", BEFORE)
def test_stay_on_tcp(world: World, name: str) -> None:
    """X9, S7: a marked, transparent or device-bound socket works, by TCP."""
    world.tcp_only()
    listener, address = world.listener()
    fd = world.client.socket()
    BEFORE[name](world.client, fd)
    assert world.client.connect(fd, address) == 0
    accepted, _ = world.server.accept(listener)
    assert not companion_name(world.client, fd)
    world.client.send(fd, b"x")
    assert world.server.recv(accepted, 5) == b"x"


def test_many_options(world: World) -> None:
    """S13, T6: more options than common programs set all read back."""
    world.tcp_only()
    client, server = world.client, world.server
    listener, address = world.listener()
    fd = client.socket()
    names = [
        "nodelay",
        "keepidle",
        "keepintvl",
        "keepcnt",
        "user_timeout",
        "syncnt",
        "linger2",
        "defer_accept",
        "notsent_lowat",
        "keepalive",
        "reuseaddr",
        "oobinline",
        "rcvlowat",
        "priority",
        "tos",
        "ttl",
        "recvtos",
        "mtu_discover",
        "rcvtimeo",
        "sndtimeo",
        "linger",
    ]
    for name in names:
        client.setsockopt(fd, *SETTABLE[name])
    assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    for name in names:
        read(client, fd, *SETTABLE[name])
    client.setsockopt(fd, SOL, socket.SO_RCVLOWAT, 1)
    server.send(accepted, b"y")
    assert client.recv(fd, 2) == b"y"


def test_v6_options(world: World) -> None:
    """T6: IPv6 options on both ends."""
    fd, accepted = world.pair("::1")
    for actor, number in ((world.client, fd), (world.server, accepted)):
        for name, value in ((67, 16), (16, 9), (49, 1), (socket.IPV6_UNICAST_HOPS, 12)):
            actor.setsockopt(number, IPV6, name, value)
            actor.getsockopt(number, IPV6, name)
        actor.setsockopt(number, IP, socket.IP_TOS, 8)
        actor.getsockopt(number, IP, socket.IP_TOS)
    four, other = world.pair()
    for actor, number in ((world.client, four), (world.server, other)):
        actor.setsockopt(number, IPV6, 67, 16)
        actor.getsockopt(number, IPV6, 67)


def test_error_is_read_once(world: World) -> None:
    """S19, T6: SO_ERROR after the peer reset the connection."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"unread")
    assert server.poll([(accepted, 1)], 2000)[0] == 1
    server.close(accepted)
    assert client.poll([(fd, 1)], 2000)[0] == 1
    assert client.getsockopt(fd, SOL, socket.SO_ERROR) == 104
    assert client.getsockopt(fd, SOL, socket.SO_ERROR) == 0
    client.recv(fd, 5)
