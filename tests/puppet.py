"""Drives programs that make one libc call at a time (tests/hosts/puppet.c), from outside and step by step.

An Actor is a process or a thread. Its methods are named as the calls; they return what the call returned, or the name
of the error ("EAGAIN"), and results that came out through pointers beside it. Everything that a program can observe
also goes to the actor's record, with ports replaced by p1, p2... in the order of their first appearance, so that two
runs can be compared.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANRUN = ROOT / ".venv/bin/sanrun"
HOSTS = ROOT / "tests/hosts"
WAIT = 10.0
"""Seconds that any call may take before it counts as hanging."""
UNTOUCHED = 4242
LONG = {
    "read",
    "readv",
    "recv",
    "recvfrom",
    "recvmsg",
    "write",
    "writev",
    "send",
    "sendto",
    "sendmsg",
    "sendfile",
    "sendfile64",
    "splice",
    "malloc",
    "fdopen",
    "syscall",
    "address",
    "fread",
    "fwrite",
    "__read_chk",
    "__recv_chk",
    "pread",
    "lseek",
}
OPERATIONS = {1: "ADD", 2: "DEL", 3: "MOD"}
FAMILIES = {socket.AF_INET: "inet", socket.AF_INET6: "inet6", socket.AF_UNIX: "unix", 0: "unspec"}

ERRORS = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN"}

Address = tuple[str, int]


class Hangs(AssertionError):
    """A call did not return in time."""


@dataclass(frozen=True)
class Buffer:
    """Memory of the program for one call: `data` goes in, and what stands there afterwards comes out. `pointers` are
    offsets where the address of an earlier argument's memory belongs; `passed` is False for memory that only other
    buffers point to."""

    data: bytes
    pointers: tuple[tuple[int, int], ...] = ()
    passed: bool = True


Argument = int | Buffer | None


@dataclass(frozen=True)
class Answer:
    """What one call returned. `error` is the errno's name, or "" on success."""

    result: int
    error: str
    memory: tuple[bytes, ...]
    pipes: int = 0
    """How many SIGPIPEs the program's handler has seen so far."""

    @property
    def value(self) -> int | str:
        return self.error or self.result


@dataclass(frozen=True)
class Entry:
    """One observation: who, which call, with what, what came out."""

    actor: str
    call: str
    given: str
    seen: str
    fact: Any = field(default=None, compare=False)
    """The value itself, for those who judge differences."""

    def __str__(self) -> str:
        return f"{self.actor}.{self.call}({self.given}) = {self.seen}"

    def portless(self) -> Entry:
        given, seen = (re.sub(r":p\d+", "", text) for text in (self.given, self.seen))
        return replace(self, given=given, seen=seen)


class Coincidence(Exception):
    """A socket of one world got a port that another one has too, or had: the record cannot tell them apart, and the
    same things have other names in the other worlds. Ports are random: it will not happen again."""


@dataclass
class Record:
    """Observations in order."""

    entries: list[Entry] = field(default_factory=list)
    ports: dict[int, str] = field(default_factory=dict)

    def port(self, number: int) -> str:
        if number == 0:
            return "0"
        return self.ports.setdefault(number, f"p{len(self.ports) + 1}")

    def address(self, address: Any) -> str:
        if isinstance(address, tuple):
            return f"{address[0]}:{self.port(address[1])}" + (f"%{address[2]}" if len(address) > 2 else "")
        return str(address)


def pack_address(address: Address) -> bytes:
    host, port = address
    if ":" in host:
        return struct.pack(
            "=HHI16sI", socket.AF_INET6, socket.htons(port), 0, socket.inet_pton(socket.AF_INET6, host), 0
        )
    return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_pton(socket.AF_INET, host))


def unpack_address(data: bytes) -> Any:
    """(host, port), or the family's name and the raw bytes of anything else."""
    if len(data) < 2:
        return data.hex()
    family = struct.unpack_from("=H", data)[0]
    if family == socket.AF_INET and len(data) >= 16:
        return socket.inet_ntop(socket.AF_INET, data[4:8]), socket.ntohs(struct.unpack_from("=H", data, 2)[0])
    if family == socket.AF_INET6 and len(data) >= 28:
        port, _, ip, scope = struct.unpack_from("=HI16sI", data, 2)
        return (socket.inet_ntop(socket.AF_INET6, ip), socket.ntohs(port)) + ((scope,) if scope else ())
    return f"{FAMILIES.get(family, family)}, {len(data)} bytes"


