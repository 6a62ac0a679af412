"""Runs one program in four worlds at once, step by step: TCP at both ends, which is the oracle, the switch at both, at
the client only, at the server only. After each step what the worlds saw is compared.

A program is a list of steps, each a call of one actor, and has a text form that can be kept in a file and run again:

    server.socket(2, 1, 0)
    server.bind(3, ('127.0.0.1', 0))
    server.listen(3, 8)
    server.learn(3, 'p1')
    client.socket(2, 1, 0)
    client.connect(3, ('127.0.0.1', 'p1'))
    server.arrives(3, 0, 1)
    server.accept(3)

The calls are the methods of puppet.Actor, and these of the harness, which no program could make: learn(fd, name) names
the port of a socket; arrives(fd, bytes, events) waits, unseen by the switch, until so much can be read and these poll
events have come; queued(fd, name) waits until the last connect() of anyone to that port has reached the listener's
queue; fork(name), exec(), ends(name) start, replace and end processes. fill(n, k) is n bytes.
"""

from __future__ import annotations

import ast
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import puppet
from differences import judge
from puppet import Actor, Buffer, Coincidence, Pending
from world import ORACLE, PAIRINGS, Pairing, World

ARRIVAL = 1500
"""Milliseconds that bytes and events may take from one end to the other."""
PATIENCE = 3.0
"""Seconds that a call may take that should not block."""
HIDDEN_MOST = 24
"""Hidden descriptors that a process may keep when the program has none."""


@dataclass(frozen=True)
class Fill:
    """Bytes that tell their place."""

    size: int
    start: int

    def bytes(self) -> bytes:
        return bytes((self.start + i) * 7 % 251 for i in range(self.size))

    def __repr__(self) -> str:
        return f"fill({self.size}, {self.start})"


@dataclass(frozen=True)
class Step:
    actor: str
    call: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.actor}.{self.call}({', '.join(map(repr, self.arguments))})"


def parse(text: str) -> list[Step]:
    """The steps of a program's text; empty lines and comments are left out."""
    steps = []
    for line in text.splitlines():
        line = line.partition("  #")[0].strip()
        if not line or line.startswith("#"):
            continue
        call = ast.parse(line, mode="eval").body
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=actor), attr=name), args=arguments):
                steps.append(Step(actor, name, tuple(_value(each) for each in arguments)))
            case _:
                raise ValueError(f"not a step: {line}")
    return steps


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return Fill(*(ast.literal_eval(each) for each in node.args))
    if isinstance(node, ast.List | ast.Tuple):
        kind = list if isinstance(node, ast.List) else tuple
        return kind(_value(each) for each in node.elts)
    return ast.literal_eval(node)


class Difference(AssertionError):
    """The worlds differ where they must not."""

    spoilt = False
    """A process hangs or has died, so the worlds are of no more use."""


class OracleFailed(Exception):
    """The program does not do on TCP what its author thought: no fault of the switch."""


