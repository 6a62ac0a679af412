"""Inputs to begin with, made by the product's own writers and this machine's kernel: a function for each target."""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from interposer.config.compile import compile_policy
from interposer.config.parse import read_policy

POLICIES = (
    "version = 1\n",
    'version = 1\n[defaults]\nengine = "off"\n[[rule]]\nremote = "10.0.0.0/8"\nrole = "connect"\nuse = "tcp"\n',
    'version = 1\n[defaults]\notherwise = "error"\nengine = "reactive"\n',
    """version = 1
[defaults]
engine = "helper"
[[rule]]
role = "listen"
use = "python:fuzz_policy:decide"
[[rule]]
role = "connect"
remote = "127.0.0.0/8:6379"
use = "tcp"
[[rule]]
role = "connect"
remote = "[::1]:80-90"
use = "unix"
[[process]]
exe = "redis-*"
user = "root"
env = "HOME=*"
[[process.rule]]
remote = "10.0.0.0/8:1-65535"
role = "connect"
use = "python:fuzz_policy:decide"
""",
)
QUESTIONS = 64


def table() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as place:
        Path(place, "fuzz_policy.py").write_text("def decide(request): ...\n")
        for number, text in enumerate(POLICIES):
            file = Path(place, f"policy-{number}.toml")
            file.write_text(text)
            policy, errors, _ = read_policy([str(file)])
            assert not errors, errors
            data = compile_policy(
                policy,
                libpython="/usr/lib/libpython3.11.so",
                python_home="/usr",
                search_path=["/usr/lib/python3.11"],
                engine_module="/opt/engine.so",
                helper="interposer-helper/0/x",
                key="k",
            )
            for first in (0, 5, 12, 31):
                yield bytes([first]).ljust(QUESTIONS, b"\x01") + data


def helper() -> Iterator[bytes]:
    good = struct.pack("=IIQBB4BHIIIII", 3, 0, 1, 2, 1, 1, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0, 0)
    for fate in (5, 7, 101, 203):
        yield bytes([1, 1, 9, 0, 9, 9]) + bytes([9]) * 10 + bytes([fate]) + good
        yield bytes([9] * 17 + [fate]) + good


def names() -> Iterator[bytes]:
    texts = (
        "C/127.0.0.1:50000/127.0.0.1:80",
        "L/127.0.0.1:80/0",
        "D/" + "0" * 32 + ":80/63",
        "C/fe80" + "0" * 27 + "1%2:50000/" + "0" * 31 + "1:80",
    )
    for one in texts:
        name = struct.pack("=H", socket.AF_UNIX) + b"\0san1/" + one.encode()
        yield name
        for other in texts:
            second = struct.pack("=H", socket.AF_UNIX) + b"\0san1/" + other.encode()
            yield bytes([len(name)]) + name + bytes([len(second)]) + second
    yield struct.pack("=HH4s8x", socket.AF_INET, socket.htons(80), bytes([127, 0, 0, 1]))
    yield struct.pack("=HHI16sI", socket.AF_INET6, socket.htons(80), 0, bytes(16), 1)


def fdinfo() -> Iterator[bytes]:
    with select.epoll() as outer, socket.socket() as one:
        outer.register(one, select.EPOLLIN)
        outer.register(0, select.EPOLLOUT | select.EPOLLONESHOT) if os.isatty(0) else None
        text = Path(f"/proc/self/fdinfo/{outer.fileno()}").read_bytes()
    for piece in (0, 1, 7, 100):
        yield bytes([piece]) + text
        yield bytes([piece]) + text.replace(b"tfd:        ", b"tfd:        5 x") * 60


