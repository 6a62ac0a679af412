"""Helpers that die, stall or lie, and clients that abuse one: TCP and a reason in time, and nobody else is harmed."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import engine_support as support
import psutil
import pytest
from engine_support import HELPER, SAN, TCP, run, verdicts, write_table
from flows_driver import put
from puppet import SANRUN, Actor, plain_environment, switched_environment
from test_bad_tables import RUINS
from test_engine_helper import LAUNCH, LOCALHOST, address_of, helpers, launched, wait_until
from world import World, companion_name

from interposer.diag import stats
from interposer.launch import table_cache
from interposer.policy import reasons
from interposer.policy.helper import ANSWER, FACT, HEAD, QUESTION, REPLY, REQUEST, WATCH
from interposer.policy.table import FUNCTION_NONE, Table

SLACK_MS = 250
"""What a question to a helper may take beyond timeout_ms: HELPER_SLACK_MS in engine.c."""
LOAD_MS = 600
"""For a machine that is busy with other tests."""

TCP_POLICY = support.DEFAULTS + '[[rule]]\nrole = "connect"\nuse = "tcp"\n'
FUNCTIONS = """
import os, time
def fine(request):
    return "unix"
def lasts(request):
    open(os.path.join(os.path.dirname(__file__), "begun"), "w").close()
    time.sleep(0.4)
    return "unix"
"""


def table_of(directory: Path, name: str = "fine", defaults: str = "", more: str = "") -> str:
    rule = support.FIRST.format(port=81, name=name)
    return write_table(directory, support.DEFAULTS + defaults + more + rule, FUNCTIONS, helper=address_of(directory))


@contextlib.contextmanager
def asker(table: str) -> Iterator[Callable[[], tuple[int, int, float]]]:
    """A program that asks function 0 each time it is called: action, reason and milliseconds."""
    command = [support.host(), table, str(HELPER), "pause", "0", "81"]
    environment = {**os.environ, "HOST_LOG": f"{table}.log"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as program:
        assert program.stdin and program.stdout

        def ask() -> tuple[int, int, float]:
            print(file=program.stdin, flush=True)
            line = program.stdout.readline()
            ((action, reason),) = verdicts(line)
            return action, reason, float(support.fields(line, "verdict")[0]["ms"])

        ask.pid = program.pid  # type: ignore[attr-defined]
        try:
            yield ask
        finally:
            program.stdin.close()
            assert program.wait(10) == 0


# --- a helper that lies -----------------------------------------------------------------------------------------------


class Fake:
    """Somebody of the same user who has the helper's address. `behave` is called for each question."""

    def __init__(self, address: str, behave: Callable[[socket.socket, int, int], object], backlog: int = 8) -> None:
        self.behave = behave
        self.questions = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(b"\0" + address.encode())
        self.listener.listen(backlog)
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while message := connection.recv(65536):
                if HEAD.unpack_from(message)[0] == REQUEST:
                    _, number, generation, *_ = QUESTION.unpack_from(message)
                    self.questions += 1
                    self.behave(connection, number, generation)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *ignored: object) -> None:
        for one in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def reply(number: int, generation: int, action: int = SAN, kind: int = ANSWER, **fields: object) -> bytes:
    values = {"otherwise": 0, "providers": b"\1", "reason": 0, "rule": 0, **fields}
    return REPLY.pack(kind, number, generation, action, *values.values(), FUNCTION_NONE, 0, 0, 0)


def silence(connection: socket.socket, number: int, generation: int) -> None:
    pass


LIES: dict[str, tuple[Callable[[socket.socket, int, int], object], int]] = {
    "says nothing": (silence, reasons.FUNCTION_TIMEOUT),
    "closes": (lambda c, n, g: c.shutdown(socket.SHUT_RDWR), reasons.ENGINE_NO_HELPER),
    "garbage": (lambda c, n, g: c.send(os.urandom(REPLY.size)), reasons.ENGINE_NO_HELPER),
    "an empty answer": (lambda c, n, g: c.send(b""), reasons.ENGINE_NO_HELPER),
    "a byte": (lambda c, n, g: c.send(b"\3"), reasons.ENGINE_NO_HELPER),
    "a short answer": (lambda c, n, g: c.send(reply(n, g)[:-1]), reasons.ENGINE_NO_HELPER),
    "an earlier number": (lambda c, n, g: c.send(reply((n - 1) % (1 << 32), g)), reasons.ENGINE_NO_HELPER),
    "another kind": (lambda c, n, g: c.send(reply(n, g, kind=REQUEST)), reasons.ENGINE_NO_HELPER),
    "no action": (lambda c, n, g: c.send(reply(n, g, action=0)), reasons.ENGINE_NO_HELPER),
    "asks back": (lambda c, n, g: c.send(reply(n, g, action=3)), reasons.ENGINE_NO_HELPER),
    "another action": (lambda c, n, g: c.send(reply(n, g, action=77)), reasons.ENGINE_NO_HELPER),
    "another otherwise": (lambda c, n, g: c.send(reply(n, g, otherwise=9)), reasons.ENGINE_NO_HELPER),
}


