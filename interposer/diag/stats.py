"""Reads the stats pages of interposed processes (native/stats.h, the writer's side) through /proc/PID/fd.

A page belongs to another process, which may be hostile: it is read with pread, never mapped, and nothing in it is
believed before it was checked.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from interposer import providers
from interposer.policy import reasons

LINK = "/memfd:interposer (deleted)"
LIBRARY = "/libinterposer.so"

VERSION = 1
PROVIDERS = 8
REASONS = 64
ROWS = 65536
RULE_SIZE = 96
ENDPOINT = struct.Struct("=16sIHH")
HEADER = struct.Struct(f"=8sIIIIIIIIQQ{PROVIDERS}Q{PROVIDERS}Q{REASONS}QQ")
ROW = struct.Struct(f"=IIII24s24sQQ{RULE_SIZE}sQ8x")

ROLES = {1: "listen", 2: "connect", 3: "accept"}
PROVIDER_NAMES = {0: "tcp", **{number: name for name, number in providers.NAMES.items()}}

_MAGIC = b"SANSTATS"
_ROWS_OFFSET_MAX = 65536
_SEQUENCE = slice(ROW.size - 16, ROW.size - 8)
_TRIES = 50
_V4 = bytes(10) + b"\xff\xff"


class PageError(Exception):
    """A stats page is damaged, of another version, or not one."""


class ProcessError(Exception):
    """A process that was asked for by pid cannot be shown: gone, of another user, or not interposed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An IP address, IPv4 in dotted form, and a port."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def endpoint(ip: bytes, scope: int, port: int) -> Endpoint:
    """From the 16 bytes that native/endpoint.h holds."""
    if ip.startswith(_V4):
        return Endpoint(socket.inet_ntop(socket.AF_INET, ip[12:]), port)
    text = socket.inet_ntop(socket.AF_INET6, ip)
    return Endpoint(f"{text}%{scope}" if scope else text, port)


@dataclass(frozen=True, slots=True)
class Row:
    """What a process says about its descriptor `fd`."""

    fd: int
    role: str
    provider: str
    reason: int
    """Number of the reason for TCP, or 0."""
    local: Endpoint | None
    """None where the process did not say; the kernel may know."""
    remote: Endpoint | None
    inode: int
    """Of the TCP socket that the program made; 0 for an accepted companion."""
    started: int
    """Nanoseconds since 1970."""
    rule: str


@dataclass(frozen=True, slots=True)
class Process:
    """The counters of one interposed process since its start, and its rows."""

    pid: int
    exe: str
    started: int
    generation: int
    engine: str
    connections: dict[str, int]
    listeners: dict[str, int]
    reasons: dict[str, int]
    upcalls: int
    rows: tuple[Row, ...]


def reason_symbol(number: int) -> str:
    reason = reasons.BY_NUMBER.get(number)
    return reason.symbol if reason else f"UNKNOWN_{number}"


def provider_name(number: int) -> str:
    return PROVIDER_NAMES.get(number, f"provider-{number}")


def processes() -> tuple[list[Process], list[str]]:
    """All interposed processes that this user may see and that have a page, by pid; and one message for each page that
    could not be read."""
    found, problems = [], []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            process = _look(pid)
        except PageError as error:
            problems.append(f"process {pid}: {error}")
        except OSError:
            continue
        else:
            if process:
                found.append(process)
    return found, problems


def process(pid: int) -> Process:
    """One process; counters of zero when it is interposed and has done nothing yet. Raises ProcessError, PageError."""
    try:
        found = _look(pid)
        if found is None and not _has_library(pid):
            raise ProcessError(f"process {pid} ({_exe(pid)}) is not interposed: start it with sanrun")
        return found or _read_nothing(pid)
    except PermissionError:
        raise ProcessError(f"process {pid} may not be inspected by this user: try as its owner or as root") from None
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessError(f"there is no process {pid}") from None
    except OSError as error:
        raise ProcessError(f"process {pid}: {error.strerror}") from None


def _look(pid: int) -> Process | None:
    """None when the process has no page. Raises OSError, PageError."""
    for fd in _candidates(pid):
        try:
            file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            continue
        try:
            found = read(file, pid)
        finally:
            os.close(file)
        if found:
            return found
    return None


def _candidates(pid: int) -> Iterator[int]:
    """The descriptors that look like a page, high ones first: that is where the library puts its own."""
    for fd in sorted((int(name) for name in os.listdir(f"/proc/{pid}/fd")), reverse=True):
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}") == LINK:
                yield fd
        except FileNotFoundError:
            continue


def _has_library(pid: int) -> bool:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        return any(line.rstrip("\n").removesuffix(" (deleted)").endswith(LIBRARY) for line in maps)


