"""The address table of native/netinfo.c, in a program with providers that serve one subnet only.

The program runs in a network name space of its own, whose addresses change."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from build_c import HOSTS, NATIVE, ROOT, compile_c

WAIT = 30.0
SECOND = 1000.0
REFRESH = 0.75
"""Seconds: REFRESH_MS of netinfo.c."""
FIRST, SECOND_PROVIDER = 0, 1
SETUP = """
ip link set lo up
ip link add d0 type veth peer name d1
ip link set d0 addrgenmode none
ip link set d1 addrgenmode none
ip link set d0 up
ip link set d1 up
ip addr add 10.9.0.1/24 dev d0
ip -6 addr add fd09::1/64 dev d0 nodad
"""
LO, D1, D0 = 1, 2, 3
SERVED, LOCAL, UP = 1, 2, 4


@cache
def build(sanitizer: str) -> Path:
    place = ROOT / ".build" / "hosts"
    place.mkdir(parents=True, exist_ok=True)
    names = ("netinfo.c", "netlink.c", "endpoint.c", "real.c")
    sources = [HOSTS / "subnets_host.c", *(NATIVE / name for name in names)]
    flags = ("-D_GNU_SOURCE", *([f"-fsanitize={sanitizer}"] if sanitizer else []))
    return compile_c(place / f"subnets_host-{sanitizer or 'plain'}", *sources, flags=flags)


class Host:
    """A running subnets_host in a network name space of its own."""

    def __init__(self, sanitizer: str = "") -> None:
        apart = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
        self.popen = subprocess.Popen(
            [*apart, build(sanitizer)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self.sh(SETUP)

    def ask(self, command: str) -> str:
        assert self.popen.stdin and self.popen.stdout and self.popen.stderr
        self.popen.stdin.write(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.popen.stdout], [], [], WAIT)
            piece = os.read(self.popen.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                self.popen.kill()
                raise AssertionError(f"no answer to {command!r}: {self.popen.stderr.read().decode()[-3000:]}")
            answer += piece
        return answer.decode().strip()

    def sh(self, commands: str) -> None:
        for command in filter(None, map(str.strip, commands.splitlines())):
            assert self.ask(f"sh {command}") == "0", command

    def own(self, provider: int, address: str, prefix: int, interface: int = 0) -> None:
        """The provider serves addresses in there, of that interface."""
        assert self.ask(f"own {provider} {address} {prefix} {interface}") == "ok"

    def serves(self, address: str, provider: int = FIRST) -> bool:
        return self.ask(f"serves {provider} {address}") == "1"

    def asked(self) -> list[str]:
        """What the first provider was asked since the last look: ADDRESS:PORT/PREFIX@INTERFACE."""
        return self.ask("asked").split()

    def calls(self) -> list[int]:
        """socket, send, recv and close since the last look."""
        return list(map(int, self.ask("calls").split()))

    def follows(self, address: str, command: str, want: int) -> None:
        """After `command` the answers become `want`, a sum of SERVED, LOCAL and UP, and are so whenever the questions
        begin a second later."""
        answer, late = self.ask(f"follow {want} {address} {command}").split()
        assert int(answer) == want and float(late) < SECOND, (address, command, answer, late)

    def close(self) -> None:
        assert self.popen.stdin and self.popen.stdout and self.popen.stderr
        self.popen.stdin.close()
        try:
            status = self.popen.wait(WAIT)
            said = self.popen.stderr.read().decode()
        finally:
            self.popen.kill()
            self.popen.wait(WAIT)
            self.popen.stdout.close()
            self.popen.stderr.close()
        assert (status, said) == (0, "")


@pytest.fixture
def host() -> Iterator[Host]:
    running = Host()
    yield running
    running.close()


def test_what_providers_are_asked(host: Host) -> None:
    """S25: a provider is asked about each of the machine's addresses with its subnet and interface, once for many
    decisions, which cost no system call then."""
    host.own(FIRST, "10.9.0.0", 112)
    assert host.serves("10.9.0.1")
    assert host.asked() == [
        f"127.0.0.1:0/104@{LO}", f"10.9.0.1:0/120@{D0}", f"[::1]:0/128@{LO}", f"[fd09::1]:0/64@{D0}",
    ]  # fmt: skip
    sockets, sends, receives, closes = host.calls()
    assert (sockets, sends, closes) == (1, 1, 1) and receives <= 4
    assert not host.serves("127.0.0.1") and not host.serves("fd09::1") and not host.serves("10.9.0.1", SECOND_PROVIDER)
    assert host.calls() == [0, 0, 0, 0]
    assert host.asked() == []


def test_as_in_sanctl(host: Host, tmp_path: Path) -> None:
    """S25, O2: programs and `sanctl addresses` have the same table."""
    host.sh("ip addr add 10.8.0.1 peer 10.8.0.2/24 dev d0\nip addr add fe80::7/64 dev d1 nodad")
    host.sh(f"cd {ROOT} && {sys.executable} -m interposer.cli.sanctl addresses --json > {tmp_path}/table")
    host.serves("10.9.0.1")
    shown = []
    for entry in json.loads((tmp_path / "table").read_text())["addresses"]:
        v6 = ":" in entry["address"]
        scope = f"%{entry['index']}" if entry["address"].startswith("fe80") else ""
        address = f"[{entry['address']}{scope}]" if v6 else entry["address"]
        shown.append(f"{address}:0/{entry['prefix'] + (0 if v6 else 96)}@{entry['index']}")
    assert len(shown) == 6 and host.asked() == shown


def test_by_interface(host: Host) -> None:
    """S25: a provider may go by the interface; each has its own answer."""
    host.own(FIRST, "::", 0, interface=D0)
    host.own(SECOND_PROVIDER, "::", 0, interface=LO)
    for address, served in (("10.9.0.1", FIRST), ("fd09::1", FIRST), ("127.0.0.1", 1), ("127.8.8.8", 1), ("::1", 1)):
        assert [host.serves(address, provider) for provider in (FIRST, SECOND_PROVIDER)] == [served == 0, served == 1]


def test_narrowest_subnet(host: Host) -> None:
    """S25: an address that is local by a route alone is of the narrowest subnet that it is in; one that the machine has
    is of its own, even where another is narrower."""
    host.sh("ip addr add 10.9.0.129/25 dev d1\nip addr add 10.9.0.200/16 dev d0")
    host.own(FIRST, "::", 0, interface=D1)
    assert host.serves("10.9.0.130") and not host.serves("10.9.0.5") and not host.serves("10.9.7.7")
    assert not host.serves("10.9.0.200") and host.serves("10.9.0.129")


def test_outside_of_all_subnets(host: Host) -> None:
    """S25: where no subnet has the address, the provider is asked about the address alone."""
    host.own(FIRST, "10.7.0.0", 112)
    host.serves("127.0.0.1")
    host.asked()
    assert host.serves("10.7.1.2") and not host.serves("10.6.1.2")
    assert host.asked() == ["10.7.1.2:0/128@0", "10.6.1.2:0/128@0"]


def test_other_end_of_a_link(host: Host) -> None:
    """S25: of a point-to-point link the prefix is the other end's; our own address stands alone."""
    host.sh("ip addr add 10.8.0.1 peer 10.8.0.2/24 dev d0")
    host.own(FIRST, "::", 0, interface=D0)
    assert host.serves("10.8.0.1") and not host.serves("10.8.0.7")
    assert f"10.8.0.1:0/128@{D0}" in host.asked()