class Twin:
    """One world of a lockstep."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self.world = World(pairing)
        self.actors: dict[str, Actor] = {}
        self.ports: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        """TCP connections in the queue of the listener of each named port."""
        self.targets: dict[tuple[int, int], str] = {}
        self.sources: set[int] = set()
        """Ports that TCP chose for connecting sockets."""
        self.bound = 0
        """The port that the socket of the last connect() had before."""
        self.compared = 0
        self.carried = 0
        """Connections that were made by a companion."""
        self._enter("client", self.world.client)
        self._enter("server", self.world.server)

    @property
    def entries(self) -> list[puppet.Entry]:
        return self.world.stage.record.entries

    def _enter(self, name: str, actor: Actor) -> None:
        self.actors[name] = actor
        actor.handle(signal.SIGPIPE)
        actor.deferred = True
        actor.pipes = actor.raw("puppet_signals").pipes   # a child has its parent's count

    # ---- one step, in two halves

    def begin(self, step: Step) -> Any:
        actor = self.actors[step.actor]
        arguments = [self._resolved(each) for each in step.arguments]
        special = getattr(self, f"_{step.call}", None)
        if special is not None:
            return special(actor, *arguments)
        if step.call == "connect" and isinstance(step.arguments[1], tuple):
            self.targets[(actor.pid, step.arguments[0])] = str(step.arguments[1][1])
            self.bound = self._port(actor, step.arguments[0])
        return getattr(actor, step.call)(*arguments)

    def end(self, begun: Any) -> Any:
        if isinstance(begun, Pending):
            return begun.result(PATIENCE)
        return begun() if callable(begun) else begun

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, Fill):
            return argument.bytes()
        if isinstance(argument, list):
            return [self._resolved(each) for each in argument]
        if isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], str):
            return argument[0], self.ports[argument[1]]
        return argument

    @staticmethod
    def _port(actor: Actor, fd: int) -> int:
        """Of a TCP socket, unseen by the switch."""
        answer = actor.raw("libc:getsockname", fd, Buffer(bytes(28)), Buffer((28).to_bytes(4, "little")))
        address = puppet.unpack_address(answer.memory[0])
        return address[1] if isinstance(address, tuple) else 0

    def _learn(self, actor: Actor, fd: int, name: str) -> None:
        port = self._port(actor, fd)
        if port in self.sources or port in self.ports.values():
            raise Coincidence
        self.ports[name] = port
        self.waiting[name] = 0

    def _arrives(self, actor: Actor, fd: int, size: int, events: int) -> Any:
        actor.ask("puppet_arrived", fd, size, events, ARRIVAL)

        def finish() -> None:
            arrived = bool(actor.answer("puppet_arrived", PATIENCE).result)
            actor.note("arrives", f"{fd}, {size}, {events:#x}", "yes" if arrived else "no")

        return finish

    def _queued(self, actor: Actor, fd: int, listening: str, listener: int) -> Any:
        """`actor` has connected `fd`; the listener is `listening`'s."""
        domain = actor.raw("puppet_domain", fd).result
        if domain == socket.AF_UNIX:
            self.carried += 1
            return None
        port = self._port(actor, fd)
        known = port in self.world.stage.record.ports and port != self.bound
        if known or port in self.sources or port in self.ports.values():
            raise Coincidence
        self.sources.add(port)
        name = self.targets.get((actor.pid, fd), "")
        self.waiting[name] = self.waiting.get(name, 0) + 1
        server = self.actors[listening]
        end = time.monotonic() + ARRIVAL / 1000
        while server.raw("puppet_queued", listener).result < self.waiting[name] and time.monotonic() < end:
            time.sleep(0.0005)
        return None

    def _taken(self, actor: Actor, fd: int, name: str) -> None:
        """`fd` was accepted from the listener of a named port."""
        if actor.raw("puppet_domain", fd).result != socket.AF_UNIX:
            self.waiting[name] -= 1

    def _fork(self, actor: Actor, name: str) -> Any:
        actor.ask("puppet_fork", Buffer(name.encode() + b"\0"))

        def finish() -> None:
            assert actor.answer("fork", PATIENCE).result > 0
            self._enter(name, self.world.stage.enter(name, actor.side))
            actor.note("fork", name, "yes")

        return finish

    def _exec(self, actor: Actor) -> Any:
        name = actor.name
        actor.ask("puppet_exec", Buffer(name.encode() + b"\0"), 0)

        def finish() -> None:
            fresh = self.world.stage.enter(name, actor.side)
            assert fresh.pid == actor.pid
            actor.channel.close()
            self.world.stage.actors.remove(actor)
            self._enter(name, fresh)
            actor.note("exec", "", "yes")

        return finish

    def _ends(self, actor: Actor, name: str) -> Any:
        """A child ends by exit(), and its parent reaps it."""
        child = self.actors.pop(name)
        child.exit()
        self.world.stage.actors.remove(child)
        child.channel.close()
        actor.ask("waitpid", child.pid, Buffer(bytes(4)), 0)

        def finish() -> None:
            answer = actor.answer("waitpid", PATIENCE)
            status = int.from_bytes(answer.memory[0], "little")
            actor.note("ends", name, f"status {status}" if answer.result == child.pid else answer.value)

        return finish

    # ---- between programs

    def forget(self) -> None:
        """Ends what a program left; the two first processes go on with no descriptor of it."""
        for name, actor in list(self.actors.items()):
            if name not in ("client", "server"):
                with suppress(ProcessLookupError):
                    os.kill(actor.pid, signal.SIGKILL)
                end = time.monotonic() + PATIENCE
                with suppress(FileNotFoundError):
                    while os.listdir(f"/proc/{actor.pid}/fd") and time.monotonic() < end:
                        time.sleep(0.0005)
                actor.channel.close()
                self.world.stage.actors.remove(actor)
                del self.actors[name]
        for actor in self.actors.values():
            for fd in self._low(actor):
                actor.raw("close", fd)
            while actor.raw("waitpid", -1, None, 1).result > 0:
                pass
        self.entries.clear()
        self.world.stage.record.ports.clear()
        self.ports.clear()
        self.waiting.clear()
        self.targets.clear()
        self.sources.clear()
        self.compared = 0
        for name, actor in self.actors.items():
            left = os.listdir(f"/proc/{actor.pid}/fd")
            if self._low(actor) or len(left) > HIDDEN_MOST:
                links = {fd: os.readlink(f"/proc/{actor.pid}/fd/{fd}") for fd in left}
                raise Difference(f"{self.pairing.name}: {name} still has descriptors after the program: {links}")

    @staticmethod
    def _low(actor: Actor) -> list[int]:
        """The program's own descriptors; hidden ones are high."""
        return sorted(fd for fd in map(int, os.listdir(f"/proc/{actor.pid}/fd")) if 2 < fd < 500)

    def kill(self) -> None:
        with suppress(Exception):
            self.world.stage.close()