@pytest.mark.parametrize("lie", LIES)
def test_helper_that_lies(tmp_path: Path, lie: str) -> None:
    """P5, X4, O1: What is no answer to the question is TCP and a reason, in time; a true answer afterwards is taken."""
    table = table_of(tmp_path)
    behave, reason = LIES[lie]
    with Fake(address_of(tmp_path), behave) as fake, asker(table) as ask:
        for times in (1, 2):
            action, said, ms = ask()
            assert (action, said) == (TCP, reason)
            assert ms < 100 + SLACK_MS + LOAD_MS
            assert fake.questions >= times
        fake.behave = lambda c, n, g: c.send(reply(n, g))
        assert ask()[:2] == (SAN, 0)


def test_answer_that_comes_late(tmp_path: Path) -> None:
    """P5: An answer that comes after its time is nobody's, not even the next question's."""
    table = table_of(tmp_path)

    def behave(connection: socket.socket, number: int, generation: int) -> None:
        if fake.questions == 1:
            time.sleep(0.7)
            connection.send(reply(number, generation))
        else:
            time.sleep(0.05)
            connection.send(reply(number, generation, action=TCP, reason=reasons.FUNCTION_TCP, providers=b""))

    with Fake(address_of(tmp_path), behave) as fake, asker(table) as ask:
        assert ask()[:2] == (TCP, reasons.FUNCTION_TIMEOUT)
        for _ in range(8):
            assert ask()[:2] == (TCP, reasons.FUNCTION_TCP)
            time.sleep(0.05)


def test_descriptors_that_come_with_answers(tmp_path: Path) -> None:
    """T11, X6: Descriptors sent along are not taken."""
    table = table_of(tmp_path)
    null = os.open("/dev/null", os.O_RDONLY)
    with (
        Fake(address_of(tmp_path), lambda c, n, g: socket.send_fds(c, [reply(n, g)], [null] * 50)),
        asker(table) as ask,
    ):
        assert ask()[:2] == (SAN, 0)
        before = os.listdir(f"/proc/{ask.pid}/fd")  # type: ignore[attr-defined]
        for _ in range(20):
            assert ask()[:2] == (SAN, 0)
        assert os.listdir(f"/proc/{ask.pid}/fd") == before  # type: ignore[attr-defined]
    os.close(null)


def test_address_that_nobody_accepts_at(tmp_path: Path) -> None:
    """P5, O1: A full backlog is TCP and a reason within the slack."""
    table = table_of(tmp_path)
    held = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, asker(table) as ask:
        listener.bind(b"\0" + address_of(tmp_path).encode())
        listener.listen(1)
        with pytest.raises(BlockingIOError):
            while True:
                held.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                held[-1].setblocking(False)
                held[-1].connect(b"\0" + address_of(tmp_path).encode())
        for _ in range(2):
            action, reason, ms = ask()
            assert (action, reason) == (TCP, reasons.ENGINE_NO_HELPER)
            assert ms < SLACK_MS + LOAD_MS
    for one in held:
        one.close()


# --- a helper that dies or stops --------------------------------------------------------------------------------------


@contextlib.contextmanager
def begun(directory: Path, table: str) -> Iterator[subprocess.Popen[str]]:
    """A program whose question is being answered by `lasts`."""
    command = [support.host(), table, str(HELPER), "asks", "0", "81", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        wait_until(lambda: (directory / "begun").exists())
        yield program


def test_killed_while_it_answers(tmp_path: Path) -> None:
    """P5, X5, O1: A helper that dies with a question in hand is TCP and a reason at once, not when time is up."""
    table = table_of(tmp_path, "lasts", "timeout_ms = 8000\n")
    with launched(tmp_path, table):
        (process,) = helpers(table)
        with begun(tmp_path, table) as program:
            process.kill()
            output = program.communicate(timeout=20)[0]
    assert verdicts(output) == [(TCP, reasons.ENGINE_NO_HELPER)] * 2
    assert float(support.fields(output, "verdict")[0]["ms"]) < 4000
    (tmp_path / "begun").unlink()
    with launched(tmp_path, table):
        assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]