def test_link_local(host: Host) -> None:
    """S25: a link-local address is of its interface."""
    host.sh("ip addr add fe80::7/64 dev d0 nodad\nip addr add fe80::7/64 dev d1 nodad")
    host.own(FIRST, "::", 0, interface=D1)
    assert host.serves(f"fe80::7%{D1}") and not host.serves(f"fe80::7%{D0}")


def test_wildcards(host: Host) -> None:
    """S5, S25: the wildcard is served where any subnet of its family is, the IPv6 one where any is; where none is, the
    provider is asked about addresses still to come."""
    host.own(FIRST, "10.9.0.0", 112)
    host.own(SECOND_PROVIDER, "fd09::", 64)
    assert host.serves("0.0.0.0") and host.serves("::")
    host.asked()
    assert not host.serves("0.0.0.0", SECOND_PROVIDER) and host.serves("::", SECOND_PROVIDER)
    assert host.asked() == []
    host.own(FIRST, "0.0.0.0", 128)
    host.follows("10.9.0.1", "ip addr flush dev d0", UP)
    host.asked()
    assert host.serves("0.0.0.0") and host.asked() == ["0.0.0.0:0/96@0"]


@pytest.mark.parametrize(("address", "prefix", "more"), [("10.5.0.1", 24, ""), ("fd05::1", 64, "nodad")])
def test_follows(host: Host, address: str, prefix: int, more: str) -> None:
    """S25: an address that is added or removed is known within a second, to the table and to the cache of what is
    local."""
    host.own(FIRST, "::", 0, interface=D0)
    host.follows(address, f"ip addr add {address}/{prefix} dev d0 {more}", SERVED | LOCAL | UP)
    host.follows(address, f"ip addr del {address}/{prefix} dev d0", UP)


