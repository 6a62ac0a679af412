"""The sockets of interposed processes: the rows of their stats pages, held against what the kernel knows.

The kernel's lists are read from /proc/PID/net, which shows the process's own network name space, needs no privilege and
costs less than importing a netlink library. Only the peer of an AF_UNIX socket, which is not in there, is asked for by
sock_diag.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from functools import cached_property

from interposer.diag.stats import Endpoint, Process, Row, endpoint

_SOCK_DIAG_BY_FAMILY = 20
_UDIAG_SHOW_NAME = 1
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_NAME = 0
_UNIX_DIAG_PEER = 2
_ANY_COOKIE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Socket:
    """A listener or connection of an interposed process."""

    pid: int
    fd: int
    role: str
    local: Endpoint | None
    peer: Endpoint | None
    provider: str
    rule: str
    reason: int
    """Number of the reason for TCP, or 0."""


class Kernel:
    """The TCP and AF_UNIX sockets, by inode, of one process's network name space, as they were when first asked for."""

    def __init__(self, pid: int) -> None:
        self._net = f"/proc/{pid}/net"
        self._shared = _same_namespace(pid)

    @cached_property
    def tcp(self) -> dict[int, tuple[Endpoint, Endpoint | None]]:
        """Local address and, unless it listens, remote address."""
        found: dict[int, tuple[Endpoint, Endpoint | None]] = {}
        for name in ("tcp", "tcp6"):
            for line in _lines(f"{self._net}/{name}"):
                words = line.split()
                inode = int(words[9])
                if inode:
                    remote = _hexadecimal(words[2])
                    found[inode] = _hexadecimal(words[1]), remote if remote.port else None
        return found

    @cached_property
    def unix(self) -> dict[int, str]:
        """Names, with '@' for the NUL of an abstract one; "" for none."""
        found: dict[int, str] = {}
        for line in _lines(f"{self._net}/unix"):
            words = line.rstrip("\n").split(" ", 6)
            inode, _, name = words[-1].lstrip().partition(" ")
            if len(words) == 7 and inode.isdecimal():  # a name may hold line ends
                found.setdefault(int(inode), name)
        return found

    def peer_name(self, inode: int) -> str:
        """The name of the other end of an AF_UNIX socket; "" when it has none or cannot be found out."""
        if not self._shared:
            return ""
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4) as netlink:
                peer = _unix_diag(netlink, inode, _UDIAG_SHOW_PEER).get(_UNIX_DIAG_PEER)
                if not peer:
                    return ""
                name = _unix_diag(netlink, int.from_bytes(peer, sys.byteorder), _UDIAG_SHOW_NAME)
        except OSError:
            return ""
        return name.get(_UNIX_DIAG_NAME, b"").replace(b"\0", b"@").decode(errors="replace")


def sockets(processes: list[Process]) -> list[Socket]:
    """The rows of the processes whose descriptors still are those sockets, by pid and descriptor."""
    kernels: dict[str, Kernel] = {}
    found = []
    for process in processes:
        if not process.rows:
            continue
        kernel = kernels.setdefault(_namespace(process.pid), Kernel(process.pid))
        for row in process.rows:
            inode = socket_inode(process.pid, row.fd)
            shown = _check(process.pid, row, inode, kernel) if inode else None
            if shown:
                found.append(shown)
    return found


def socket_inode(pid: int, fd: int) -> int:
    """0 when the descriptor is no socket, is gone, or may not be seen."""
    try:
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return 0
    return int(link[8:-1]) if link.startswith("socket:[") else 0


def _check(pid: int, row: Row, inode: int, kernel: Kernel) -> Socket | None:
    if row.role != "listen" and row.provider == "unix":
        name = kernel.unix.get(inode)
        if name is None or not name.startswith("@san1/"):
            return None
        local, remote = row.local, row.remote
        if not local or not remote:
            named_local, named_remote = _companion(name)
            if named_local and not named_remote:
                named_remote = _companion(kernel.peer_name(inode))[0]
            local, remote = local or named_local, remote or named_remote
    else:
        if (row.inode and row.inode != inode) or inode in kernel.unix:
            return None
        local, remote = kernel.tcp.get(inode, (row.local, row.remote))
        if _differ(row.local, local) or _differ(row.remote, remote):
            return None
    peer = None if row.role == "listen" else remote
    return Socket(pid, row.fd, row.role, local, peer, row.provider, row.rule, row.reason)


def _differ(said: Endpoint | None, known: Endpoint | None) -> bool:
    """Ports tell sockets apart; one address can be written in several ways."""
    return bool(said and known and said.port and said.port != known.port)


def _companion(name: str) -> tuple[Endpoint | None, Endpoint | None]:
    """The addresses in a companion's native name: a connecting end has both, a listener one and its slot."""
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "@san1":
        return None, None
    return _named(parts[2]), _named(parts[3]) if parts[1] == "C" else None


def _named(text: str) -> Endpoint | None:
    """127.0.0.1:80, or 32 hexadecimal digits with %scope."""
    address, _, port = text.rpartition(":")
    digits, _, scope = address.partition("%")
    try:
        if len(digits) == 32:
            return endpoint(bytes.fromhex(digits), int(scope or 0), int(port))
        socket.inet_pton(socket.AF_INET, digits)
        return Endpoint(digits, int(port))
    except (ValueError, OSError):
        return None


def _hexadecimal(text: str) -> Endpoint:
    """0100007F:0050: the address in words of the machine's byte order, the port as a number."""
    address, _, port = text.partition(":")
    words = struct.pack(f"={len(address) // 8}I", *(int(address[i : i + 8], 16) for i in range(0, len(address), 8)))
    if len(words) == 4:
        return Endpoint(socket.inet_ntop(socket.AF_INET, words), int(port, 16))
    return endpoint(words, 0, int(port, 16))


def _lines(path: str) -> list[str]:
    """Without the heading; none where the kernel lacks the protocol."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            return file.readlines()[1:]
    except OSError:
        return []


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return f"of {pid}"


def _same_namespace(pid: int) -> bool:
    return _namespace(pid) == _namespace(os.getpid())


def _unix_diag(netlink: socket.socket, inode: int, show: int) -> dict[int, bytes]:
    """The attributes that sock_diag has about one AF_UNIX socket."""
    netlink.send(
        struct.pack("=IHHII", 40, _SOCK_DIAG_BY_FAMILY, 1, 0, 0)
        + struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, show, _ANY_COOKIE, _ANY_COOKIE)
    )
    answer = netlink.recv(65536)
    length, kind = struct.unpack_from("=IH", answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return {}
    found, at = {}, 32
    while at + 4 <= min(length, len(answer)):
        size, attribute = struct.unpack_from("=HH", answer, at)
        if size < 4:
            break
        found[attribute] = answer[at + 4 : at + size]
        at += (size + 3) & ~3
    return found
