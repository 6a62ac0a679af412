"""What the control sides of providers know of the machine's addresses."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Subnet:
    """An address of this machine with its subnet: `struct subnet` of native/spi.h."""

    interface: str
    index: int
    up: bool
    """Is the interface up?"""
    address: IPv4Interface | IPv6Interface


class Control(Protocol):
    """The control side of a provider: a module of this package, named as its C file."""

    EXPLANATION: str
    """One sentence for people: what carries the data, and how far."""

    def probe(self) -> str | None:
        """Why the provider cannot be used on this machine and by this user; None: it can. Starts nothing that lasts."""

    def serves(self, subnet: Subnet) -> bool:
        """Is this local subnet one of the provider's? The answer of wsp_serves in the C file."""