def test_stopped_while_it_answers(tmp_path: Path) -> None:
    """P5, O1: A helper that is stopped with a question in hand costs time and slack, and serves when it goes on."""
    table = table_of(tmp_path, "lasts", "timeout_ms = 1000\n")
    with launched(tmp_path, table), asker(table) as ask:
        (process,) = helpers(table)
        with begun(tmp_path, table) as program:
            process.suspend()
            try:
                output = program.communicate(timeout=20)[0]
                assert verdicts(output) == [(TCP, reasons.FUNCTION_TIMEOUT)] * 2
                for line in support.fields(output, "verdict"):
                    assert 1000 <= float(line["ms"]) < 1000 + SLACK_MS + LOAD_MS
            finally:
                process.resume()
        assert ask()[:2] == (SAN, 0)
        assert helpers(table) == [process]


def test_helper_that_comes_and_goes(tmp_path: Path) -> None:
    """P5, X5: A program that asks all the time gets an answer or a reason, whenever its helper is killed or started."""
    table = table_of(tmp_path, "fine", "timeout_ms = 1000\n")
    seen = []
    with asker(table) as ask:
        for _ in range(4):
            with launched(tmp_path, table):
                (process,) = helpers(table)
                seen += [ask() for _ in range(5)]
                assert seen[-1][:2] == (SAN, 0)
                threading.Timer(0.02, process.kill).start()
                until = time.monotonic() + 0.3
                while time.monotonic() < until:
                    seen.append(ask())
                assert seen[-1][:2] == (TCP, reasons.ENGINE_NO_HELPER)
    assert {said[:2] for said in seen} == {(SAN, 0), (TCP, reasons.ENGINE_NO_HELPER)}
    assert max(ms for *_, ms in seen) < 1000 + SLACK_MS + LOAD_MS


def test_programs_without_their_helper(san: World, tmp_path: Path) -> None:
    """P5, P8, O1: A real program whose helper is gone, stopped or back connects in time, and says why it is on TCP."""
    (tmp_path / "site_policy.py").write_text(FUNCTIONS)
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'version = 1\n[defaults]\nengine = "helper"\ntimeout_ms = 500\n'
        '[[rule]]\nrole = "connect"\nuse = "python:site_policy:fine"\n'
    )
    environment = switched_environment("--policy", str(policy))
    table = environment["INTERPOSER_TABLE"]
    wait_until(lambda: helpers_of_sanrun(table) == [])
    san.stage.environments = {**san.stage.environments, "asking": environment}
    listener, address = san.listener(backlog=64)
    actor = san.stage.start("asking", "asking")

    def connects() -> tuple[bool, float]:
        begun = time.monotonic()
        fd = actor.socket()
        assert actor.connect(fd, address) == 0
        took = (time.monotonic() - begun) * 1000
        accepted, _ = san.server.accept(listener)
        assert actor.send(fd, b"works") == 5
        assert san.server.recv(accepted, 10) == b"works"
        return bool(companion_name(actor, fd)), took

    assert connects()[0] is False
    assert reasons_of(actor) == {"ENGINE_NO_HELPER": 1}
    with subprocess.Popen([SANRUN, "--policy", policy, "sleep", "60"], env=plain_environment()) as other:
        try:
            wait_until(lambda: len(helpers_of_sanrun(table)) == 1 and psutil.Process(other.pid).name() == "sleep")
            (process,) = helpers_of_sanrun(table)
            actor.close(actor.socket())
            process.suspend()
            try:
                on_san, took = connects()
            finally:
                process.resume()
            assert (on_san, reasons_of(actor).get("FUNCTION_TIMEOUT")) == (False, 1)
            assert took < 500 + SLACK_MS + LOAD_MS
            assert connects()[0] is True
            process.kill()
            wait_until(lambda: helpers_of_sanrun(table) == [])
            # The answer that it gave is remembered; another question is asked.
            assert connects()[0] is True
        finally:
            other.kill()