def _encode(name: str, arguments: Sequence[Argument]) -> bytes:
    out = [name.encode() + b"\0", struct.pack("=B", len(arguments))]
    for argument in arguments:
        if isinstance(argument, Buffer):
            out.append(struct.pack("=BI", 1 if argument.passed else 2, len(argument.data)))
            out.append(argument.data)
            out.append(struct.pack("=B", len(argument.pointers)))
            out += [struct.pack("=IB", offset, target) for offset, target in argument.pointers]
        else:
            number = (argument or 0) & (1 << 64) - 1
            out.append(struct.pack("=BQ", 0, number))
    return b"".join(out)


def _decode(name: str, data: bytes) -> Answer:
    result, error, pipes = struct.unpack_from("=qiI", data)
    if error == -1:
        raise LookupError(f"the puppet has no function {name}")
    if name.removeprefix("libc:") not in LONG and not name.startswith("puppet_"):
        result = struct.unpack("=i", struct.pack("=I", result & 0xFFFFFFFF))[0]
    memory, at = [], 16
    while at < len(data):
        length = struct.unpack_from("=I", data, at)[0]
        memory.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    word = ERRORS.get(error, str(error)) if result == -1 else ""
    if result != -1 and error != UNTOUCHED and name not in ("malloc", "fdopen") and not name.startswith("puppet_"):
        word = f"success, but errno became {ERRORS.get(error, error)}"
    return Answer(result, word, tuple(memory), pipes)


class Pending:
    """A call under way."""

    def __init__(self, actor: Actor, name: str, finish: Any) -> None:
        self.actor = actor
        self.name = name
        self._finish = finish

    def blocks(self, seconds: float = 0.06) -> bool:
        """True when the call has not returned after `seconds`."""
        return not select.select([self.actor.channel], [], [], seconds)[0]

    def result(self, seconds: float = WAIT) -> Any:
        return self._finish(self.actor.answer(self.name, seconds))


