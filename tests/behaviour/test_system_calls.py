"""What the switch costs in system calls: nothing where no SAN provider is used, and nothing for data."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest
from puppet import build, plain_environment, switched_environment

FEW, MANY = 20, 60
BIND, GETSOCKOPT = 49, 55
ON_TCP = ["transfer", "connect", "names", "socket", "bind", "datagram", "raw", "unix"]


@cache
def each_time(what: str, options: tuple[str, ...] | None, scratch: Path) -> dict[int, float]:
    """System calls by number for one more repetition, the start and the end of the program left out."""
    environment = plain_environment() if options is None else switched_environment(*options)
    counts = []
    for times in (FEW, MANY):
        output = scratch / f"{what}-{times}"
        subprocess.run(
            [build("count_calls"), output, build("repeat"), what, str(times)], env=environment, timeout=60, check=True
        )
        counts.append(dict(tuple(map(int, line.split())) for line in output.read_text().splitlines()))
    few, many = counts
    costs = {number: (many.get(number, 0) - few.get(number, 0)) / (MANY - FEW) for number in few | many}
    # The program's one connection may try several local ports before it finds one that is free.
    costs[BIND] = float(round(costs.get(BIND, 0)))
    return {number: cost for number, cost in costs.items() if cost}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def tcp_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text('version = 1\n[[rule]]\nrole = "both"\nuse = "tcp"\n')
    return path


@pytest.mark.parametrize("what", ON_TCP)
def test_nothing_on_tcp(what: str, scratch: Path, tcp_policy: Path) -> None:
    """X8, S7: where the policy says TCP, no call makes more system calls than without the switch. Only listen() on a
    socket that the switch does not know asks what it is: another program's TCP listener has a reason, or is refused."""
    plain = each_time(what, None, scratch)
    assert plain, "the program does nothing"
    assert each_time(what, ("--policy", str(tcp_policy)), scratch) == plain | look_at_unknown(what)


def look_at_unknown(what: str) -> dict[int, float]:
    return {GETSOCKOPT: 1.0} if what == "unix" else {}


@pytest.mark.parametrize("what", ["socket", "bind"])
def test_nothing_before_the_decision(what: str, scratch: Path) -> None:
    """S1, S4: with the SAN wanted, socket() and bind() are the kernel's alone."""
    assert each_time(what, (), scratch) == each_time(what, None, scratch)


@pytest.mark.parametrize("what", ["datagram", "raw", "unix"])
def test_nothing_for_other_sockets(what: str, scratch: Path) -> None:
    """S8: UDP, raw, SCTP and AF_UNIX sockets cost nothing but that look and ask nobody."""
    assert each_time(what, (), scratch) == each_time(what, None, scratch) | look_at_unknown(what)


def test_nothing_for_data(scratch: Path) -> None:
    """P7, X8: on a companion each transfer and each wait is one system call, as on TCP."""
    plain, san = each_time("transfer", None, scratch), each_time("transfer", (), scratch)
    assert sum(san.values()) == sum(plain.values())
