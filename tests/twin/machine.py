"""The generator: composes random legal programs over a few sockets in a few processes, and runs each step in all worlds
as it is made, so that what differs is found, and shrunk, by hypothesis."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from lockstep import Difference, Fill, Lockstep, OracleFailed, Step
from model import RDHUP, V6ONLY, Description, End, Model, Process
from puppet import Coincidence

DONTWAIT, PEEK, WAITALL, TRUNC, NOSIGNAL = (
    socket.MSG_DONTWAIT,
    socket.MSG_PEEK,
    socket.MSG_WAITALL,
    socket.MSG_TRUNC,
    socket.MSG_NOSIGNAL,
)
MOST_PROCESSES = 4
MOST_DESCRIPTORS = 8
MOST_UNREAD = 20000
HOSTS = {
    socket.AF_INET: ["127.0.0.1", "0.0.0.0", "127.0.0.2"],
    socket.AF_INET6: ["::1", "::", "::ffff:127.0.0.1"],
}
EVENTS = [select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT | RDHUP, RDHUP, 0, select.EPOLLIN | RDHUP]
MODES = [0, select.EPOLLET, select.EPOLLONESHOT, select.EPOLLET | select.EPOLLONESHOT]
SOL, TCP, IP, IPV6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
OPTIONS: list[tuple[int, int, list[int]]] = [
    (SOL, socket.SO_KEEPALIVE, [0, 1, 7]),
    (SOL, socket.SO_REUSEADDR, [0, 1]),
    (SOL, socket.SO_REUSEPORT, [0, 1]),
    (SOL, socket.SO_BROADCAST, [0, 1]),
    (SOL, socket.SO_OOBINLINE, [0, 1]),
    (SOL, socket.SO_RCVLOWAT, [1]),
    (SOL, socket.SO_PRIORITY, [0, 3, 6]),
    (SOL, socket.SO_TYPE, []),
    (SOL, socket.SO_DOMAIN, []),
    (SOL, socket.SO_PROTOCOL, []),
    (SOL, socket.SO_ACCEPTCONN, []),
    (SOL, socket.SO_ERROR, []),
    (SOL, 46, [0, 50]),  # SO_BUSY_POLL
    (TCP, socket.TCP_NODELAY, [0, 1, 5]),
    (TCP, socket.TCP_KEEPIDLE, [0, 1, 100, 40000]),
    (TCP, socket.TCP_KEEPINTVL, [5, 0]),
    (TCP, socket.TCP_KEEPCNT, [3, 200]),
    (TCP, socket.TCP_USER_TIMEOUT, [0, 3000, -1]),
    (TCP, socket.TCP_SYNCNT, [2, 0]),
    (TCP, socket.TCP_LINGER2, [10, -1]),
    (TCP, 25, [0, 1]),  # TCP_NOTSENT_LOWAT
    (IP, socket.IP_TOS, [0, 0x10, 0x08]),
    (IP, socket.IP_TTL, [64, 1, 0, 300]),
    (IPV6, socket.IPV6_V6ONLY, [0, 1]),
    (IPV6, socket.IPV6_UNICAST_HOPS, [64, -1, 300]),
    (IPV6, socket.IPV6_TCLASS, [0, 32]),
    (SOL, 9999, [1]),
    (TCP, 9999, [1]),
]


class Programs(RuleBasedStateMachine):
    worlds: ClassVar[Lockstep | None] = None
    """Kept over many programs, until one differs."""
    failure: ClassVar[str] = ""
    """The last; hypothesis does not tell one that it cannot repeat."""
    programs: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    carried: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        cls = type(self)
        if cls.worlds is None:
            cls.worlds = Lockstep()
        self.lock = cls.worlds
        self.model = Model()
        self.curious = self.watching = False
        cls.programs += 1

    @initialize(
        data=st.data(), curious=st.booleans(), watching=st.booleans(), connections=st.sampled_from([0, 1, 1, 2])
    )
    def begin(self, data: st.DataObject, curious: bool, watching: bool, connections: int) -> None:
        """Most programs begin with a connection or two."""
        self.curious, self.watching = curious, watching
        if connections:
            self.start(data)
        for _ in range(connections):
            self.meet(data)

    # ---- running

    def step(self, process: Process, call: str, *arguments: Any) -> Any:
        cls = type(self)
        cls.steps += 1
        try:
            try:
                return self.lock.run(Step(process.name, call, arguments))
            except Coincidence:
                return self.lock.again()
        except BaseException as error:
            if not cls.failure:
                print(f"found, and now shrunk: {error}", flush=True)
            cls.failure = str(error)
            if not isinstance(error, Difference) or error.spoilt:
                self.lock.kill()
                cls.worlds = None
            raise

    def told(self, ends: list[End]) -> None:
        """Waits until the other ends have seen what just happened."""
        for end in ends:
            holder = self.model.holder(end)
            if holder is not None:
                events = (RDHUP if end.fin else 0) | (select.POLLHUP if end.reset and not end.odd else 0)
                self.step(holder[0], "arrives", holder[1], end.unread, events)
                self.look(*holder)

    def look(self, process: Process, fd: int) -> None:
        """What a curious program does after everything that happens to a connection."""
        if odd(process.fds[fd]):
            return
        if self.curious:
            self.step(process, "poll", [(fd, select.POLLIN | select.POLLOUT | RDHUP)], 0)
        for epfd, epoll in process.fds.items():
            if self.watching and epoll.kind == "epoll" and not any(odd(each) for each in epoll.watched.values()):
                self.step(process, "epoll_wait", epfd, 0)

    def watch(self, process: Process, fd: int, data: st.DataObject) -> None:
        """Registers a connection with an epoll of its own."""
        if not self.watching or self.full(process) or odd(process.fds[fd]):
            return
        self.step(process, "epoll_create")
        epoll = Description(process.side, kind="epoll")
        epfd = self.model.install(process, epoll, False)
        events = data.draw(st.sampled_from(EVENTS)) | data.draw(st.sampled_from(MODES))
        self.step(process, "epoll_ctl", epfd, 1, fd, events)
        epoll.watch(process, fd, events)
        self.step(process, "epoll_wait", epfd, 0)

    def teardown(self) -> None:
        cls = type(self)
        if cls.worlds is not self.lock:
            return
        cls.carried += sum(twin.carried for twin in self.lock.twins)
        for twin in self.lock.twins:
            twin.carried = 0
        try:
            self.lock.forget()
        except BaseException as error:
            program = self.lock.program()
            self.lock.kill()
            cls.worlds = None
            raise Difference(f"{error}\n{program}") from error

    # ---- drawing

    def process(self, data: st.DataObject) -> Process:
        return data.draw(st.sampled_from(list(self.model.processes.values())))

    def pick(
        self, data: st.DataObject, wanted: Callable[[Description], bool] = lambda _: True
    ) -> tuple[Process, int, Description] | None:
        """One of the descriptors that exist, or None."""
        found = [
            (process, fd, each)
            for process in self.model.processes.values()
            for fd, each in process.fds.items()
            if wanted(each)
        ]
        return data.draw(st.sampled_from(found)) if found else None

    def full(self, process: Process) -> bool:
        return len(process.fds) >= MOST_DESCRIPTORS

    # ---- making and naming

    @rule(data=st.data(), family=st.sampled_from([socket.AF_INET, socket.AF_INET, socket.AF_INET6]))
    def make(self, data: st.DataObject, family: int) -> None:
        process = self.process(data)
        if self.full(process):
            return
        kind = data.draw(st.sampled_from([0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC]))
        self.step(process, "socket", int(family), int(socket.SOCK_STREAM | kind), 0)
        description = Description(process.side, family=family, nonblocking=kind == socket.SOCK_NONBLOCK)
        self.model.install(process, description, kind == socket.SOCK_CLOEXEC)

    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.kind == "socket" and each.state == "fresh")
        if picked is None:
            return
        process, fd, description = picked
        host = data.draw(st.sampled_from(HOSTS[description.family]))
        if self.step(process, "bind", fd, (host, 0)) == 0:
            description.state, description.host = "bound", host

    @rule(data=st.data(), backlog=st.sampled_from([8, 16]))
    def listen(self, data: st.DataObject, backlog: int) -> None:
        picked = self.pick(data, lambda each: each.kind == "socket" and each.state in ("fresh", "bound", "listening"))
        if picked is None:
            return
        process, fd, description = picked
        if any(holder.image != process.image for holder, _ in self.model.everywhere(description)):
            return  # programs that share a listener do not share its companion: who has not called listen() sees TCP's
        if self.step(process, "listen", fd, backlog) != 0 or description.state == "listening":
            return
        self.model.ports += 1
        description.host = description.host or ("0.0.0.0" if description.family == socket.AF_INET else "::")
        description.state, description.port, description.backlog = "listening", f"p{self.model.ports}", backlog
        self.step(process, "learn", fd, description.port)
        self.model.listeners[description.port] = description

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A listener in one call, so that programs get somewhere."""
        process = self.process(data)
        if self.full(process) or len(self.model.listeners) >= 3:
            return
        family = data.draw(st.sampled_from([socket.AF_INET, socket.AF_INET6]))
        nonblocking = data.draw(st.booleans())
        host = data.draw(st.sampled_from(HOSTS[family]))
        self.step(process, "socket", int(family), int(socket.SOCK_STREAM | (2048 if nonblocking else 0)), 0)
        description = Description(process.side, family=family, nonblocking=nonblocking, state="listening", host=host)
        fd = self.model.install(process, description, False)
        self.step(process, "bind", fd, (host, 0))
        self.step(process, "listen", fd, 8)
        self.model.ports += 1
        description.port, description.backlog = f"p{self.model.ports}", 8
        self.step(process, "learn", fd, description.port)
        self.model.listeners[description.port] = description

    # ---- connections

    def reach(self, description: Description, listener: Description, data: st.DataObject) -> str | None:
        """An address at which a socket reaches a listener."""
        hosts = {
            "0.0.0.0": ["127.0.0.1", "127.0.0.3"],
            "::": ["::1"],
            "::ffff:127.0.0.1": ["::ffff:127.0.0.1"],
        }.get(listener.host, [listener.host])
        if description.family == socket.AF_INET:
            hosts = [host.removeprefix("::ffff:") for host in hosts if "." in host]
        else:
            hosts = [host if ":" in host else f"::ffff:{host}" for host in hosts]
        if description.host not in ("", "0.0.0.0", "::"):
            mapped = "." in description.host
            hosts = [host for host in hosts if ("." in host) == mapped]
        return data.draw(st.sampled_from(hosts)) if hosts else None

    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.kind == "socket" and each.state in ("fresh", "bound"))
        if picked is None:
            return
        listeners = [each for each in self.model.listeners.values() if self.is_next(each, picked[2])]
        if not listeners:
            return
        self.join(data, *picked, data.draw(st.sampled_from(listeners)))

    def is_next(self, listener: Description, description: Description) -> bool:
        """Is a connection accepted after those that wait already? Who comes by TCP and who comes by the SAN take
        turns, and what is shared comes by TCP."""
        alike = not self.model.children and not self.model.execs
        sides = {end.peer.side for end in listener.pending if end.peer is not None}
        return not sides or (alike and sides == {description.side} and len(listener.pending) < 4)

    @rule(data=st.data())
    def meet(self, data: st.DataObject) -> None:
        """Socket, connect and accept in one, so that programs get somewhere."""
        listeners = [each for each in self.model.listeners.values() if not each.pending]
        if not listeners:
            return
        listener = data.draw(st.sampled_from(listeners))
        process = self.process(data)
        if self.full(process):
            return
        family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
        nonblocking = data.draw(st.booleans())
        self.step(process, "socket", int(family), int(socket.SOCK_STREAM | (2048 if nonblocking else 0)), 0)
        description = Description(process.side, family=family, nonblocking=nonblocking)
        fd = self.model.install(process, description, False)
        if self.join(data, process, fd, description, listener):
            acceptor, listening = next(self.model.everywhere(listener))
            self.take(acceptor, listening, listener, data)

    def join(
        self, data: st.DataObject, process: Process, fd: int, description: Description, listener: Description
    ) -> bool:
        host = self.reach(description, listener, data)
        if host is None:
            return False
        if listener.side == description.side:
            self.lock.same_side = True
        answer = self.step(process, "connect", fd, (host, listener.port))
        if answer not in (0, "EINPROGRESS"):
            description.state = "failed"
            return False
        self.model.connect(description, listener)
        assert description.end is not None
        description.state = "connected"
        self.step(process, "arrives", fd, 0, select.POLLOUT)
        holder, listening = next(self.model.everywhere(listener))
        self.step(process, "queued", fd, holder.name, listening)
        if answer == "EINPROGRESS":
            again = data.draw(st.sampled_from([1, 0, 2]))
            for _ in range(again):
                self.step(process, "connect", fd, (host, listener.port))
            description.announced = again > 0
        return True

    @rule(data=st.data())
    def connect_again(self, data: st.DataObject) -> None:
        picked = self.pick(
            data, lambda each: each.announced and each.state in ("connected", "listening") and not odd(each)
        )
        if picked is None or not self.model.listeners:
            return
        port = data.draw(st.sampled_from(sorted(self.model.listeners)))
        host = "127.0.0.1" if picked[2].family == socket.AF_INET else "::1"
        self.step(picked[0], "connect", picked[1], (host, port))

    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        picked = self.pick(
            data, lambda each: each.kind == "socket" and (each.ready() or each.nonblocking) and not odd(each)
        )
        if picked is None or self.full(picked[0]):
            return
        self.take(*picked, data)

    def take(self, process: Process, fd: int, listener: Description, data: st.DataObject) -> None:
        flags = data.draw(st.sampled_from([None, 0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC]))
        answer = self.step(process, "accept", fd, *([] if flags is None else [int(flags)]))
        if isinstance(answer, str):
            return
        end = listener.pending.pop(0)
        description = Description(process.side, family=listener.family, state="connected", end=end)
        description.nonblocking = flags == socket.SOCK_NONBLOCK
        description.informed = {key: {process.name} & names for key, names in listener.informed.items()}
        number = self.model.install(process, description, flags == socket.SOCK_CLOEXEC)
        self.step(process, "taken", number, listener.port)
        self.told([end])
        self.watch(process, number, data)

    # ---- data

    @rule(data=st.data(), size=st.sampled_from([1, 0, 100, 5000]))
    def send(self, data: st.DataObject, size: int) -> None:
        picked = self.pick(data, lambda each: each.state == "connected" and not odd(each))
        if picked is None:
            return
        process, fd, description = picked
        end = description.end
        assert end is not None and end.peer is not None
        if end.peer.unread + size > MOST_UNREAD:
            return
        call = data.draw(st.sampled_from(["send", "write", "writev", "sendmsg", "sendto"]))
        flags = data.draw(st.sampled_from([0, NOSIGNAL, NOSIGNAL | DONTWAIT]))
        content = Fill(size, end.sent % 251)
        half = Fill(size // 2, end.sent % 251), Fill(size - size // 2, (end.sent + size // 2) % 251)
        if call == "send":
            answer = self.step(process, call, fd, content, int(flags))
        elif call == "write":
            answer = self.step(process, call, fd, content)
        elif call == "writev":
            answer = self.step(process, call, fd, list(half))
        elif call == "sendmsg":
            answer = self.step(process, call, fd, list(half), int(flags))
        else:
            host = "192.0.2.7" if description.family == socket.AF_INET else "2001:db8::1"
            answer = self.step(process, call, fd, content, int(flags), (host, 7))
        if isinstance(answer, int) and answer > 0:
            end.sent += answer
            if end.peer.gone or (end.peer.shut_read and end.peer.shut_write):
                end.odd = end.peer.odd = True   # what comes is answered by a reset
            else:
                end.peer.unread += answer
                self.told([end.peer])
        if end.odd or end.reset:
            self.drop(description)

    def drop(self, description: Description) -> None:
        """Closes every descriptor of a connection that may differ from now on."""
        for process, fd in list(self.model.everywhere(description)):
            self.step(process, "close", fd)
            self.told(self.model.remove(process, fd))

    @rule(data=st.data(), size=st.sampled_from([1, 50, 6000, 0]))
    def receive(self, data: st.DataObject, size: int) -> None:
        picked = self.pick(data, lambda each: each.kind == "socket" and each.state != "failed" and not odd(each))
        if picked is None:
            return
        process, fd, description = picked
        end = description.end
        call = data.draw(st.sampled_from(["recv", "recv", "read", "readv", "recvfrom", "recvmsg"]))
        flags = data.draw(st.sampled_from([0, PEEK, TRUNC, WAITALL, DONTWAIT]))
        if not description.nonblocking:
            if not description.ready():
                flags, call = DONTWAIT, "recv"
            elif flags == WAITALL:
                flags = 0
        before = end.unread if end else 0
        if call == "recv":
            answer = self.step(process, call, fd, size, int(flags))
        elif call == "read":
            answer, flags = self.step(process, call, fd, size), 0
        elif call == "readv":
            answer, flags = self.step(process, call, fd, [size // 3, size - size // 3]), 0
        elif call == "recvfrom":
            flags &= ~TRUNC
            answer = self.step(process, call, fd, size, int(flags))
        else:
            flags &= ~TRUNC
            answer = self.step(process, call, fd, [size // 3, size - size // 3], int(flags))
        if end is None or isinstance(answer, str):
            if end is not None and end.reset:
                end.odd = answer == "ECONNRESET"
            return
        if not flags & PEEK:
            end.unread = max(0, before - size)

    def known_peer(self, description: Description) -> bool:
        """Does, or did, an epoll watch the other end?"""
        other = description.end.peer if description.end else None
        holders = [each for process in self.model.processes.values() for each in process.fds.values()]
        return other is not None and any(each.end is other and each.known for each in holders)

    @rule(data=st.data(), how=st.sampled_from([socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR, 7]))
    def shutdown(self, data: st.DataObject, how: int) -> None:
        picked = self.pick(data, lambda each: each.state in ("listening", "stopped", "connected") and not odd(each))
        if picked is None:
            return
        process, fd, description = picked
        if over(description):
            return
        if description.known and description.end is not None and how != 7:
            return  # what comes later would be lost; and TCP's acknowledgement is an edge more
        if description.spread and how == socket.SHUT_RD and description.end is not None:
            return  # the same
        halved = description.end is not None and (description.end.shut_read or description.end.shut_write)
        if (halved or how == socket.SHUT_RD) and self.known_peer(description):
            return  # an edge more, too
        if description.state == "listening" and description.pending:
            return  # who waits would see an end of file where another process shares the listener
        answer = self.step(process, "shutdown", fd, int(how))
        if answer != 0:
            return
        if description.state == "listening" and how != socket.SHUT_WR:
            description.state = "stopped"
            self.told(self.model.stop(description))
        end = description.end
        if end is None:
            return
        if how != socket.SHUT_WR:
            end.shut_read = True
        if how != socket.SHUT_RD:
            end.shut_write = True
            if end.peer is not None and not end.peer.gone:
                end.peer.fin = True
                self.told([end.peer])

    # ---- descriptors

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        picked = self.pick(data)
        if picked is None:
            return
        process, fd, _ = picked
        self.step(process, "close", fd)
        self.told(self.model.remove(process, fd))

    @rule(data=st.data())
    def linger(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.state == "connected" and not odd(each))
        if picked is None:
            return
        process, fd, description = picked
        self.step(process, "setsockopt", fd, SOL, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.step(process, "getsockopt", fd, SOL, socket.SO_LINGER, 8)
        assert description.end is not None
        description.end.linger = True

    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        picked = self.pick(data)
        if picked is None or self.full(picked[0]):
            return
        process, fd, description = picked
        way = data.draw(st.sampled_from(["dup", "dupfd", "dupfd_cloexec", "dup2", "dup3"]))
        if way == "dup":
            self.step(process, "dup", fd)
            self.model.install(process, description, False)
        elif way.startswith("dupfd"):
            start = data.draw(st.sampled_from([3, 20]))
            command = fcntl.F_DUPFD if way == "dupfd" else fcntl.F_DUPFD_CLOEXEC
            self.step(process, "fcntl", fd, command, start)
            self.model.install(process, description, way != "dupfd", process.lowest(start))
        else:
            to = data.draw(st.sampled_from(sorted(process.fds) + [process.lowest(), 30]))
            if way == "dup2":
                self.step(process, "dup2", fd, to)
            else:
                self.step(process, "dup3", fd, to, os.O_CLOEXEC)
            if to == fd:
                return
            description.references += 1  # it must not vanish with the descriptor that it replaces
            told = self.model.remove(process, to) if to in process.fds else []
            description.references -= 1
            self.model.install(process, description, way == "dup3", to)
            self.told(told)

    @rule(data=st.data(), command=st.sampled_from([fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETFD, fcntl.F_SETFD]))
    def flags(self, data: st.DataObject, command: int) -> None:
        picked = self.pick(data)
        if picked is None:
            return
        process, fd, description = picked
        if command == fcntl.F_SETFL and description.kind == "socket":
            on = data.draw(st.booleans())
            if data.draw(st.booleans()):
                self.step(process, "ioctl", fd, 0x5421, int(on))
            else:
                self.step(process, "fcntl", fd, command, os.O_NONBLOCK if on else 0)
            description.nonblocking = on
        elif command == fcntl.F_SETFD:
            on = data.draw(st.booleans())
            self.step(process, "fcntl", fd, command, int(on))
            (process.cloexec.add if on else process.cloexec.discard)(fd)
        else:
            self.step(process, "fcntl", fd, fcntl.F_GETFD if command == fcntl.F_SETFL else command, 0)

    # ---- looking

    @rule(data=st.data())
    def names(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.state != "failed" and not odd(each))
        if picked is None:
            return
        process, fd, description = picked
        call = data.draw(st.sampled_from(["getsockname", "getpeername"]))
        if call == "getpeername" and over(description):
            return
        self.step(process, call, fd, data.draw(st.sampled_from([128, 28, 16, 5, 0])))

    @rule(data=st.data())
    def pending_bytes(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.kind == "socket" and not odd(each))
        if picked is not None:
            self.step(picked[0], "ioctl", picked[1], data.draw(st.sampled_from([0x541B, 0x8905])), 77)

    @rule(data=st.data(), option=st.sampled_from(OPTIONS))
    def options(self, data: st.DataObject, option: tuple[int, int, list[int]]) -> None:
        picked = self.pick(data, lambda each: not odd(each))
        if picked is None:
            return
        level, name, values = option
        value = data.draw(st.sampled_from([None, *values]))
        if value is not None and self.step(picked[0], "setsockopt", picked[1], int(level), int(name), value) == 0:
            picked[2].set(picked[0], (level, name))
        if not picked[2].knows(picked[0], (level, name)):
            return  # options do not follow through exec, nor from one process to another
        self.step(picked[0], "getsockopt", picked[1], int(level), int(name), data.draw(st.sampled_from([4, 4, 8, 1])))

    @rule(data=st.data())
    def poll(self, data: st.DataObject) -> None:
        process = self.process(data)
        fds = [fd for fd, each in process.fds.items() if not odd(each)]
        if not fds:
            return
        call = data.draw(st.sampled_from(["poll", "ppoll", "select"]))
        chosen = data.draw(st.lists(st.sampled_from([*fds, 40]), min_size=1, max_size=3, unique=True))
        asked = 0
        if call == "select":
            chosen = [fd for fd in chosen if fd != 40] or fds[:1]
        else:
            asked = data.draw(st.sampled_from([select.POLLIN | select.POLLOUT | RDHUP, select.POLLIN, 0]))
        if any(hangs_up(process.fds[fd]) for fd in chosen if fd in process.fds):
            return
        if call == "select":
            self.step(process, "select", max(chosen) + 1, chosen, chosen[::-1], chosen[:1])
        else:
            self.step(process, "poll", [(fd, asked) for fd in chosen], 0, call)

    # ---- epoll

    @rule(data=st.data())
    def epoll_create(self, data: st.DataObject) -> None:
        process = self.process(data)
        if self.full(process) or sum(each.kind == "epoll" for each in process.fds.values()) >= 2:
            return
        self.step(process, "epoll_create")
        self.model.install(process, Description(process.side, kind="epoll"), False)

    @rule(data=st.data(), operation=st.sampled_from([1, 1, 1, 3, 2]))
    def epoll_ctl(self, data: st.DataObject, operation: int) -> None:
        picked = self.pick(data, lambda each: each.kind == "epoll")
        if picked is None:
            return
        process, epfd, epoll = picked
        fds = [fd for fd, each in process.fds.items() if each.kind == "socket" and not odd(each)]
        if not fds:
            return
        fd = data.draw(st.sampled_from(fds))
        if epoll.is_confused(process, fd):
            return
        events = data.draw(st.sampled_from(EVENTS)) | data.draw(st.sampled_from(MODES))
        if self.step(process, "epoll_ctl", epfd, operation, fd, events) == 0 and operation != 2:
            epoll.watch(process, fd, events)

    @rule(data=st.data())
    def epoll_wait(self, data: st.DataObject) -> None:
        picked = self.pick(data, lambda each: each.kind == "epoll")
        if picked is None or any(odd(each) for each in picked[2].watched.values()):
            return
        self.step(picked[0], "epoll_wait", picked[1], 0)

    # ---- processes

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.process(data)
        if len(self.model.processes) >= MOST_PROCESSES:
            return
        self.model.children += 1
        name = f"{parent.side}{self.model.children}"
        self.step(parent, "fork", name)
        child = Process(name, parent.side, dict(parent.fds), set(parent.cloexec), parent.name, parent.image)
        for description in child.fds.values():
            description.references += 1
            description.spread = True
            for names in description.informed.values():
                if parent.name in names:
                    names.add(name)
            for holder, number in list(description.watched):
                if holder == parent.name:
                    description.watched[name, number] = description.watched[holder, number]
                    description.makers[name, number] = description.makers[holder, number]
        self.model.processes[name] = child

    @rule(data=st.data())
    @precondition(lambda self: len(self.model.processes) > 2)
    def exits(self, data: st.DataObject) -> None:
        parents = {process.parent for process in self.model.processes.values()}
        leaves = [each for each in self.model.processes.values() if each.parent and each.name not in parents]
        if not leaves:
            return
        child = data.draw(st.sampled_from(leaves))
        self.step(self.model.processes[child.parent], "ends", child.name)
        del self.model.processes[child.name]
        for fd in list(child.fds):
            told = self.model.remove(child, fd)
            self.told(told)

    @rule(data=st.data())
    def exec(self, data: st.DataObject) -> None:
        process = self.process(data)
        if any(each.pending for each in process.fds.values()):   # D6
            return
        watched = [each for epoll in process.fds.values() for each in epoll.watched.values()]
        # An epoll that other processes may share loses listeners at exec.
        if self.model.children and any(each.state != "connected" for each in watched):
            return
        self.step(process, "exec")
        self.model.execs += 1
        process.image = self.model.execs
        for description in process.fds.values():
            description.spread = True
            others = {each.name for each in self.model.processes.values()} - {process.name}
            description.informed.setdefault(V6ONLY, others)   # what bind() made it
            for names in description.informed.values():
                names.discard(process.name)
        closed = [end for fd in sorted(process.cloexec) for end in self.model.remove(process, fd)]
        self.told([end for end in closed if not end.gone])


def odd(description: Description) -> bool:
    end = description.end
    return end is not None and end.odd


def hangs_up(description: Description) -> bool:
    """Is it an epoll that may tell of a hang-up beside what TCP tells (D1), and is readable by it?"""
    return any(each.end is not None and each.end.fin for each in description.watched.values())


def over(description: Description) -> bool:
    """After a program's own SHUT_RDWR the kernel does not tell the switch whether the peer has ended too."""
    end = description.end
    return end is not None and end.fin and end.shut_read and end.shut_write


__all__ = ["Difference", "OracleFailed", "Programs", "errno"]