class Actor:
    """One process or thread of a Stage."""

    def __init__(self, stage: Stage, name: str, side: str, channel: socket.socket, pid: int) -> None:
        self.stage = stage
        self.name = name
        self.side = side
        self.channel = channel
        self.pid = pid
        self.deferred = False
        """Calls return a Pending, so that several actors can make theirs at once."""
        self.pipes: int | None = None
        """SIGPIPEs counted so far, for those who want them in the record."""

    # ---- the protocol

    def answer(self, name: str, seconds: float = WAIT) -> Answer:
        if not select.select([self.channel], [], [], seconds)[0]:
            raise Hangs(f"{self.name}: {name} did not return within {seconds:g} s")
        data = self.channel.recv(1 << 20)
        if not data:
            raise AssertionError(f"{self.name} ended during {name}\n{self.stage.said()}")
        return _decode(name, data)

    def ask(self, name: str, *arguments: Argument) -> None:
        self.channel.send(_encode(name, arguments))

    def raw(self, name: str, *arguments: Argument) -> Answer:
        """A call that leaves no trace in the record."""
        self.ask(name, *arguments)
        return self.answer(name)

    def note(self, call: str, given: str, seen: Any, fact: Any = None) -> None:
        self.stage.record.entries.append(Entry(self.name, call, given, str(seen), seen if fact is None else fact))

    def call(self, name: str, *arguments: Argument) -> int | str:
        """Any function with integers and buffers; only its result is recorded."""
        value = self.raw(name, *arguments).value
        shown = ", ".join(a.data.hex(" ") if isinstance(a, Buffer) else str(a) for a in arguments)
        self.note(name, shown, value)
        return value

    def _start(self, name: str, given: str, arguments: Sequence[Argument], extract: Any = None) -> Pending:
        def finish(answer: Answer) -> Any:
            seen = answer.value if extract is None else extract(answer)
            shown = self.stage.show(seen)
            if self.pipes is not None and answer.pipes != self.pipes:
                shown += f", SIGPIPE {answer.pipes - self.pipes}"
                self.pipes = answer.pipes
            self.note(name, given, shown, seen)
            return seen

        self.ask(name, *arguments)
        return Pending(self, name, finish)

    def _do(self, name: str, given: str, arguments: Sequence[Argument], extract: Any = None) -> Any:
        return self._finished(self._start(name, given, arguments, extract))

    def _finished(self, pending: Pending) -> Any:
        return pending if self.deferred else pending.result()

    # ---- sockets

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> Any:
        return self._do(
            "socket", f"{FAMILIES.get(family, family)}, {int(kind):#x}, {protocol}", [family, kind, protocol]
        )

    def bind(self, fd: int, address: Address) -> Any:
        data = pack_address(address)
        return self._do("bind", f"{fd}, {self.stage.record.address(address)}", [fd, Buffer(data), len(data)])

    def listen(self, fd: int, backlog: int = 16) -> Any:
        return self._do("listen", f"{fd}, {backlog}", [fd, backlog])

    def start_connect(self, fd: int, address: Address) -> Pending:
        data = pack_address(address)
        return self._start("connect", f"{fd}, {self.stage.record.address(address)}", [fd, Buffer(data), len(data)])

    def connect(self, fd: int, address: Address) -> Any:
        return self._finished(self.start_connect(fd, address))

    def disconnect(self, fd: int) -> Any:
        """connect() to AF_UNSPEC."""
        return self._do("connect", f"{fd}, unspec", [fd, Buffer(bytes(16)), 16])

    def start_accept(self, fd: int, flags: int | None = None, room: int = 128) -> Pending:
        buffers = [Buffer(bytes(room)), Buffer(struct.pack("=I", room))]
        if flags is None:
            return self._start("accept", f"{fd}", [fd, *buffers], _with_address)
        return self._start("accept4", f"{fd}, {flags:#x}", [fd, *buffers, flags], _with_address)

    def accept(self, fd: int, flags: int | None = None, room: int = 128) -> Any:
        """(descriptor, peer's address), or the error's name."""
        return self._finished(self.start_accept(fd, flags, room))

    def accept_anonymously(self, fd: int) -> Any:
        return self._do("accept", f"{fd}, NULL", [fd, None, None])

    def getsockname(self, fd: int, room: int = 128) -> Any:
        return self._do(
            "getsockname", f"{fd}, {room}", [fd, Buffer(bytes(room)), Buffer(struct.pack("=I", room))], _address
        )

    def getpeername(self, fd: int, room: int = 128) -> Any:
        return self._do(
            "getpeername", f"{fd}, {room}", [fd, Buffer(bytes(room)), Buffer(struct.pack("=I", room))], _address
        )

    def setsockopt(self, fd: int, level: int, name: int, value: int | bytes) -> Any:
        data = struct.pack("=i", value) if isinstance(value, int) else value
        return self._do(
            "setsockopt", f"{fd}, {level}, {name}, {data.hex()}", [fd, level, name, Buffer(data), len(data)]
        )

    def getsockopt(self, fd: int, level: int, name: int, size: int = 4) -> Any:
        """The value as bytes, or as an integer when it has four."""

        def extract(answer: Answer) -> Any:
            if answer.error:
                return answer.error
            data = answer.memory[0][: struct.unpack("=I", answer.memory[1])[0]]
            return struct.unpack("=i", data)[0] if len(data) == 4 else data

        return self._do(
            "getsockopt",
            f"{fd}, {level}, {name}, {size}",
            [fd, level, name, Buffer(bytes(size)), Buffer(struct.pack("=I", size))],
            extract,
        )

    def shutdown(self, fd: int, how: int) -> Any:
        return self._do("shutdown", f"{fd}, {how}", [fd, how])

    # ---- data

    def send(self, fd: int, data: bytes, flags: int = 0) -> Any:
        return self._do("send", f"{fd}, {_short(data)}, {flags:#x}", [fd, Buffer(data), len(data), flags])

    def write(self, fd: int, data: bytes) -> Any:
        return self._do("write", f"{fd}, {_short(data)}", [fd, Buffer(data), len(data)])

    def sendto(self, fd: int, data: bytes, flags: int, address: Address) -> Any:
        packed = pack_address(address)
        return self._do(
            "sendto",
            f"{fd}, {_short(data)}, {flags:#x}, {self.stage.record.address(address)}",
            [fd, Buffer(data), len(data), flags, Buffer(packed), len(packed)],
        )

    def start_recv(self, fd: int, size: int, flags: int = 0, call: str = "recv") -> Pending:
        arguments: list[Argument] = [fd, Buffer(bytes(size)), size]
        return self._start(call, f"{fd}, {size}, {flags:#x}", arguments + ([flags] if call == "recv" else []), _bytes)

    def recv(self, fd: int, size: int, flags: int = 0) -> Any:
        """The bytes, or the error's name; MSG_TRUNC gives (how many, the untouched buffer)."""
        if flags & socket.MSG_TRUNC:
            return self._do(
                "recv",
                f"{fd}, {size}, {flags:#x}",
                [fd, Buffer(bytes(size)), size, flags],
                lambda answer: answer.error or (answer.result, answer.memory[0]),
            )
        return self._finished(self.start_recv(fd, size, flags))

    def read(self, fd: int, size: int) -> Any:
        return self._finished(self.start_recv(fd, size, 0, "read"))

    def recvfrom(self, fd: int, size: int, flags: int = 0) -> Any:
        """(bytes, length of the address, its buffer)."""

        def extract(answer: Answer) -> Any:
            if answer.error:
                return answer.error
            return answer.memory[0][: answer.result], struct.unpack("=I", answer.memory[2])[0], answer.memory[1]

        return self._do(
            "recvfrom",
            f"{fd}, {size}, {flags:#x}",
            [fd, Buffer(bytes(size)), size, flags, Buffer(b"\xaa" * 16), Buffer(struct.pack("=I", 16))],
            extract,
        )

    def sendmsg(
        self, fd: int, parts: Sequence[bytes], flags: int = 0, address: Address | None = None, control: bytes = b""
    ) -> Any:
        blocks = [Buffer(part, passed=False) for part in parts]
        packed = pack_address(address) if address else b""
        memory = [Buffer(packed, passed=False), Buffer(control, passed=False), *blocks, _vector(parts, 3, passed=False)]
        header = struct.pack("=QIxxxxQQQQIxxxx", 0, len(packed), 0, len(parts), 0, len(control), 0)
        pointers = [(16, len(memory))] + ([(0, 1)] if address else []) + ([(32, 2)] if control else [])
        return self._do(
            "sendmsg",
            f"{fd}, {[_short(part) for part in parts]}, {flags:#x}, "
            f"{self.stage.record.address(address)}, {len(control)} control",
            [fd, *memory, Buffer(header, tuple(pointers)), flags],
        )

    def recvmsg(self, fd: int, sizes: Sequence[int], flags: int = 0, name: int = 0, control: int = 0) -> Any:
        """(bytes, length of the name, length of control, flags) with `name` and `control` bytes offered for them."""
        blocks = [Buffer(bytes(size), passed=False) for size in sizes]
        header = struct.pack("=QIxxxxQQQQIxxxx", 0, name, 0, len(sizes), 0, control, 0)
        arguments: list[Argument] = [
            fd,
            Buffer(bytes(name), passed=False),
            Buffer(bytes(control), passed=False),
            *blocks,
            _vector([bytes(size) for size in sizes], 3, passed=False),
        ]
        pointers = [(16, len(arguments) - 1)] + ([(0, 1)] if name else []) + ([(32, 2)] if control else [])
        arguments += [Buffer(header, tuple(pointers)), flags]

        def extract(answer: Answer) -> Any:
            if answer.error:
                return answer.error
            data = b"".join(answer.memory[2 : 2 + len(sizes)])[: answer.result]
            out = answer.memory[-1]
            return (
                data,
                struct.unpack_from("=I", out, 8)[0],
                struct.unpack_from("=Q", out, 40)[0],
                struct.unpack_from("=I", out, 48)[0],
            )

        return self._do("recvmsg", f"{fd}, {list(sizes)}, {flags:#x}, {name}, {control}", arguments, extract)

    def writev(self, fd: int, parts: Sequence[bytes]) -> Any:
        blocks = [Buffer(part, passed=False) for part in parts]
        return self._do(
            "writev", f"{fd}, {[_short(part) for part in parts]}", [fd, *blocks, _vector(parts, 1), len(parts)]
        )

    def readv(self, fd: int, sizes: Sequence[int]) -> Any:
        blocks = [Buffer(bytes(size), passed=False) for size in sizes]
        return self._do(
            "readv",
            f"{fd}, {list(sizes)}",
            [fd, *blocks, _vector([bytes(size) for size in sizes], 1), len(sizes)],
            lambda answer: answer.error or b"".join(answer.memory[: len(sizes)])[: answer.result],
        )

    # ---- descriptors

    def close(self, fd: int) -> Any:
        return self._do("close", f"{fd}", [fd])

    def dup(self, fd: int) -> Any:
        return self._do("dup", f"{fd}", [fd])

    def dup2(self, fd: int, to: int) -> Any:
        return self._do("dup2", f"{fd}, {to}", [fd, to])

    def dup3(self, fd: int, to: int, flags: int) -> Any:
        return self._do("dup3", f"{fd}, {to}, {flags:#x}", [fd, to, flags])

    def fcntl(self, fd: int, command: int, argument: int = 0) -> Any:
        return self._do("fcntl", f"{fd}, {command}, {argument:#x}", [fd, command, argument])

    def ioctl(self, fd: int, request: int, value: int = 0) -> Any:
        """(result, the integer afterwards), or the error's name."""
        return self._do(
            "ioctl",
            f"{fd}, {request:#x}, {value}",
            [fd, request, Buffer(struct.pack("=i", value))],
            lambda answer: answer.error or (answer.result, struct.unpack("=i", answer.memory[0])[0]),
        )

    # ---- readiness

    def start_poll(self, fds: Sequence[tuple[int, int]], timeout: int = 0, call: str = "poll") -> Pending:
        data = b"".join(struct.pack("=ihh", fd, events, 0) for fd, events in fds)
        last: list[Argument] = [timeout]
        if call == "ppoll":
            last = [
                Buffer(struct.pack("=qq", timeout // 1000, timeout % 1000 * 1000000)) if timeout >= 0 else None,
                None,
            ]

        def extract(answer: Answer) -> Any:
            if answer.error:
                return answer.error
            return answer.result, [
                _events(struct.unpack_from("=h", answer.memory[0], 8 * i + 6)[0], "POLL") for i in range(len(fds))
            ]

        return self._start(
            call,
            f"{[(fd, _events(events, 'POLL')) for fd, events in fds]}, {timeout}",
            [Buffer(data), len(fds), *last],
            extract,
        )

    def poll(self, fds: Sequence[tuple[int, int]] | int, timeout: int = 0, call: str = "poll") -> Any:
        """(count, events of each) or the error's name; a bare descriptor is asked for IN and OUT."""
        if isinstance(fds, int):
            fds = [(fds, select.POLLIN | select.POLLOUT | 0x2000)]
        return self._finished(self.start_poll(fds, timeout, call))

    def start_select(
        self,
        count: int,
        read: Sequence[int] = (),
        write: Sequence[int] = (),
        error: Sequence[int] = (),
        timeout: float | None = 0.0,
        call: str = "select",
    ) -> Pending:
        sets = [Buffer(_fd_set(fds)) for fds in (read, write, error)]
        last: list[Argument] = [None]
        if timeout is not None:
            fraction = int(timeout % 1 * (1e6 if call == "select" else 1e9))
            last = [Buffer(struct.pack("=qq", int(timeout), fraction))]

        def extract(answer: Answer) -> Any:
            return answer.error or (answer.result, *(_members(memory) for memory in answer.memory[:3]))

        return self._start(
            call,
            f"{count}, {list(read)}, {list(write)}, {list(error)}, {timeout}",
            [count, *sets, *last, *([None] if call == "pselect" else [])],
            extract,
        )

    def select(self, *arguments: Any, **options: Any) -> Any:
        return self._finished(self.start_select(*arguments, **options))

    def epoll_create(self) -> Any:
        return self._do("epoll_create1", "0", [0])

    def epoll_ctl(self, epfd: int, operation: int, fd: int, events: int = 0, data: int | None = None) -> Any:
        data = fd if data is None else data
        return self._do(
            "epoll_ctl",
            f"{epfd}, {OPERATIONS.get(operation, operation)}, {fd}, {_events(events, 'EPOLL')}, {data}",
            [epfd, operation, fd, Buffer(struct.pack("=IQ", events & 0xFFFFFFFF, data))],
        )

    def start_epoll_wait(self, epfd: int, timeout: int = 0, room: int = 8) -> Pending:
        def extract(answer: Answer) -> Any:
            if answer.error:
                return answer.error
            return [
                (
                    struct.unpack_from("=Q", answer.memory[0], 12 * i + 4)[0],
                    _events(struct.unpack_from("=I", answer.memory[0], 12 * i)[0], "EPOLL"),
                )
                for i in range(answer.result)
            ]

        return self._start("epoll_wait", f"{epfd}, {timeout}", [epfd, Buffer(bytes(12 * room)), room, timeout], extract)

    def epoll_wait(self, epfd: int, timeout: int = 0, room: int = 8) -> Any:
        """[(data, events)...] or the error's name."""
        return self._finished(self.start_epoll_wait(epfd, timeout, room))

    # ---- processes

    def handle(self, number: int, flags: int = 0) -> None:
        """Installs a handler that counts."""
        assert self.raw("puppet_handle", number, flags).result == 0

    def signals(self) -> int:
        """How often the handler ran since the last look."""
        count = self.raw("puppet_signals").result
        self.note("signals", "", count)
        return count

    def fork(self, name: str) -> Actor:
        pid = self.raw("puppet_fork", _text(name)).result
        assert pid > 0
        return self.stage.enter(name, self.side)

    def thread(self, name: str) -> Actor:
        assert self.raw("puppet_thread", _text(name)).result > 0
        return self.stage.enter(name, self.side)

    def exec(self, name: str, plain: bool = False) -> Actor:
        """This process becomes another program."""
        self.ask("puppet_exec", _text(name), int(plain))
        return self.stage.enter(name, self.side)

    def spawn(self, name: str, plain: bool = False, redirect: tuple[int, int] = (-1, -1)) -> Actor:
        assert self.raw("puppet_spawn", _text(name), int(plain), *redirect).result > 0
        return self.stage.enter(name, self.side)

    def vfork_exec(self, name: str, plain: bool = False) -> Actor:
        assert self.raw("puppet_vfork_exec", _text(name), int(plain)).result > 0
        return self.stage.enter(name, self.side)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Lets a process that the test itself started end by itself, and gives its status, negative for a signal."""
        return self.stage.ended(self)

    def exit(self) -> None:
        """exit(0), by the door that runs destructors."""
        self.ask("exit", 0)
        if not select.select([self.channel], [], [], WAIT)[0] or self.channel.recv(100):
            raise Hangs(f"{self.name} did not exit")


class Stage:
    """A set of actors, their record, and the place where they say hello."""

    def __init__(self, environments: Mapping[str, Mapping[str, str]], program: Path | None = None) -> None:
        """`environments`: one for each side. `program`: instead of the puppet of tests/hosts."""
        self.environments = environments
        self.program = program or puppet()
        self.record = Record()
        self.directory = tempfile.TemporaryDirectory(prefix="puppets-")
        self._path = f"{self.directory.name}/door"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(self._path)
        self._door.listen(64)
        os.chmod(self.directory.name, 0o755)
        os.chmod(self._path, 0o777)
        self._errors = open(f"{self.directory.name}/errors", "w+b")  # noqa: SIM115  it lives as long as the stage
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.actors: list[Actor] = []

    def start(self, name: str, side: str, prefix: Sequence[str] = (), **options: Any) -> Actor:
        """A new process. `prefix`: words before the command, such as a launcher that becomes the program."""
        process = subprocess.Popen(
            [*prefix, self.program, self._path, name],
            env=dict(self.environments[side]),
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            **options,
        )
        self._processes[process.pid] = process
        return self.enter(name, side)

    def enter(self, name: str, side: str) -> Actor:
        if not select.select([self._door], [], [], WAIT)[0]:
            raise Hangs(f"{name} did not start\n{self.said()}")
        channel, _ = self._door.accept()
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
        if not select.select([channel], [], [], WAIT)[0]:
            raise Hangs(f"{name} did not say hello")
        words = channel.recv(200).decode().split()
        assert words[0] == name, words
        actor = Actor(self, name, side, channel, int(words[1]))
        self.actors.append(actor)
        return actor

    def show(self, seen: Any) -> str:
        """A value as it stands in the record."""
        if isinstance(seen, tuple) and len(seen) in (2, 3) and isinstance(seen[0], str) and isinstance(seen[1], int):
            return self.record.address(seen)
        if isinstance(seen, tuple):
            return "(" + ", ".join(self.show(part) for part in seen) + ")"
        if isinstance(seen, bytes):
            return _short(seen)
        return str(seen)

    def said(self) -> str:
        return Path(self._errors.name).read_text(errors="replace")[-3000:]

    def ended(self, actor: Actor) -> int:
        actor.channel.shutdown(socket.SHUT_WR)
        return self._processes[actor.pid].wait(WAIT)

    def close(self) -> str:
        """Ends all, and returns what they wrote to their standard descriptors."""
        for pid in {actor.pid for actor in self.actors}:
            process = self._processes.get(pid)
            with suppress(ProcessLookupError):
                if process is None or process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait(WAIT)
        for actor in self.actors:
            end = time.monotonic() + WAIT
            actor.channel.settimeout(WAIT)
            with suppress(OSError):
                while time.monotonic() < end and actor.channel.recv(1 << 20):
                    pass
            actor.channel.close()
        self._door.close()
        said = self.said()
        self._errors.close()
        self.directory.cleanup()
        return said


@cache
def puppet() -> Path:
    """The built program."""
    return build("puppet", "-rdynamic", "-pthread")


@cache
def build(name: str, *options: str) -> Path:
    """Compiles tests/hosts/NAME.c with a linker line's `options`; the same sources are not compiled twice."""
    source = HOSTS / f"{name}.c"
    output = ROOT / ".build" / "hosts" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists() or output.stat().st_mtime_ns < max(
        source.stat().st_mtime_ns, Path(__file__).stat().st_mtime_ns
    ):
        fresh = output.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o", fresh, source, *options],
            check=True,
            timeout=120,
        )
        fresh.rename(output)
    return output


def plain_environment() -> dict[str, str]:
    """Without a trace of the switch."""
    return {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.startswith("INTERPOSER")
    }


@cache
def switched_environment(*options: str) -> dict[str, str]:
    """What `sanrun OPTIONS` gives to a program: started once for all."""
    run = subprocess.run(
        [SANRUN, *options, "--", "/usr/bin/env", "-0"],
        env=plain_environment(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    environment = dict(word.decode().split("=", 1) for word in run.stdout.split(b"\0") if word)
    assert environment.get("LD_PRELOAD", "").endswith("libinterposer.so"), environment
    return environment


# ---- small things


def _text(words: str) -> Buffer:
    return Buffer(words.encode() + b"\0")


def _short(data: bytes) -> str:
    if len(data) <= 40:
        return repr(data)
    return f"{data[:16]!r}... {len(data)} bytes, {hash_of(data):016x}"


def hash_of(data: bytes) -> int:
    """64-bit FNV-1a, as the puppet computes it."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 & (1 << 64) - 1
    return value


def _address(answer: Answer) -> Any:
    if answer.error:
        return answer.error
    length = struct.unpack("=I", answer.memory[1])[0]
    data = answer.memory[0]
    if length <= len(data):
        return unpack_address(data[:length])
    return f"{data[:2].hex()}... cut, {length} whole"


def _with_address(answer: Answer) -> Any:
    return answer.error or (answer.result, _address(answer))


def _bytes(answer: Answer) -> Any:
    return answer.error or answer.memory[0][: answer.result]


def _vector(parts: Sequence[bytes], first: int, passed: bool = True) -> Buffer:
    """An array of struct iovec over the memory of the arguments from number `first` on."""
    data = b"".join(struct.pack("=QQ", 0, len(part)) for part in parts)
    return Buffer(data, tuple((16 * i, first + i) for i in range(len(parts))), passed)


def _fd_set(fds: Sequence[int]) -> bytes:
    data = bytearray(128)
    for fd in fds:
        data[fd // 8] |= 1 << fd % 8
    return bytes(data)


def _members(data: bytes) -> list[int]:
    return [fd for fd in range(8 * len(data)) if data[fd // 8] >> fd % 8 & 1]


_NAMES = {
    0x1: "IN",
    0x2: "PRI",
    0x4: "OUT",
    0x8: "ERR",
    0x10: "HUP",
    0x20: "NVAL",
    0x40: "RDNORM",
    0x80: "RDBAND",
    0x100: "WRNORM",
    0x200: "WRBAND",
    0x400: "MSG",
    0x2000: "RDHUP",
    1 << 28: "EXCLUSIVE",
    1 << 30: "ONESHOT",
    1 << 31: "ET",
}


def _events(bits: int, prefix: str) -> str:
    del prefix
    return "|".join(name for bit, name in _NAMES.items() if bits & 0xFFFFFFFF & bit) or "0"