def test_follows_the_loopback(host: Host) -> None:
    """S25, S7: that the loopback is down, so that TCP reaches nothing on this machine, is known within a second."""
    host.follows("10.9.0.1", "ip link set lo down", LOCAL)
    host.follows("10.9.0.1", "ip link set lo up", LOCAL | UP)


@pytest.mark.parametrize("sanitizer", ["", "thread"])
def test_rate(sanitizer: str) -> None:
    """S25, T13: four threads that decide all the time share what the kernel says, and all get the right answer; a data
    race would be reported."""
    host = Host(sanitizer)
    host.own(FIRST, "10.9.0.0", 112)
    threads, asked = 4, []
    # Each may ask before there is a table. While who makes one is kept from the CPU, all do: not three times in a row.
    while len(asked) < 3 and (not asked or asked[-1] > threads + 1 / REFRESH):
        questions, wrong, sockets = map(int, host.ask(f"rate 1 {threads} 10.9.0.1 127.0.0.1").split())
        assert questions > 1000 and wrong == 0
        asked.append(sockets)
    host.close()
    assert 1 <= asked[-1] <= threads + 1 / REFRESH or sanitizer, asked


def test_renewal(host: Host) -> None:
    """S25: who decides while another renews the table uses the old one, so that the kernel is asked once."""
    host.own(FIRST, "10.9.0.0", 112)
    assert host.serves("10.9.0.1")
    # Kept from the CPU for a moment, the table is too old: not three times in a row.
    assert any(host.ask("renewal 10.9.0.1") == "1 1" for _ in range(3))


def test_without_netlink(host: Host) -> None:
    """S7: where the kernel forbids to ask, providers are asked about the address alone, and the kernel not again at
    once."""
    host.own(FIRST, "10.9.0.0", 112)
    host.ask("deny 1")
    assert host.serves("10.9.0.1") and not host.serves("127.0.0.1")
    assert host.serves("10.9.0.1") and not host.serves("0.0.0.0")
    assert host.asked() == ["10.9.0.1:0/128@0", "127.0.0.1:0/128@0", "10.9.0.1:0/128@0", "0.0.0.0:0/96@0"]
    assert host.ask("loopback") == "1"
    assert host.calls() == [1, 0, 0, 0]


def test_many_addresses(host: Host) -> None:
    """S25: of more addresses than the table has room for, the first are in it, and providers are asked about the others
    alone; the kernel is not made to tell them all."""
    host.sh("for i in $(seq 0 1199); do echo addr add 10.4.$((i / 250)).$((i % 250 + 1))/32 dev d0; done | ip -batch -")
    host.own(FIRST, "::", 0, interface=D0)
    host.own(SECOND_PROVIDER, "10.4.4.0", 120)
    assert host.serves("10.9.0.1")
    assert len(host.asked()) == 256
    assert host.calls()[2] < 10
    assert host.serves("10.4.0.1") and host.asked() == []
    assert not host.serves("10.4.4.9") and host.asked() == ["10.4.4.9:0/128@0"]
    assert host.serves("10.4.4.9", SECOND_PROVIDER)


def test_in_a_signal_handler(host: Host) -> None:
    """T12: a decision that interrupts the making of the table has its own, and both are right."""
    host.own(FIRST, "10.9.0.0", 112)
    host.ask("nested 10.9.0.1")
    assert not host.serves("127.0.0.1")
    assert host.ask("nested") == "1"
    assert host.calls()[0] == 2


def test_fork_meanwhile(host: Host) -> None:
    """T4: a child that is forked while the table is made makes one, which serves its next decision too."""
    host.own(FIRST, "10.9.0.0", 112)
    host.ask("fork 10.9.0.1")
    assert not host.serves("127.0.0.1")
    assert host.ask("nested") == "7"


def test_other_name_space(host: Host) -> None:
    """X9, S25: after unshare() nothing that was known of the old name space is used, and nothing is remembered."""
    host.own(FIRST, "10.9.0.0", 112, interface=D0)
    assert host.serves("10.9.0.1") and host.ask("local 10.9.0.1") == "1"
    assert host.ask("leave") == "ok"
    assert not host.serves("10.9.0.1") and host.ask("local 10.9.0.1") == "0" and host.ask("loopback") == "0"
    host.sh(SETUP)
    assert host.serves("10.9.0.1") and host.ask("local 10.9.0.1") == "1" and host.ask("loopback") == "1"
