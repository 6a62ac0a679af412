"""What the generator knows of a program's descriptors and connections: enough to make calls that return at once and to
tell what the other end will see."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

State = Literal["fresh", "bound", "listening", "connecting", "connected", "failed", "stopped"]
RDHUP = 0x2000
TOS, PRIORITY = (socket.IPPROTO_IP, socket.IP_TOS), (socket.SOL_SOCKET, socket.SO_PRIORITY)
"""The first sets the second."""
V6ONLY = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
LOWEST = 3
"""The first descriptor of a program."""


@dataclass(eq=False)
class End:
    """One end of a connection."""

    peer: End | None = None
    side: str = ""
    unread: int = 0
    sent: int = 0
    fin: bool = False
    """The peer will send no more."""
    reset: bool = False
    shut_read: bool = False
    shut_write: bool = False
    gone: bool = False
    linger: bool = False
    """Of IPv6, with an address of IPv4."""
    odd: bool = False
    """Has reached a state in which the contract permits differences; only close() comes now."""


@dataclass(eq=False)
class Description:
    """An open file: a TCP socket or an epoll."""

    side: str
    kind: Literal["socket", "epoll"] = "socket"
    family: int = 2
    state: State = "fresh"
    nonblocking: bool = False
    references: int = 0
    host: str = ""
    port: str = ""
    backlog: int = 0
    pending: list[End] = field(default_factory=list)
    end: End | None = None
    announced: bool = True
    """No second connect() is owed its one 0; each process of the switch counts that for itself."""
    watched: dict[tuple[str, int], Description] = field(default_factory=dict)
    """Of an epoll: what is registered, by process and descriptor."""
    makers: dict[tuple[str, int], int] = field(default_factory=dict)
    """And by which program."""

    known: bool = False
    """Of a socket: an epoll watches it, or did."""
    edges: bool = False
    """Edge-triggered."""
    spread: bool = False
    """Of a socket: as far as a process of the switch knows, others may have it."""

    informed: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    """Of a socket: by level and name, the processes that know an option's value, where not all do."""

    def watch(self, process: Process, fd: int, events: int) -> None:
        description = process.fds[fd]
        self.watched[(process.name, fd)] = description
        self.makers[(process.name, fd)] = process.image
        description.known = True
        description.edges |= bool(events & select.EPOLLET)

    def is_confused(self, process: Process, fd: int) -> bool:
        """Of an epoll: another process has registered this listener since the fork, under another number than this one
        or beside others. One thing stands there for a listener, and only who put it in knows for which number."""
        listener = process.fds[fd]
        numbers = {key for key, each in self.watched.items() if each is listener and each.state != "connected"}
        if any(self.makers[key] != process.image for key in numbers):
            return True  # nor does what stands there go through exec
        known = {number for name, number in numbers if name == process.name}
        unknown = {number for _, number in numbers} - known
        return bool(unknown) and unknown | known != {fd}

    def knows(self, process: Process, option: tuple[int, int]) -> bool:
        return self.state != "connected" or option not in self.informed or process.name in self.informed[option]

    def set(self, process: Process, option: tuple[int, int]) -> None:
        """Each process has its own record of options."""
        self.informed[option] = {process.name}
        if option == TOS:
            self.informed[PRIORITY] = {process.name}

    def ready(self) -> bool:
        """A read returns at once."""
        if self.state == "listening":
            return bool(self.pending)
        end = self.end
        return self.state != "connected" or end is None or bool(end.unread or end.fin or end.reset or end.shut_read)


@dataclass(eq=False)
class Process:
    name: str
    side: str
    fds: dict[int, Description] = field(default_factory=dict)
    cloexec: set[int] = field(default_factory=set)
    parent: str = ""
    image: int = 0
    """Of exec() and what was forked from it."""

    def lowest(self, start: int = LOWEST) -> int:
        number = start
        while number in self.fds:
            number += 1
        return number


class Model:
    def __init__(self) -> None:
        self.processes = {name: Process(name, name) for name in ("client", "server")}
        self.listeners: dict[str, Description] = {}
        """By the name of the port."""
        self.used: dict[str, set[int]] = {"client": set(), "server": set()}
        self.ports = 0
        self.children = self.execs = 0

    def everywhere(self, description: Description) -> Iterator[tuple[Process, int]]:
        for process in self.processes.values():
            for fd, each in process.fds.items():
                if each is description:
                    yield process, fd

    def holder(self, end: End) -> tuple[Process, int] | None:
        """Who can look at an end."""
        for process in self.processes.values():
            for fd, each in process.fds.items():
                if each.end is end:
                    return process, fd
        return None

    def install(self, process: Process, description: Description, cloexec: bool, fd: int | None = None) -> int:
        number = process.lowest() if fd is None else fd
        process.fds[number] = description
        description.references += 1
        process.cloexec.discard(number)
        if cloexec:
            process.cloexec.add(number)
        self.used.setdefault(process.name, set()).add(number)
        return number

    def connect(self, description: Description, listener: Description) -> End:
        ours, theirs = End(), End()
        ours.peer, theirs.peer = theirs, ours
        ours.side, theirs.side = description.side, listener.side
        description.end = ours
        listener.pending.append(theirs)
        return theirs

    def remove(self, process: Process, fd: int) -> list[End]:
        """Closes a descriptor; the ends that learn of it."""
        description = process.fds.pop(fd)
        process.cloexec.discard(fd)
        description.references -= 1
        if description.references:
            return []
        if description.state == "listening":
            return self.stop(description)
        if description.end is not None:
            return self.close(description.end)
        return []

    def stop(self, listener: Description) -> list[End]:
        told = []
        for end in listener.pending:
            end.gone = True
            if end.peer is not None and not end.peer.gone:
                end.peer.fin = end.peer.reset = True
                told.append(end.peer)
        listener.pending.clear()
        self.listeners.pop(listener.port, None)
        return told

    def close(self, end: End) -> list[End]:
        end.gone = True
        peer = end.peer
        if peer is None or peer.gone:
            return []
        peer.fin = True
        if end.unread or end.linger:
            peer.reset = True
        peer.odd |= end.linger   # D3
        if end.shut_write:   # AF_UNIX wakes who waits, an edge more; and a reset is ECONNRESET instead of EPIPE
            peer.odd |= peer.reset or self.is_edged(peer)
        return [peer]

    def is_edged(self, end: End) -> bool:
        holders = [each for process in self.processes.values() for each in process.fds.values()]
        return any(each.end is end and each.edges for each in holders)