def helpers_of_sanrun(table: str) -> list[psutil.Process]:
    """The helpers at the address that sanrun gave a table."""
    name = f"@{table_cache.helper_address(table)}"
    with open("/proc/net/unix", errors="replace") as sockets:
        inodes = {line.split()[6] for line in sockets if line.rstrip("\n").endswith(name)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name() == "sanrun-helper":
                links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
                if any(f"socket:[{inode}]" in links for inode in inodes):
                    found.append(process)
    return found


def reasons_of(actor: Actor) -> dict[str, int]:
    return dict(stats.process(actor.pid).reasons)


# --- a table that goes bad under the helper ---------------------------------------------------------------------------


def remove(place: Path) -> None:
    if place.is_dir():
        place.rmdir()
    else:
        place.unlink(missing_ok=True)
    place.with_suffix(".real").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [kind for kind in RUINS if kind != "unreadable"])  # which root can read
def test_helper_under_a_bad_table(tmp_path: Path, kind: str) -> None:
    """P6, P8, X3: A helper whose table is replaced by something bad goes on with the one it has, for programs that have
    that one too; a good table is taken at once."""
    table = table_of(tmp_path, defaults="timeout_ms = 2000\n")
    place = Path(table)
    good = place.read_bytes()
    generation = Table(good).generation
    other = Path(write_table(tmp_path, TCP_POLICY, FUNCTIONS)).read_bytes()
    put(place, good)
    with launched(tmp_path, table), connection_of(tmp_path) as client:
        for asked in (generation, generation + 1):
            remove(place)
            RUINS[kind](place, other)
            assert question(client, generation=asked)[2:4] == (generation, SAN)
        remove(place)
        put(place, other)
        fresh = Table(other).generation
        assert fresh != generation
        assert question(client, generation=fresh)[2:4] == (fresh, TCP)
        assert len(helpers(table)) == 1


# --- clients that abuse it --------------------------------------------------------------------------------------------


def connection_of(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(20)
    connection.connect(b"\0" + address_of(directory).encode())
    return connection


def asking(number: int = 7, generation: int = 0, function: int = FUNCTION_NONE) -> bytes:
    """A connect to 127.0.0.1:81; without a function, the whole decision."""
    rule = FUNCTION_NONE if function == FUNCTION_NONE else 0
    return QUESTION.pack(REQUEST, number, generation, 2, 2, 0, function, rule, bytes(16), 0, 0, 0, LOCALHOST, 0, 81, 0)


def question(client: socket.socket, **fields: int) -> tuple[int, ...]:
    client.send(asking(**fields))
    return REPLY.unpack(client.recv(100))


def test_two_hundred_clients_at_once(tmp_path: Path) -> None:
    """P8, X4: 200 threads of four programs ask rules and a function in the same moment; each gets its answer."""
    table = table_of(tmp_path, defaults="timeout_ms = 10000\n")
    command = [support.host(), table, str(HELPER), "at-once", "50"]
    with launched(tmp_path, table):
        programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        outputs = [program.communicate(timeout=60)[0] for program in programs]
        assert [output.splitlines()[0] for output in outputs] == ["good=50"] * 4, outputs
        (process,) = helpers(table)
        wait_until(lambda: process.num_fds() <= 10)


def test_launcher_waits_for_a_busy_helper(tmp_path: Path) -> None:
    """P8: A program that is started while the helper's backlog is full gets that helper, and not a message."""
    table = table_of(tmp_path, defaults="timeout_ms = 3000\n")
    crowd: list[socket.socket] = []
    with launched(tmp_path, table) as first:
        (process,) = helpers(table)
        process.suspend()
        try:
            with pytest.raises(BlockingIOError):
                while True:
                    crowd.append(connection_of(tmp_path))
            environment = {**os.environ, "PYTHONPATH": str(support.ROOT)}
            command = [sys.executable, "-c", LAUNCH, table, address_of(tmp_path), "sleep", "60"]
            with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as second:
                assert second.stderr
                with pytest.raises(subprocess.TimeoutExpired):
                    second.wait(0.5)
                process.resume()
                wait_until(lambda: psutil.Process(second.pid).name() == "sleep")
                first.kill()
                first.wait(10)
                assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]
                assert helpers(table) == [process]
                second.kill()
                assert second.stderr.read() == ""
        finally:
            process.resume()
            for one in crowd:
                one.close()


def flood(client: socket.socket) -> None:
    """Facts without end."""
    client.send(HEAD.pack(FACT, 4) + b"A=")
    while True:
        client.send(HEAD.pack(FACT, 4) + b"a" * 32768)


def drip(client: socket.socket) -> None:
    """Facts without end, byte by byte."""
    while True:
        client.send(HEAD.pack(FACT, 3) + b"a")