def netlink() -> Iterator[bytes]:
    def ask(protocol: int, request: bytes) -> bytes:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as link:
            link.send(request)
            return link.recv(4096)

    def message(kind: int, flags: int, body: bytes, number: int = 0) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body

    route = struct.pack("=8BI", socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0) + struct.pack("=HH4B", 8, 1, 127, 0, 0, 1)
    addresses = message(22, 0x301, struct.pack("=4BI", 0, 0, 0, 0, 0), 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = struct.pack("!H", listener.getsockname()[1])
        body = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0xFF, 0, 0xFFFFFFFF)
        body += port + bytes(2) + bytes([127, 0, 0, 1]) + bytes(28) + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
        answers = (
            (0, [ask(0, message(26, 1, route))]),
            (1, [ask(4, message(20, 1, body))]),
            (2, [ask(0, addresses), ask(0, addresses)]),
            (3, [ask(0, addresses)]),
        )
    for mode, parts in answers:
        for family in (0, 1):
            yield bytes([mode << 1 | family]) + b"".join(struct.pack("=H", len(part)) + part for part in parts)


def rules() -> Iterator[bytes]:
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def chain(family: int, hook: int, kind: bytes, policy: int, use: int) -> bytes:
        hooked = attribute(1, struct.pack("!I", hook)) + attribute(2, struct.pack("!I", 0))
        body = struct.pack("=BBH", family, 0, 0) + attribute(1, b"table\0") + attribute(3, b"chain\0")
        body += attribute(0x8004, hooked) + attribute(5, struct.pack("!I", policy)) + attribute(7, kind + b"\0")
        body += attribute(6, struct.pack("!I", use))
        return struct.pack("=IHHII", 16 + len(body), 10 << 8 | 3, 2, 0, 0) + body

    done = struct.pack("=IHHIIi", 20, 3, 2, 0, 0, 0)
    generation = struct.pack("=IHHII", 28, 10 << 8 | 15, 0, 0, 0) + bytes(4) + attribute(1, struct.pack("!I", 7))
    chains = chain(1, 3, b"filter", 1, 2) + chain(2, 3, b"nat", 1, 1) + chain(10, 2, b"filter", 0, 0) + done
    for mode, part in ((1, chains), (0, generation)):
        yield bytes([mode]) + struct.pack("=H", len(part)) + part


def ports() -> Iterator[bytes]:
    yield from (b"32768\t60999\n", b"8080,9000-9010\n", b"1-65535,3\n", b"")


def maps() -> Iterator[bytes]:
    line = b"7ffd12300000-7ffd12400000 rw-p 00000000 00:00 0    [stack]\n"
    text = Path("/proc/self/maps").read_bytes()[:3000] + line
    for piece in (0, 1, 50):
        yield bytes([piece]) + text
        yield bytes([piece]) + b"Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"


def facts() -> Iterator[bytes]:
    texts = (b"redis-*", b"HOME=*", b"/user.slice/*", b"?*?*a", b"")
    for text in texts:
        files = b"redis-server\n0::/user.slice/x\n1:name=a:/b\nredis\0--port\0\0007000\0"
        yield b"HOME=/root\0PATH=/bin\0A" + b"\xff" + text + b"\xff" + files


def filter() -> Iterator[bytes]:
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, 0), (0x20, 0, 0, 0), (0x15, 0, 1, 41)]
    steps += [(0x06, 0, 0, 0x50001), (0x34, 0, 0, 0), (0x61, 0, 0, 3), (0x1D, 2, 1, 0), (0x16, 0, 0, 0)]
    steps += [(0x06, 0, 0, 0x7FFF0000)]
    for count in range(1, len(steps) + 1):
        yield b"".join(struct.pack("=HBBI", *step) for step in steps[:count])


def stats() -> Iterator[bytes]:
    for order in (0, 1, 2, 3, 6, 14):
        yield b"".join(
            struct.pack("=BHH", call, fd, fd + 1) + (bytes([fd]) * 8 if call % 8 > 5 else b"")
            for fd in range(4)
            for call in (0, order, 2, 1)
        )


ALL: dict[str, Callable[[], Iterator[bytes]]] = {
    each.__name__: each for each in (table, helper, names, fdinfo, netlink, rules, ports, maps, facts, filter, stats)
}


def write(target: str, place: Path) -> None:
    """The seeds of a target, a file each."""
    place.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(ALL[target]()):
        (place / f"seed-{number}").write_bytes(data)
