"""The address table of this machine, as programs under the switch have it (native/netinfo.c): subnets and providers.

Only the command line imports this module: pyroute2 takes a tenth of a second to load.
"""

from __future__ import annotations

import importlib
import ipaddress
import socket
from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from interposer.providers import NAMES
from interposer.providers.subnet import Control, Subnet

_IFF_UP = 1
_LOOPBACK = 1
"""The index of the loopback interface in every name space."""


class AddressesError(Exception):
    """The kernel does not tell its addresses."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Whether a provider can be used here."""

    name: str
    explanation: str
    problem: str | None
    """Why it cannot; None: it can."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A subnet and the providers that serve it."""

    subnet: Subnet
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The subnets in the kernel's order, and all providers that are built in."""

    entries: tuple[Entry, ...]
    providers: tuple[Provider, ...]


def table() -> Table:
    """As it is now, in the network name space of the caller. Raises AddressesError."""
    machine, loopback = _subnets()
    controls = {name: control(name) for name in NAMES}
    down = None if loopback else "the loopback interface is down: ip link set lo up"
    providers = tuple(Provider(name, side.EXPLANATION, down or side.probe()) for name, side in controls.items())
    usable = [provider.name for provider in providers if not provider.problem]
    entries = (Entry(subnet, tuple(name for name in usable if controls[name].serves(subnet))) for subnet in machine)
    return Table(tuple(entries), providers)


def control(name: str) -> Control:
    """The control side of a provider in NAMES."""
    side: Control = importlib.import_module(f"interposer.providers.{name}")
    return side


def _subnets() -> tuple[list[Subnet], bool]:
    """The machine's subnets, and whether its loopback is up."""
    try:
        with IPRoute() as route:
            links = {link["index"]: link for link in route.get_links()}
            answers = list(route.get_addr())
    except (OSError, NetlinkError) as error:
        raise AddressesError(f"the kernel does not tell its addresses: {error}") from None
    up = {index: bool(link["flags"] & _IFF_UP) for index, link in links.items()}
    found = []
    for answer in answers:
        index = answer["index"]
        own, other = answer.get_attr("IFA_LOCAL"), answer.get_attr("IFA_ADDRESS")
        own = own or other
        if answer["family"] not in (socket.AF_INET, socket.AF_INET6) or index not in links or not own:
            continue
        # Of a point-to-point link the prefix is the other end's.
        full = 32 if answer["family"] == socket.AF_INET else 128
        prefix = answer["prefixlen"] if own == (other or own) else full
        address = ipaddress.ip_interface(f"{own}/{prefix}")
        found.append(Subnet(str(links[index].get_attr("IFLA_IFNAME")), index, up[index], address))
    return found, up.get(_LOOPBACK, False)