def garbage(client: socket.socket) -> None:
    while True:
        client.send(os.urandom(1 + os.urandom(1)[0]))


def oversized(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.send(HEAD.pack(FACT, 4) + bytes(150_000))
    client.send(asking() + bytes(150_000))
    client.recv(100)


def deaf(client: socket.socket) -> None:
    """Asks and never reads."""
    while True:
        client.send(asking())


def watches(client: socket.socket) -> None:
    """Wants descriptors watched that are no processes."""
    read, write = os.pipe()
    try:
        for fds in ([read], [write], [client.fileno()], [read] * 200):
            socket.send_fds(client, [HEAD.pack(WATCH, 0)], fds)
    finally:
        os.close(read)
        os.close(write)
    client.recv(100)


def slow_facts(client: socket.socket) -> None:
    """Facts on which the policy's predicates take long."""
    with contextlib.suppress(OSError):  # the helper hangs up
        client.send(HEAD.pack(FACT, 4) + b"X=")
        for _ in range(210):
            client.send(HEAD.pack(FACT, 4) + b"ab" * 16384)
        client.send(HEAD.pack(FACT, 4) + b"\0")
        while True:
            client.send(asking())
            client.recv(100)


ABUSES = (flood, drip, garbage, oversized, deaf, watches)


def test_clients_that_abuse_it(tmp_path: Path) -> None:
    """X4, P5: While clients send endless, oversized, garbled and unread messages, another's questions are answered."""
    table = table_of(tmp_path, defaults="timeout_ms = 3000\n", more='[[process]]\nenv = "X=*ac*ac*"\nengine = "off"\n')
    stop = threading.Event()
    clients: dict[object, socket.socket] = {}
    dropped: Counter[object] = Counter()

    def abuse(how: Callable[[socket.socket], None]) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), connection_of(tmp_path) as clients[how]:
                how(clients[how])
            dropped[how] += 1

    with launched(tmp_path, table), asker(table) as ask:
        assert ask()[:2] == (SAN, 0)
        (process,) = helpers(table)
        idle = [connection_of(tmp_path) for _ in range(100)]
        threads = [threading.Thread(target=abuse, args=(how,), daemon=True) for how in ABUSES]
        for thread in threads:
            thread.start()
        times = []
        until = time.monotonic() + 3
        try:
            # `drip` takes minutes to have sent too much.
            while time.monotonic() < until or not all(dropped[how] for how in ABUSES if how is not drip):
                assert time.monotonic() < until + 20, dropped
                action, reason, ms = ask()
                assert (action, reason) == (SAN, 0), support.log(table)
                times.append(ms)
                time.sleep(0.005)
            assert process.memory_info().rss < 200 << 20
        finally:
            stop.set()
            while any(thread.is_alive() for thread in threads):
                for client in clients.values():
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)
                time.sleep(0.05)
            for one in idle:
                one.close()
        print(f"{len(times)} questions, the slowest {max(times):.0f} ms")
        assert helpers(table) == [process]
        wait_until(lambda: process.num_fds() <= 10)
        assert ask()[:2] == (SAN, 0)


def test_facts_that_take_long(tmp_path: Path) -> None:
    """X4, P5: Megabytes of facts under many-starred predicates do not hold up others for longer than their questions
    may take."""
    table = table_of(tmp_path, defaults="timeout_ms = 500\n", more='[[process]]\nenv = "X=*ac*ac*"\nengine = "off"\n')
    with launched(tmp_path, table), asker(table) as ask, connection_of(tmp_path) as client:
        assert ask()[:2] == (SAN, 0)
        threading.Thread(target=slow_facts, args=(client,), daemon=True).start()
        seen = [ask() for _ in range(100)]
        client.shutdown(socket.SHUT_RDWR)
        assert {said[:2] for said in seen} == {(SAN, 0)}, (seen, support.log(table))


def test_more_clients_than_descriptors(tmp_path: Path) -> None:
    """X4, X6: A helper without a free descriptor keeps serving those it has, and new ones when there is room again."""
    table = table_of(tmp_path, defaults="timeout_ms = 3000\n")
    with launched(tmp_path, table), asker(table) as ask:
        assert ask()[:2] == (SAN, 0)
        (process,) = helpers(table)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
        crowd = [connection_of(tmp_path) for _ in range(80)]
        for _ in range(5):
            assert ask()[:2] == (SAN, 0)
        for one in crowd:
            one.close()
        assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]
        assert helpers(table) == [process]
