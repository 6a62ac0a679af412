"""One run of a scenario: a client side and a server side, each with the switch or without it, and the proof of where
its connections went."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from puppet import Actor, Address, Stage, plain_environment, switched_environment

from interposer.diag import stats

PROVIDERS = ("unix",)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Pairing:
    """Which sides have the switch, and the provider that they use."""

    name: str
    client: bool
    server: bool
    provider: str = "unix"

    @property
    def san(self) -> bool:
        return self.client and self.server


ORACLE = Pairing("tcp", False, False)
PAIRINGS = tuple(
    pairing
    for provider in PROVIDERS
    for pairing in (
        Pairing(provider, True, True, provider),
        Pairing(f"{provider}-client", True, False, provider),
        Pairing(f"{provider}-server", False, True, provider),
    )
)


def free_port() -> int:
    """A TCP port that nobody has bound on any address, from below the ephemeral ones."""
    for _ in range(1000):
        number = 10000 + int.from_bytes(os.urandom(2)) % 20000
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::", number))
            except OSError:
                continue
            return number
    raise AssertionError("no port is free")


def _link(actor: Actor, fd: int) -> str:
    try:
        return os.readlink(f"/proc/{actor.pid}/fd/{fd}")
    except OSError:
        return ""


def companion_name(actor: Actor, fd: int) -> str:
    """The name of the AF_UNIX socket that the kernel has under a descriptor, or ""."""
    inode = _link(actor, fd).removeprefix("socket:[").removesuffix("]")
    with open("/proc/net/unix", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 6 and words[6] == inode:   # a name may hold a line's end
                return words[7] if len(words) > 7 else "unnamed"
    return ""


def names_of(port: int) -> list[str]:
    """All names of the switch that carry a port."""
    with open("/proc/net/unix", errors="replace") as file:
        return [
            name
            for name in (line.rpartition(" ")[2].strip() for line in file)
            if name.startswith("@san1/") and f":{port}" in name
        ]


class World:
    """What a scenario has: `client` and `server`, started when first used."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        switched = switched_environment("--provider", pairing.provider) if pairing != ORACLE else plain_environment()
        self.stage = Stage(
            {
                "client": switched if pairing.client else plain_environment(),
                "server": switched if pairing.server else plain_environment(),
            }
        )
        self.ports: list[int] = []
        self.proven = False

    @cached_property
    def client(self) -> Actor:
        return self.stage.start("client", "client")

    @cached_property
    def server(self) -> Actor:
        return self.stage.start("server", "server")

    def port(self) -> int:
        self.ports.append(free_port())
        return self.ports[-1]

    # ---- what scenarios begin with

    def listener(
        self,
        actor: Actor | None = None,
        host: str = LOOPBACK,
        backlog: int = 16,
        port: int = 0,
        options: Sequence[tuple[int, int, int]] = (),
        kind: int = 0,
    ) -> tuple[int, Address]:
        actor = actor or self.server
        fd = actor.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM | kind)
        for option in options:
            assert actor.setsockopt(fd, *option) == 0
        assert actor.bind(fd, (host, port)) == 0
        assert actor.listen(fd, backlog) == 0
        address = actor.getsockname(fd)
        self.ports.append(address[1])
        return fd, address[:2]

    def pair(
        self, host: str = LOOPBACK, to: str | None = None, options: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[int, int]:
        """A connection: the client's descriptor and the server's, whose listener is closed."""
        listener, address = self.listener(host=host)
        fd, accepted = self.join(listener, (to or host, address[1]), options)
        self.server.close(listener)
        return fd, accepted

    def join(self, listener: int, address: Address, options: Sequence[tuple[int, int, int]] = ()) -> tuple[int, int]:
        """A connection to an existing listener of the server's."""
        fd = self.client.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        for option in options:
            assert self.client.setsockopt(fd, *option) == 0
        assert self.client.connect(fd, address) == 0
        accepted = self.server.accept(listener)
        assert not isinstance(accepted, str), accepted
        self.proves(fd, accepted[0])
        return fd, accepted[0]

    # ---- proofs

    def proves(
        self,
        client_fd: int | None = None,
        server_fd: int | None = None,
        client: Actor | None = None,
        server: Actor | None = None,
    ) -> None:
        """With the switch at both ends the descriptors are companions, by the kernel's list of names and by the
        counters of both processes; else they are not."""
        for actor, fd, kind in ((client or self.client, client_fd, "C"), (server or self.server, server_fd, "LD")):
            if fd is None:
                continue
            name = companion_name(actor, fd)
            if not self.pairing.san:
                assert not name, f"{actor.name} {fd} is {name}"
                continue
            assert name.startswith(tuple(f"@san1/{letter}/" for letter in kind)), (
                f"{actor.name}'s descriptor {fd} is {name or _link(actor, fd)}, not a companion; {self.counted(actor)}"
            )
            assert stats.process(actor.pid).connections.get(self.pairing.provider), self.counted(actor)
            self.proven = True

    @staticmethod
    def counted(actor: Actor) -> str:
        try:
            seen = stats.process(actor.pid)
        except stats.ProcessError as error:
            return str(error)
        return f"{actor.name}: connections {seen.connections}, listeners {seen.listeners}, reasons {seen.reasons}"

    def tcp_only(self) -> None:
        """The scenario has no established connection that could be on the SAN, or wants TCP."""
        self.proven = True

    def close(self) -> None:
        """Ends the processes. O3: nothing was written to their standard descriptors. X5: no name is left."""
        said = self.stage.close()
        assert not said, f"written to the standard descriptors: {said}"
        left = [name for port in self.ports for name in names_of(port)]
        assert not left, left