def _exe(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()


def _own_pid(pid: int) -> int:
    """The number by which the process knows itself, in its own pid name space."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid


def _read_nothing(pid: int) -> Process:
    zero = _named([0] * PROVIDERS)
    return Process(pid, _exe(pid), 0, 0, "not started", zero, dict(zero), {}, 0, ())


def _named(counts: list[int]) -> dict[str, int]:
    """Every provider that exists, TCP last, and whichever other one was counted."""
    numbers = [*range(1, PROVIDERS), 0]
    return {provider_name(n): counts[n] for n in numbers if n in PROVIDER_NAMES or counts[n]}


def read(file: int, pid: int) -> Process | None:
    """The page in the open `file`, of process `pid`. None: it is just being made, or is that of the process's parent.
    Raises PageError, OSError."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise PageError("its stats page is not a file")
    data = os.pread(file, HEADER.size, 0)
    if not data.strip(b"\0"):
        return None
    if len(data) < HEADER.size:
        raise PageError(f"its stats page has only {len(data)} bytes")
    magic, version, owner, row_size, nrows, offset, engine, engine_reason, max_row, started, generation, *counts = (
        HEADER.unpack(data)
    )
    if magic == bytes(8):
        return None
    if magic != _MAGIC:
        raise PageError("its stats page has no valid head")
    if version != VERSION:
        raise PageError(f"its stats page has version {version}, and this sanctl reads {VERSION}: restart the program")
    if owner not in (pid, _own_pid(pid)):
        return None
    if row_size != ROW.size:
        raise PageError(f"its stats page has rows of {row_size} bytes instead of {ROW.size}")
    if not 0 < nrows <= ROWS or not HEADER.size <= offset <= _ROWS_OFFSET_MAX or max_row >= nrows:
        raise PageError(f"its stats page has impossible rows (offset {offset}, {max_row} of {nrows})")
    if status.st_size < offset + nrows * row_size:
        raise PageError(f"its stats page is cut off at {status.st_size} bytes")
    connections, listeners = counts[:PROVIDERS], counts[PROVIDERS : 2 * PROVIDERS]
    by_reason, upcalls = counts[2 * PROVIDERS : -1], counts[-1]
    return Process(
        pid,
        _exe(pid),
        started,
        generation,
        _engine(engine, engine_reason),
        _named(connections),
        _named(listeners),
        {reason_symbol(number): count for number, count in enumerate(by_reason) if count},
        upcalls,
        tuple(_rows(file, offset, max_row + 1)),
    )


def _engine(state: int, reason: int) -> str:
    if state > 3 or reason >= REASONS:
        raise PageError(f"its stats page has an impossible engine state ({state}, {reason})")
    return ("not started", "ready", "helper", f"refused: {reason_symbol(reason)}")[state]


def _rows(file: int, offset: int, count: int) -> Iterator[Row]:
    data = os.pread(file, count * ROW.size, offset)
    if len(data) != count * ROW.size:
        raise PageError("its stats page ends within the rows")
    for fd, role in enumerate(memoryview(data).cast("I")[:: ROW.size // 4].tolist()):
        if role:
            row = _whole(file, offset + fd * ROW.size, data[fd * ROW.size : (fd + 1) * ROW.size][_SEQUENCE])
            if row and row[:4] != bytes(4):
                yield _row(fd, row)


def _whole(file: int, offset: int, sequence: bytes) -> bytes | None:
    """A row that nobody wrote while it was read; None when its process does nothing but write it."""
    for _ in range(_TRIES):
        row = os.pread(file, ROW.size, offset)
        after = os.pread(file, 8, offset + _SEQUENCE.start)
        if after == sequence and not int.from_bytes(after, sys.byteorder) & 1:
            return row
        sequence = after
    return None


def _row(fd: int, data: bytes) -> Row:
    role, family, provider, reason, local, remote, inode, started, rule, _ = ROW.unpack(data)
    text, end, _ = rule.partition(b"\0")
    if (
        role not in ROLES
        or family not in (socket.AF_INET, socket.AF_INET6)
        or provider >= PROVIDERS
        or reason >= REASONS
        or not end
    ):
        raise PageError(f"its stats page has an impossible row for descriptor {fd}")
    return Row(
        fd,
        ROLES[role],
        provider_name(provider),
        reason,
        _known(local),
        _known(remote),
        inode,
        started,
        text.decode(errors="replace"),
    )


def _known(data: bytes) -> Endpoint | None:
    if not data.strip(b"\0"):
        return None
    ip, scope, port, _ = ENDPOINT.unpack(data)
    return endpoint(ip, scope, port)
