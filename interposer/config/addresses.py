"""Address patterns of rules: "127.0.0.1:6379", "10.0.0.0/8", "[fd00::]/8:80-89", "*:80", ":80"."""

from __future__ import annotations

import ipaddress

from interposer.config.model import ALL_PORTS, Pattern
from interposer.policy.table import FAMILY_V4, FAMILY_V6, V4_PREFIX

FORMS = '"ADDRESS", "ADDRESS/PREFIX", "[IPV6]/PREFIX" or "*", each with ":PORT" or ":FIRST-LAST"'


class BadPattern(ValueError):
    """Not an address pattern; `hint` says what to write instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def parse_pattern(text: str) -> Pattern:
    """The set of endpoints that a pattern names. An address without a port means all ports. Raises BadPattern."""
    host, ports = _split(text)
    families, address, prefix = _network(host)
    return Pattern(families, address, prefix, _ports(ports), text)


def _split(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        end = text.find("]")
        if end < 0:
            raise BadPattern(f'"{text}" has a "[" without "]"', 'write "[::1]:80"')
        rest, colon, ports = text[end + 1 :].partition(":")
        if rest and not rest.startswith("/"):
            raise BadPattern(f'"{rest}" cannot follow "]"', 'write "[::1]:80" or "[fd00::]/8"')
        return text[: end + 1] + rest, ports if colon else None
    if text.count(":") > 1:
        try:
            ipaddress.IPv6Network(text, strict=False)
        except ValueError:
            raise BadPattern(f'"{text}" is not an address', f"expected {FORMS}") from None
        address, _, prefix = text.partition("/")
        whole = f'write "[{address}]{"/" + prefix if prefix else ""}"'
        head, _, port = text.rpartition(":")
        apart = f', or "[{head}]:{port}" for a port' if port.isdigit() and not head.endswith(":") else ""
        raise BadPattern(f'"{text}" is an IPv6 address without brackets', whole + apart)
    host, colon, ports = text.partition(":")
    return host, ports if colon else None


def _network(host: str) -> tuple[int, bytes, int]:
    if host in ("", "*"):
        return FAMILY_V4 | FAMILY_V6, bytes(16), 0
    bracketed = host.startswith("[")
    address, slash, prefix = host.partition("/") if not bracketed else host[1:].replace("]", "", 1).partition("/")
    if bracketed and "]" not in host.partition("/")[0]:
        raise BadPattern(f'"{host}" has the prefix inside the brackets', f'write "[{address}]/{prefix.rstrip("]")}"')
    if "%" in address:
        raise BadPattern(f'"{host}" names an interface', "write the address without %INTERFACE")
    try:
        base = (ipaddress.IPv6Address if bracketed else ipaddress.IPv4Address)(address)
    except ValueError:
        raise BadPattern(f'"{address}" is not an {"IPv6" if bracketed else "IPv4"} address', _hint(host)) from None
    bits = 128 if bracketed else 32
    length = bits
    if slash:
        if not prefix.isascii() or not prefix.isdigit() or int(prefix) > bits:
            raise BadPattern(f'"/{prefix}" is not a prefix length', f"expected 0 to {bits}")
        length = int(prefix)
    number = int(base)
    if number & ((1 << (bits - length)) - 1):
        fixed = type(base)(number >> (bits - length) << (bits - length))
        name = f"[{fixed}]" if bracketed else str(fixed)
        raise BadPattern(
            f'"{host}" has bits set beyond its prefix',
            f'write "{name}/{length}" for the network, or leave "/{length}" out for the one address',
        )
    packed = base.packed
    if not bracketed:
        return FAMILY_V4, V4_PREFIX + packed, 96 + length
    # A v4-mapped address is an IPv4 address wherever it is written.
    if packed.startswith(V4_PREFIX) and length >= 96:
        return FAMILY_V4, packed, length
    return FAMILY_V6, packed, length


def _hint(host: str) -> str:
    address, slash, prefix = host.partition("/")
    if host == "localhost":
        return 'names are not looked up; write "127.0.0.1" or "[::1]"'
    parts = address.split(".")
    if all(part.isdigit() for part in parts) and len(parts) < 4 and slash:
        return f'write "{".".join(parts + ["0"] * (4 - len(parts)))}/{prefix}"'
    if address.isdigit() and not slash:
        return f'for a port write ":{address}"'
    if any(character.isalpha() for character in address) and not host.startswith("["):
        return "names are not looked up; write the address"
    return f"expected {FORMS}"


def _ports(text: str | None) -> tuple[int, int]:
    if text is None or text == "*":
        return ALL_PORTS
    first, dash, last = text.partition("-")
    ends = []
    for end in (first, last) if dash else (first,):
        if not end.isascii() or not end.isdigit() or not 1 <= int(end) <= 65535:
            raise BadPattern(f'"{text}" is not a port', "expected 1 to 65535, FIRST-LAST, or *")
        ends.append(int(end))
    if ends[0] > ends[-1]:
        raise BadPattern(f'the ports "{text}" are in the wrong order', f'write "{ends[1]}-{ends[0]}"')
    return ends[0], ends[-1]