class Lockstep:
    """The four worlds."""

    def __init__(self, pairings: Sequence[Pairing] = (ORACLE, *PAIRINGS)) -> None:
        self.twins = [Twin(pairing) for pairing in pairings]
        self.done: list[Step] = []
        self.met: dict[str, int] = {}
        """How often each permitted difference was met."""
        self.same_side = False
        """A connection of this program has both ends on one side, which is then on the SAN in other worlds too."""

    def run(self, step: Step) -> Any:
        """What TCP answered. Raises Difference."""
        self.done.append(step)
        begun: list[Any] = []
        for twin in self.twins:
            begun.append(self._guarded(twin, twin.begin, step))
        results = [self._guarded(twin, twin.end, each) for twin, each in zip(self.twins, begun, strict=True)]
        oracle = self.twins[0]
        for entry in oracle.entries[oracle.compared :]:
            if entry.call == "arrives" and entry.seen == "no":
                raise OracleFailed(f"on TCP {entry}\n{self.program()}")
        for twin in self.twins[1:]:
            self._compare(oracle, twin)
        for twin in self.twins:
            twin.compared = len(twin.entries)
        return results[0]

    def again(self) -> Any:
        """Runs the program from its first step, for other ports."""
        steps, same_side = list(self.done), self.same_side
        for _ in range(5):
            self.forget()
            self.same_side = same_side
            try:
                return [self.run(step) for step in steps][-1]
            except Coincidence as error:
                last = error
        raise Difference(f"the same ports again and again: {last}")

    def _guarded(self, twin: Twin, function: Any, argument: Any) -> Any:
        try:
            return function(argument)
        except AssertionError as error:
            if twin is self.twins[0]:
                raise OracleFailed(f"on TCP: {error}\n{self.program()}") from error
            said = twin.world.stage.said()
            difference = Difference(f"{twin.pairing.name}: {error}\n{said}\n{self.program()}")
            difference.spoilt = True
            raise difference from error

    def _compare(self, oracle: Twin, twin: Twin) -> None:
        fresh = zip(oracle.entries[twin.compared :], twin.entries[twin.compared :], strict=True)
        for index, (expected, got) in enumerate(fresh, twin.compared):
            companions = twin.pairing.san or self.same_side
            problem, names = judge(expected, got, twin.entries[:index], companions)
            for name in names:
                self.met[name] = self.met.get(name, 0) + 1
            if problem:
                # One that has more names for ports than the other has used one of them twice.
                fewer = len(oracle.world.stage.record.ports) != len(twin.world.stage.record.ports)
                kind = Coincidence if fewer and expected.portless() == got.portless() else Difference
                raise kind(f"{twin.pairing.name}: {problem}\n{self.program()}")

    def program(self) -> str:
        return "the program:\n" + "".join(f"    {step}\n" for step in self.done)

    def forget(self) -> None:
        for twin in self.twins:
            twin.forget()
        self.done.clear()
        self.same_side = False

    def kill(self) -> None:
        for twin in self.twins:
            twin.kill()


def replay(steps: Iterable[Step]) -> Lockstep:
    """Runs a program in fresh worlds. Raises Difference or OracleFailed."""
    worlds = Lockstep()
    try:
        for step in steps:
            try:
                worlds.run(step)
            except Coincidence:
                worlds.again()
    finally:
        worlds.kill()
    return worlds
