"""The kill switch and the strict mode."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from puppet import SANRUN, Actor, Stage, plain_environment, switched_environment
from world import LOOPBACK, companion_name, names_of

from interposer.diag import stats


@pytest.fixture
def stage():
    stage = Stage(
        {
            "san": switched_environment(),
            "strict": switched_environment("--require"),
            "off": {**switched_environment(), "INTERPOSER": "off"},
            "plain": plain_environment(),
        }
    )
    yield stage
    assert stage.close() == ""


def listening(actor: Actor) -> tuple[int, tuple[str, int]]:
    fd = actor.socket()
    assert actor.bind(fd, (LOOPBACK, 0)) == 0
    assert actor.listen(fd, 5) == 0
    return fd, actor.getsockname(fd)


def test_off(stage: Stage) -> None:
    """X7: INTERPOSER=off: connections and listeners are TCP's, no descriptor and no name is ours."""
    off, san = stage.start("off", "off"), stage.start("san", "san")
    listener, address = listening(off)
    assert names_of(address[1]) == []
    fd = san.socket()
    assert san.connect(fd, address) == 0
    accepted, _ = off.accept(listener)
    assert not companion_name(off, accepted)
    other, there = listening(san)
    fd = off.socket()
    assert off.connect(fd, there) == 0
    assert not companion_name(off, fd)
    got, _ = san.accept(other)
    off.send(fd, b"x")
    assert san.recv(got, 5) == b"x"
    numbers = sorted(int(name) for name in os.listdir(f"/proc/{off.pid}/fd"))
    assert numbers == [0, 1, 2, listener, accepted, fd]


def test_off_through_the_launcher() -> None:
    """X7: with INTERPOSER=off the launcher starts the program too."""
    run = subprocess.run(
        [SANRUN, "/bin/echo", "fine"],
        env={**plain_environment(), "INTERPOSER": "off"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (run.returncode, run.stdout) == (0, "fine\n")


def test_strict_works_on_the_san(stage: Stage) -> None:
    """X7: strict at both ends is the SAN as ever."""
    client, server = stage.start("client", "strict"), stage.start("server", "strict")
    listener, address = listening(server)
    fd = client.socket()
    assert client.connect(fd, address) == 0
    accepted, _ = server.accept(listener)
    assert companion_name(client, fd)
    client.send(fd, b"x")
    assert server.recv(accepted, 5) == b"x"


@pytest.mark.parametrize("blocking", [True, False])
def test_strict_connect(stage: Stage, blocking: bool) -> None:
    """X7: strict, and no companion: connect is ECONNREFUSED at once, the server sees nothing, and the reason is
    counted; later, with a companion, the same program connects."""
    strict = stage.start("strict", "strict")
    with socket.create_server((LOOPBACK, 0)) as plain:
        plain.settimeout(0.05)
        fd = strict.socket(kind=socket.SOCK_STREAM | (0 if blocking else socket.SOCK_NONBLOCK))
        assert strict.connect(fd, plain.getsockname()) == "ECONNREFUSED"
        with pytest.raises(TimeoutError):
            plain.accept()
        assert dict(stats.process(strict.pid).reasons) == {"NO_COMPANION": 1}
    server = stage.start("server", "san")
    _, address = listening(server)
    assert strict.connect(fd, address) == (0 if blocking else "EINPROGRESS")
    assert companion_name(strict, fd)


def test_strict_listener_refuses_tcp_clients(stage: Stage) -> None:
    """X7: a TCP client of a strict listener is closed at accept and counted, and accept goes on waiting."""
    strict, plain, san = stage.start("strict", "strict"), stage.start("plain", "plain"), stage.start("san", "san")
    listener, address = listening(strict)
    pending = strict.start_accept(listener)
    for count in (1, 2):
        fd = plain.socket()
        assert plain.connect(fd, address) == 0
        assert plain.recv(fd, 5) in (b"", "ECONNRESET")
        assert pending.blocks()
        assert dict(stats.process(strict.pid).reasons) == {"PEER_TCP": count}
    fd = san.socket()
    assert san.connect(fd, address) == 0
    accepted, _ = pending.result()
    assert companion_name(strict, accepted)


def test_strict_listener_under_poll(stage: Stage) -> None:
    """X7: a non-blocking strict listener: the TCP client is closed, accept is EAGAIN."""
    strict, plain = stage.start("strict", "strict"), stage.start("plain", "plain")
    listener, address = listening(strict)
    strict.fcntl(listener, 4, os.O_NONBLOCK)
    fd = plain.socket()
    assert plain.connect(fd, address) == 0
    assert strict.poll([(listener, 1)], 2000) == (1, ["IN"])
    assert strict.accept(listener) == "EAGAIN"
    assert plain.recv(fd, 5) in (b"", "ECONNRESET")


def test_strict_listen(stage: Stage) -> None:
    """X7: a strict listener that no provider can serve is EADDRNOTAVAIL, and does not listen."""
    strict, plain = stage.start("strict", "strict"), stage.start("plain", "plain")
    fd = strict.socket()
    strict.bind(fd, (LOOPBACK, 0))
    address = strict.getsockname(fd)
    names = [f"\0san1/L/{LOOPBACK}:{address[1]}/{slot}" for slot in range(64)]
    with ExitStack() as held:
        for name in names:
            held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).bind(name)
        assert strict.listen(fd, 5) == "EADDRNOTAVAIL"
        assert dict(stats.process(strict.pid).reasons) == {"NAME_TAKEN": 1}
    client = plain.socket()
    assert plain.connect(client, address) == "ECONNREFUSED"


def test_strict_other_machine(stage: Stage) -> None:
    """X7: an address that no provider reaches is ECONNREFUSED, without a packet."""
    strict = stage.start("strict", "strict")
    fd = strict.socket()
    assert strict.connect(fd, ("192.0.2.1", 9)) == "ECONNREFUSED"
    assert dict(stats.process(strict.pid).reasons) == {"OTHER_MACHINE": 1}


@pytest.mark.parametrize("content", [None, b"", b"no table"])
def test_strict_without_a_usable_table(stage: Stage, tmp_path: Path, content: bytes | None) -> None:
    """X7: --require holds where the compiled policy is gone or damaged, which alone would mean TCP."""
    place = tmp_path / "table"
    if content is not None:
        place.write_bytes(content)
    lost = {"INTERPOSER_TABLE": str(place)}
    stage.environments = {
        **stage.environments,
        "lost": {**stage.environments["strict"], **lost},
        "lenient": {**stage.environments["san"], **lost},
    }
    strict, lenient, plain = (stage.start(name, name) for name in ("lost", "lenient", "plain"))
    _, address = listening(plain)
    fd = strict.socket()
    assert strict.connect(fd, address) == "ECONNREFUSED"
    own = strict.socket()
    assert strict.bind(own, (LOOPBACK, 0)) == 0
    assert strict.listen(own, 5) == "EADDRNOTAVAIL"
    assert dict(stats.process(strict.pid).reasons) == {"BAD_TABLE": 2}
    fd = lenient.socket()
    assert lenient.connect(fd, address) == 0


def test_strict_leaves_udp(stage: Stage) -> None:
    """X7, S8: strict concerns TCP only."""
    strict = stage.start("strict", "strict")
    one, two = strict.socket(kind=socket.SOCK_DGRAM), strict.socket(kind=socket.SOCK_DGRAM)
    strict.bind(two, (LOOPBACK, 0))
    assert strict.sendto(one, b"x", 0, strict.getsockname(two)) == 1
    assert strict.recv(two, 5) == b"x"
