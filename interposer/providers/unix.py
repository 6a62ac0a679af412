"""The control side of native/provider_unix.c."""

from __future__ import annotations

import socket
import struct

from interposer.providers.subnet import Subnet

EXPLANATION = "AF_UNIX sockets in the abstract name space: connections within this machine and its network name space"

_SOCK_DIAG_BY_FAMILY = 20
_NETLINK_SOCK_DIAG = 4
_ANY_COOKIE = 0xFFFFFFFF
_ALL_STATES = 0xFFFFFFFF


def probe() -> str | None:
    """As in subnet.Control. Listens on a port of the loopback for the moment in which the kernel is asked who does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as companion:
            companion.bind("")  # the kernel chooses an abstract name
    except OSError as error:
        return f"AF_UNIX sockets with abstract names do not work: {error.strerror}"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE):
            pass
    except OSError as error:
        return f"the kernel does not say where addresses are: {error.strerror}; allow AF_NETLINK sockets"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            if _owner_is_told(listener.getsockname()[1]):
                return None
    except OSError:
        return "the loopback interface has no address: ip link set lo up"
    return "the kernel does not say who listens: load the tcp_diag module, or allow NETLINK_SOCK_DIAG"


def serves(subnet: Subnet) -> bool:
    """Its addresses are the machine's."""
    del subnet
    return True


def _owner_is_told(port: int) -> bool:
    """Does sock_diag know this listener on 127.0.0.1? Where it lacks a module it says "no such socket", too."""
    address = socket.inet_aton("127.0.0.1") + bytes(12)
    identity = struct.pack("!HH", port, 0) + address + bytes(16) + struct.pack("=III", 0, _ANY_COOKIE, _ANY_COOKIE)
    request = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, _ALL_STATES) + identity
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1)
            netlink.send(struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, 1, 0, 0) + request)
            kind: int = struct.unpack_from("=H", netlink.recv(4096), 4)[0]
    except OSError:
        return False
    return kind == _SOCK_DIAG_BY_FAMILY
