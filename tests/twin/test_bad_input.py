from __future__ import annotations

import signal
import socket
import struct

import pytest
from puppet import Actor, Argument, Buffer, pack_address
from world import LOOPBACK, World

WILD = {"null": 0, "low": 8, "page": 4096, "nowhere": 0x7FFF00000000 - 4096, "kernel": -4096, "odd": 0x800000000000}
"""Pointers to no memory of the program's."""
NAME = struct.pack("=I", 16)
VECTOR = struct.pack("=QQ", 0, 4)


def calls(fd: int, wild: int) -> list[tuple[str, list[Argument]]]:
    """Every socket call with a wild pointer at each place that takes one."""
    header = Buffer(struct.pack("=QIxxxxQQQQIxxxx", 0, 0, wild & (1 << 64) - 1, 1, 0, 0, 0))
    named = Buffer(struct.pack("=QIxxxxQQQQIxxxx", wild & (1 << 64) - 1, 16, 0, 0, 0, 0, 0))
    return [
        ("bind", [fd, wild, 16]),
        ("connect", [fd, wild, 16]),
        ("connect", [fd, wild, 0]),
        ("accept", [fd, wild, Buffer(NAME)]),
        ("accept4", [fd, Buffer(bytes(16)), wild, 0]),
        ("getsockname", [fd, wild, Buffer(NAME)]),
        ("getsockname", [fd, Buffer(bytes(16)), wild]),
        ("getpeername", [fd, wild, Buffer(NAME)]),
        ("getpeername", [fd, Buffer(bytes(16)), wild]),
        ("setsockopt", [fd, socket.SOL_SOCKET, socket.SO_KEEPALIVE, wild, 4]),
        ("setsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, wild, 4]),
        ("setsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_CONGESTION, wild, 4]),
        ("getsockopt", [fd, socket.SOL_SOCKET, socket.SO_KEEPALIVE, wild, Buffer(NAME)]),
        ("getsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, wild, Buffer(NAME)]),
        ("getsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, Buffer(bytes(16)), wild]),
        ("send", [fd, wild, 4, socket.MSG_NOSIGNAL]),
        ("write", [fd, wild, 4]),
        ("writev", [fd, wild, 1]),
        ("sendto", [fd, Buffer(b"data"), 4, socket.MSG_NOSIGNAL, wild, 16]),
        ("sendmsg", [fd, wild, socket.MSG_NOSIGNAL]),
        ("sendmsg", [fd, header, socket.MSG_NOSIGNAL]),
        ("sendmsg", [fd, named, socket.MSG_NOSIGNAL]),
        ("sendmmsg", [fd, wild, 1, socket.MSG_NOSIGNAL]),
        ("recv", [fd, wild, 4, socket.MSG_DONTWAIT]),
        ("readv", [fd, wild, 1]),
        ("recvfrom", [fd, wild, 4, socket.MSG_DONTWAIT, None, None]),
        ("recvfrom", [fd, Buffer(bytes(4)), 4, socket.MSG_DONTWAIT, wild, Buffer(NAME)]),
        ("recvfrom", [fd, Buffer(bytes(4)), 4, socket.MSG_DONTWAIT, Buffer(bytes(16)), wild]),
        ("recvmsg", [fd, wild, socket.MSG_DONTWAIT]),
        ("recvmsg", [fd, header, socket.MSG_DONTWAIT]),
        ("recvmmsg", [fd, wild, 1, socket.MSG_DONTWAIT, None]),
        ("ioctl", [fd, 0x541B, wild]),
        ("ioctl", [fd, 0x5421, wild]),
        ("poll", [wild, 1, 0]),
        ("ppoll", [wild, 1, Buffer(bytes(16)), None]),
        ("select", [fd + 1, wild, None, None, Buffer(bytes(16))]),
        ("epoll_ctl", [fd, 1, fd, wild]),
        ("setsockopt", [fd, socket.SOL_SOCKET, socket.SO_LINGER, wild, 8]),
    ]


def kinds(world: World, actor: Actor, kind: str) -> int:
    """A nonblocking descriptor of one of the kinds of sockets."""
    actor.handle(signal.SIGPIPE)
    if kind == "fresh":
        world.tcp_only()
        return actor.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    if kind == "listener":
        world.tcp_only()
        return world.listener(actor, kind=socket.SOCK_NONBLOCK)[0]
    fd, accepted = world.pair()
    if actor is world.server:
        fd = accepted
    actor.fcntl(fd, 4, 0x800)
    return fd


@pytest.mark.parametrize("kind", ["fresh", "listener", "connection"])
@pytest.mark.parametrize("pointer", WILD)
def test_wild_pointers(world: World, kind: str, pointer: str) -> None:
    """T12: a pointer to no memory gets TCP's errno in every call, and never ends the program."""
    client = world.client
    for number, (name, arguments) in enumerate(calls(0, WILD[pointer])):
        fd = kinds(world, client, kind) if number % 6 == 0 or name == "connect" else fd  # noqa: F821
        arguments = [fd, *arguments[1:]] if arguments[0] == 0 else arguments
        value = client.raw(name, *arguments).value
        client.note(name, f"{number} {pointer}", value)
        if isinstance(value, int) and value > 2 and name.startswith("accept"):
            client.raw("close", value)
    world.proven = True


@pytest.mark.parametrize("kind", ["fresh", "listener", "connection"])
def test_lengths(world: World, kind: str) -> None:
    """T12: negative, huge and tiny lengths."""
    client = world.client
    fd = kinds(world, client, kind)
    address = Buffer(pack_address((LOOPBACK, 9)))
    for length in (-1, 0, 1, 2, 3, 7, 8, 15, 129, 1 << 31, -(1 << 31), 1 << 40):
        size = Buffer(struct.pack("=I", length & 0xFFFFFFFF))
        steps: list[tuple[str, list[Argument]]] = [
            ("bind", [fd, address, length]),
            ("getsockname", [fd, Buffer(bytes(128)), size]),
            ("getpeername", [fd, Buffer(bytes(128)), size]),
            ("accept", [fd, Buffer(bytes(128)), size]),
            ("setsockopt", [fd, socket.SOL_SOCKET, socket.SO_KEEPALIVE, Buffer(bytes(128)), length]),
            ("setsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, Buffer(bytes(128)), length]),
            ("setsockopt", [fd, socket.SOL_SOCKET, socket.SO_LINGER, Buffer(bytes(128)), length]),
            ("getsockopt", [fd, socket.SOL_SOCKET, socket.SO_KEEPALIVE, Buffer(bytes(128)), size]),
            ("getsockopt", [fd, socket.IPPROTO_TCP, socket.TCP_NODELAY, Buffer(bytes(128)), size]),
            ("writev", [fd, Buffer(VECTOR * 4), length if not 0 <= length <= 129 else 0]),
            ("poll", [Buffer(struct.pack("=ihh", fd, 1, 0) * 16), length if not 0 <= length <= 129 else 1, 0]),
        ]
        if kind == "connection":
            steps.append(("connect", [fd, address, length]))
        for name, arguments in steps:
            if name == "bind" and kind == "fresh" and length > 15:
                continue
            answer = client.raw(name, *arguments)
            shown = answer.memory[-1][:4].hex() if name in ("getsockname", "getpeername", "getsockopt") else ""
            if name == "getsockname" and isinstance(answer.value, int):
                shown += "" if length == 0 else answer.memory[0][:2].hex()
            client.note(name, f"{length}", f"{answer.value} {shown}")


def test_descriptors_that_are_none(world: World) -> None:
    """T12: calls on numbers that are no descriptor, and on files that are no socket."""
    client = world.client
    world.tcp_only()
    address = Buffer(pack_address((LOOPBACK, 9)))
    pipe = client.raw("dup", 1).result
    for fd in (-1, -(1 << 31), 1 << 20, (1 << 31) - 1, 77, pipe):
        for name, arguments in (
            ("close", [] if fd == pipe else [fd]),
            ("shutdown", [fd, 2]),
            ("listen", [fd, 5]),
            ("bind", [fd, address, 16]),
            ("connect", [fd, address, 16]),
            ("accept", [fd, None, None]),
            ("getsockname", [fd, Buffer(bytes(16)), Buffer(NAME)]),
            ("getsockopt", [fd, 1, 4, Buffer(bytes(4)), Buffer(NAME)]),
            ("setsockopt", [fd, 1, 9, Buffer(bytes(4)), 4]),
            ("send", [fd, Buffer(b"x"), 1, 0]),
            ("recv", [fd, Buffer(b"x"), 1, 0]),
            ("dup2", [fd, 50] if fd != pipe else []),
            ("dup2", [1, fd] if fd < 0 or fd > 1 << 16 else []),
            ("dup3", [fd, fd, 0]),
            ("fcntl", [fd, 3, 0]),
            ("fcntl", [fd, 0, -1]),
            ("ioctl", [fd, 0x8905, Buffer(bytes(4))]),
            ("epoll_ctl", [fd, 1, fd, Buffer(bytes(12))]),
            ("epoll_wait", [fd, Buffer(bytes(12)), 1, 0]),
        ):
            if arguments:
                client.note(name, f"{fd}", client.raw(name, *arguments).value)


@pytest.mark.parametrize("way", ["each", "close_range", "closefrom"])
def test_closing_what_is_not_its_own(world: World, way: str) -> None:
    """T11: a program that closes every number it does not know goes on, with what it has and with new sockets."""
    client, server = world.client, world.server
    listener, address = world.listener()
    fd, accepted = world.join(listener, address)
    for actor, keep in ((client, fd), (server, accepted)):
        if way == "each":
            actor.call("puppet_close_each", keep + 1, 20000)
        elif way == "close_range":
            actor.call("close_range", keep + 1, (1 << 32) - 1, 0)
        else:
            actor.raw("closefrom", keep + 1)
    assert client.send(fd, b"still") == 5
    assert server.recv(accepted, 10) == b"still"
    assert server.getpeername(accepted) == client.getsockname(fd)
    again = client.socket()
    assert client.connect(again, address) == 0
    taken = server.accept(listener)
    assert taken[1] == client.getsockname(again)
    assert client.send(again, b"new") == 3
    assert server.recv(taken[0], 10) == b"new"
    client.close(fd)
    assert server.recv(accepted, 10) == b""
