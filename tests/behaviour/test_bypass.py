"""Programs that the switch cannot follow: on TCP both ways, whole, and nobody waits for them on a SAN."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from awkward import Lab, build_host, carried

WAYS = {"instruction": (), "libc": ("-DBY_LIBC",), "hidden": ("-DHIDDEN",)}
"""How a program makes the system calls of its ring: awkward_ring.c."""
EARLY = ("instruction", "libc")
"""Those whose code shows it."""

POLLS = ("7", "271")


def within(seconds: float, holds: Callable[[], bool], meaning: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, meaning
        time.sleep(0.01)


def ring_host(way: str) -> Path:
    return build_host("awkward_ring", *WAYS[way], as_name=f"awkward_ring-{way}")


def served(lab: Lab, *words: object) -> tuple[str, str, str, list[str]]:
    """The only client of a server: what carried its connection, as client and server say, and why; and what the server
    decided of its listener."""
    with lab.serving("plain", *words) as (server, port, log):
        client = lab.run("plain", build_host("awkward_client"), port, timeout=20)
        return client.letter, chr(server.wait(20)), client.carried[0], carried(log.read_text())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("when", "listens"), [("before", "IO_URING"), ("after", "unix"), ("inherit", "unix")])
def test_accepts_by_a_ring(lab: Lab, way: str, when: str, listens: str) -> None:
    """T14, S23, O1: a server that accepts through an io_uring, made before or after its listen() or inherited, has its
    client by TCP, because its companion is not to be found."""
    assert served(lab, ring_host(way), when) == ("T", "T", "NO_COMPANION", [listens])


@pytest.mark.parametrize("way", EARLY)
def test_client_before_the_ring(lab: Lab, way: str) -> None:
    """T14, S23: a client that comes between listen() and the making of the ring is not lost: nobody has waited for it
    by a call that the switch sees, so it goes by TCP."""
    assert served(lab, ring_host(way), "late") == ("T", "T", "NO_COMPANION", ["unix"])


def test_client_before_a_ring_that_nobody_foresaw(lab: Lab) -> None:
    """T14, S23: where only the making of the ring is seen, a client that waits in the SAN backlog does not go on to
    wait: it is reset. The next one is on TCP."""
    with lab.serving("plain", ring_host("hidden"), "late") as (server, port, _):
        first = lab.run("plain", build_host("awkward_client"), port, timeout=20)
        assert (first.letter, first.carried) == ("-", ["unix"])
        second = lab.run("plain", build_host("awkward_client"), port, timeout=20)
        assert (second.letter, second.carried, chr(server.wait(20))) == ("T", ["NO_COMPANION"], "T")


@pytest.mark.parametrize(("when", "carrier"), [("poll-before", "T"), ("poll", "U")])
def test_serves_its_clients_by_a_ring(lab: Lab, when: str, carrier: str) -> None:
    """T14: a server that waits and accepts by libc's calls is found, and its ring sends on a companion as on a TCP
    socket; one that has its ring when it first waits stays on TCP."""
    with lab.serving("plain", ring_host("instruction"), when) as (server, port, _):
        within(10, lambda: Path(f"/proc/{server.pid}/syscall").read_text().split()[0] in POLLS, "the server waits")
        client = lab.run("plain", build_host("awkward_client"), port, timeout=20)
        assert (client.letter, chr(server.wait(20))) == (carrier, carrier)


@pytest.mark.parametrize("way", WAYS)
def test_ring_on_a_connection(lab: Lab, way: str) -> None:
    """T14: a connection that is on the SAN already goes on when the program makes a ring and receives through it."""
    outcome = lab.run("plain", ring_host(way), "connect", lab.port)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"])


@pytest.mark.parametrize("way", WAYS)
def test_socket_that_a_ring_knows(lab: Lab, way: str) -> None:
    """T14, O1: a ring that took the socket in before its connect() goes on to hold that socket, so it stays TCP's."""
    outcome = lab.run("plain", ring_host(way), "connect-fixed", lab.port)
    assert (outcome.letter, outcome.carried) == ("T", ["IO_URING"])


@pytest.mark.parametrize("wait", ["accept", "poll", "ppoll", "select", "pselect", "epoll"])
def test_calls_by_number(lab: Lab, wait: str) -> None:
    """T14, S2, S26, T6: a program that makes its calls by libc's syscall() is as well on the SAN as one that calls by
    name, and sees the same."""
    host = build_host("awkward_syscalls")
    without = subprocess.run([host, wait], capture_output=True, text=True, timeout=30, check=False)
    assert (without.returncode, without.stdout) == (0, "TT\n"), without
    outcome = lab.run("plain", host, wait)
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "UU\n", ["unix", "unix"]), outcome
