"""Compiled policies that are damaged, hostile or replaced all the time: TCP and a reason, never a crash, never a stall,
never half of one policy and half of another."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from flows_driver import (
    BAD,
    STUB,
    ZERO,
    Host,
    Request,
    build,
    decide_command,
    facts_command,
    foretold,
    put,
    running,
    table_of,
    with_checksum,
)
from puppet import SANRUN, Actor, switched_environment
from world import World, companion_name

from interposer.config.model import Function, Place, Policy, Rule
from interposer.config.parse import read_policy
from interposer.diag import stats
from interposer.policy import table
from interposer.policy.engine import Engine, Facts, Table

ROOT = os.geteuid() == 0
STRANGER = 61234
LOCALHOST = table.V4_PREFIX + bytes([127, 0, 0, 1])


# --- programs ---------------------------------------------------------------------------------------------------------


def written(data: Callable[[bytes], bytes], mode: int = 0o644) -> Callable[[Path, bytes], None]:
    def make(path: Path, good: bytes) -> None:
        path.write_bytes(data(good))
        path.chmod(mode)

    return make


def of_a_stranger(path: Path, good: bytes) -> None:
    path.write_bytes(good)
    os.chown(path, STRANGER, STRANGER)


def link(path: Path, good: bytes) -> None:
    real = path.with_suffix(".real")
    real.write_bytes(good)
    path.symlink_to(real)


def bound_socket(path: Path, good: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def one_bit(good: bytes) -> bytes:
    """What changes a verdict: the action of a rule, or the default provider."""
    data = bytearray(good)
    header = table.HEADER.unpack_from(good)
    if header[11]:
        data[header[10] + 1] ^= 2
    else:
        data[header[6] + (header[7] - 1) * table.SECTION.size + 26] ^= 1
    return bytes(data)


def version(number: int) -> Callable[[bytes], bytes]:
    return lambda good: good[:8] + struct.pack("=I", number) + good[12:]


RUINS: dict[str, Callable[[Path, bytes], object]] = {
    "missing": lambda path, good: None,
    "empty": written(lambda good: b""),
    "half a header": written(lambda good: good[:50]),
    "a header": written(lambda good: good[: table.HEADER.size]),
    "half": written(lambda good: good[: len(good) // 2]),
    "a byte short": written(lambda good: good[:-1]),
    "a byte long": written(lambda good: good + b"\0"),
    "older": written(version(0)),
    "newer": written(version(2)),
    "random": written(lambda good: os.urandom(len(good))),
    "one bit": written(one_bit),
    "other architecture": written(lambda good: good[:8] + good[8:12][::-1] + good[12:16][::-1] + good[16:]),
    "writable by the group": written(lambda good: good, 0o664),
    "writable by all": written(lambda good: good, 0o646),
    "a link": link,
    "a pipe": lambda path, good: os.mkfifo(path, 0o644),
    "a directory": lambda path, good: path.mkdir(),
    "a socket": bound_socket,
    **({"a stranger's": of_a_stranger, "unreadable": written(lambda good: good, 0o600)} if ROOT else {}),
}
MENDED_IN_PLACE = ("writable by the group", "writable by all", "a stranger's", "unreadable")


def mend(kind: str, path: Path, good: bytes) -> None:
    """A good table appears: by chmod and chown where that is enough, else by a rename, as the launcher does it."""
    if kind in MENDED_IN_PLACE:
        os.chown(path, os.geteuid(), -1)
        path.chmod(0o644)
        return
    if path.is_dir():
        path.rmdir()
    put(path, good)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where other users can read."""
    with tempfile.TemporaryDirectory(prefix="tables-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def connects(san: World, actor: Actor, listener: int, address: tuple[str, int]) -> bool:
    """Whether a new connection is on the SAN. It works in any case, at once, and carries data."""
    begun = time.monotonic()
    fd = actor.socket()
    assert actor.connect(fd, address) == 0
    assert time.monotonic() - begun < 2
    accepted, _ = san.server.accept(listener)
    assert actor.send(fd, b"works") == 5
    assert san.server.recv(accepted, 10) == b"works"
    on_san = bool(companion_name(actor, fd))
    actor.close(fd)
    san.server.close(accepted)
    return on_san


def reasons_of(actor: Actor) -> dict[str, int]:
    return dict(stats.process(actor.pid).reasons)


def test_programs_under_bad_tables(san: World, folder: Path) -> None:
    """X3, O1, P6: A program whose table is bad runs on TCP and says BAD_TABLE; a good table that appears is taken
    within a second."""
    good = Path(san.stage.environments["client"]["INTERPOSER_TABLE"]).read_bytes()
    listener, address = san.listener(backlog=64)
    actors = {}
    for kind, ruin in RUINS.items():
        path = folder / kind.replace(" ", "-").replace("'", "")
        ruin(path, good)
        side = {**san.stage.environments["client"], "INTERPOSER_TABLE": str(path)}
        san.stage.environments = {**san.stage.environments, kind: side}
        options = {"user": STRANGER, "group": STRANGER, "extra_groups": []} if kind == "unreadable" else {}
        actor = san.stage.start(path.name, kind, **options)
        assert not connects(san, actor, listener, address), kind
        own = actor.socket()
        assert actor.bind(own, ("127.0.0.1", 0)) == 0
        assert actor.listen(own, 5) == 0
        assert reasons_of(actor) == {"BAD_TABLE": 2}, kind
        actors[kind] = actor, path
    for kind, (_, path) in actors.items():
        mend(kind, path, good)
    time.sleep(1)
    for kind, (actor, _) in actors.items():
        assert connects(san, actor, listener, address), (kind, reasons_of(actor))


def test_places_that_are_no_files(san: World, folder: Path) -> None:
    """X3, O1: An inherited descriptor, devices and files of the kernel are not taken for tables, and nothing waits."""
    path = put(folder / "table", Path(san.stage.environments["client"]["INTERPOSER_TABLE"]).read_bytes())
    listener, address = san.listener()
    with path.open("rb") as good:
        fd = good.fileno()
        places = [f"/proc/self/fd/{fd}", f"/dev/fd/{fd}", "/dev/zero", "/dev/stdin", "/proc/self/environ", "/"]
        places += [f"{path}/x", "/" + "x" * 5000]
        for number, place in enumerate((*places, "table", "./table", "")):
            side = {**san.stage.environments["client"], "INTERPOSER_TABLE": place}
            san.stage.environments = {**san.stage.environments, place: side}
            actor = san.stage.start(f"place{number}", place, pass_fds=(fd,), cwd=folder)
            assert not connects(san, actor, listener, address), place
            # By a relative path the switch stays off.
            assert reasons_of(actor) == ({"BAD_TABLE": 1} if place.startswith("/") else {}), place


def test_table_that_goes_bad_changes_nothing(san: World, folder: Path) -> None:
    """X3, P6: What replaces a good table and is bad leaves the verdicts of running programs as they are."""
    good = Path(san.stage.environments["client"]["INTERPOSER_TABLE"]).read_bytes()
    other = Path(switched_environment("--provider", "tcp")["INTERPOSER_TABLE"]).read_bytes()
    listener, address = san.listener(backlog=64)
    actors = {}
    for kind in set(RUINS) - {"unreadable"}:  # which root can read
        path = put(folder / kind.replace(" ", "-").replace("'", ""), good)
        side = {**san.stage.environments["client"], "INTERPOSER_TABLE": str(path)}
        san.stage.environments = {**san.stage.environments, kind: side}
        actors[kind] = san.stage.start(path.name, kind), path
        assert connects(san, actors[kind][0], listener, address), kind
    for kind, (_, path) in actors.items():
        path.unlink()
        RUINS[kind](path, other)
    time.sleep(1)
    for kind, (actor, _) in actors.items():
        assert connects(san, actor, listener, address), (kind, reasons_of(actor))
        assert reasons_of(actor) == {}, kind


# --- every bit --------------------------------------------------------------------------------------------------------

POLICY = """\
version = 1
[defaults]
providers = ["unix"]
[[process]]
exe = "/usr/*/nginx"
arg = ["-c", "a*b"]
env = "A=?"
otherwise = "error"
[[process.rule]]
role = "connect"
remote = ["10.0.0.0/8:80-90", "[fd00::]/9"]
use = "python:site_policy:f"
[[process]]
name = "nginx"
user = 0
cgroup = "/system.slice/*"
engine = "startup"
[[process.rule]]
local = "*:8080"
use = "tcp"
[[rule]]
role = "listen"
local = ["127.0.0.1:6379", "[::1]:6379"]
use = ["unix"]
[[rule]]
remote = ":5432"
use = "python:site_policy:g"
timeout_ms = 50
"""
FACTS = Facts(b"/usr/sbin/nginx", b"nginx", (b"nginx", b"-c", b"ab"), (b"A=a",), (b"/system.slice/x",), 0)
REQUESTS: tuple[Request, ...] = (
    (table.ROLE_CONNECT, 2, ZERO, 0, table.V4_PREFIX + bytes([10, 1, 2, 3]), 85),
    (table.ROLE_CONNECT, 10, ZERO, 0, b"\xfd" + bytes(15), 5432),
    (table.ROLE_CONNECT, 2, LOCALHOST, 8080, LOCALHOST, 5432),
    (table.ROLE_LISTEN, 2, LOCALHOST, 6379, ZERO, 0),
    (table.ROLE_LISTEN, 10, ZERO, 8080, ZERO, 0),
)
U32 = (0, 1, 2, 3, 4, 5, 7, 8, 35, 36, 72, 103, 104, 108, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
OVERFLOWS = tuple((1 << 32) // size + more for size in (4, 16, 24, 36, 72) for more in (0, 1))


class Fuzzer:
    """Gives damaged tables to a host under sanitizers, and compares what it takes with the Python engine."""

    def __init__(self, host: Host, folder: Path) -> None:
        (folder / "site_policy.py").write_text("def f(request): return 'tcp'\ndef g(request): return 'tcp'\n")
        (folder / "policy.toml").write_text(POLICY)
        policy, problems, _ = read_policy([str(folder / "policy.toml")])
        assert not problems
        self.good = table_of(policy)
        self.path = folder / "table"
        self.host = host
        self.taken = self.refused = 0
        self.slowest = 0.0
        assert host.tell(facts_command(FACTS), STUB) == ["ok", "ok"]

    def give(self, data: bytes) -> None:
        self.path.write_bytes(data)
        begun = time.monotonic()
        commands = (f"load {self.path}", *map(decide_command, REQUESTS), "text 0 40", "text 4294967295 40", "state")
        said, *answers = self.host.tell(*commands)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        if said == BAD:
            self.refused += 1
            return
        assert said == "0", said
        self.taken += 1
        engine = Engine(Table(data), FACTS)
        assert answers[: len(REQUESTS)] == [foretold(engine, request) for request in REQUESTS], data.hex()

    def done(self, taken: int, refused: int) -> None:
        print(f"{self.taken} taken, {self.refused} refused, slowest {self.slowest * 1000:.0f} ms")
        assert self.taken > taken
        assert self.refused > refused
        assert self.slowest < 5


@pytest.fixture
def fuzzer(tmp_path: Path) -> Iterator[Fuzzer]:
    with running(build("address,undefined")) as host:
        yield Fuzzer(host, tmp_path)


def sized(data: bytes) -> bytes:
    """With its own length in the header."""
    return data[:12] + struct.pack("=I", len(data)) + data[16:] if len(data) >= 16 else data


def areas(good: bytes) -> list[tuple[int, int]]:
    """Where the header's arrays begin, and how long they are: sections, predicates, rules, functions, strings, path."""
    header = table.HEADER.unpack_from(good)
    sizes = (table.SECTION.size, table.PREDICATE.size, table.RULE.size, table.FUNCTION.size, 1, 4)
    return [(header[6 + 2 * i], header[7 + 2 * i] * size) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_length(fuzzer: Fuzzer, step: int) -> None:
    """X3: A table cut anywhere is refused, even if its length and checksum are right."""
    good = fuzzer.good
    ends = {begin + size + near for begin, size in areas(good) for near in (-4, -1, 0, 1, 4)}
    for length in sorted({*range(0, len(good), step), *ends} & set(range(len(good)))):
        fuzzer.give(good[:length])
        if length >= table.HEADER.size:
            fuzzer.give(with_checksum(sized(good[:length])))
    assert fuzzer.taken == 0
    fuzzer.give(good)
    assert fuzzer.taken == 1


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.long)])
def test_every_bit(fuzzer: Fuzzer, step: int) -> None:
    """X3, P2: With any bit of the header, or a bit of any field of the arrays, flipped under a right checksum a table
    is refused, or C and Python read it alike."""
    good = fuzzer.good
    header = 8 * table.HEADER.size
    for bit in (*range(header), *range(header, 8 * len(good), step)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        fuzzer.give(with_checksum(bytes(data)))
    fuzzer.done(taken=200, refused=500)


def damaged(random_: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    if random_.random() < 0.03:
        return with_checksum(good[:32] + random_.randbytes(len(good) - 32))
    for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
        kind = random_.randrange(8)
        if kind < 2:  # a number of the header
            at = random_.randrange(8, table.HEADER.size, 4)
        elif kind < 5:  # a number of an array, each array as often
            begin, size = random_.choice([area for area in areas(good)[:4] if area[1]])
            at = begin + random_.randrange(0, size, 4)
        else:
            at = random_.randrange(8, len(data))
        number = random_.choice((*U32, *OVERFLOWS, len(good), len(good) - 4, random_.getrandbits(32)))
        if random_.random() < 0.3 and at + 4 <= len(data):
            number = (int.from_bytes(data[at : at + 4], "little") + random_.choice((-4, -1, 1, 4))) & 0xFFFFFFFF
        if kind < 5:
            data[at : at + 4] = struct.pack("=I", number)
        elif kind == 5:
            data[at] = random_.choice((0, 1, 2, 3, 0x7F, 0x80, 0xFF, random_.getrandbits(8)))
        elif kind == 6:
            source = random_.randrange(len(good))
            piece = good[source : source + random_.choice((4, 16, 36, 72))]
            data[at : at + len(piece)] = piece
        else:
            del data[at:]
            data += random_.randbytes(random_.choice((0, 0, 4, 100)))
        if len(data) < table.HEADER.size:
            break
    out = bytes(data)
    if random_.random() < 0.9:
        out = sized(out)
    return with_checksum(out) if len(out) >= table.HEADER.size and random_.random() < 0.95 else out


def fuzz(fuzzer: Fuzzer, seed: int, count: int) -> None:
    random_ = random.Random(seed)
    for _ in range(count):
        fuzzer.give(damaged(random_, fuzzer.good))
    fuzzer.done(taken=count // 50, refused=count // 2)


def test_damaged_tables(fuzzer: Fuzzer) -> None:
    """X3, P2: Tables with wrong numbers, offsets that overflow, copied and missing pieces, under a right checksum."""
    fuzz(fuzzer, 1, 3000)


@pytest.mark.long
def test_100_000_damaged_tables(fuzzer: Fuzzer) -> None:
    """X3, P2: As above, 100,000 of them."""
    fuzz(fuzzer, 2, 100_000)


def grown(good: bytes, sections: int, rules: int, ranges: Callable[[int], tuple[int, int]]) -> bytes:
    """A table with that many sections and rules; `ranges` says which rules a section has."""
    header = list(table.HEADER.unpack_from(good))
    rule = good[header[10] : header[10] + table.RULE.size]
    strings = good[header[14] : header[14] + header[15]]
    providers = bytes([1, 0, 0, 0])
    body = b"".join(table.SECTION.pack(0, 0, *ranges(i), 0, 0, 1, 1, providers, 0) for i in range(sections))
    begin = table.HEADER.size
    header[6:10] = begin, sections, begin, 0
    header[10:14] = begin + len(body), rules, begin, 0
    body += rule * rules
    header[14:18] = begin + len(body), len(strings), begin, 0
    header[18:23] = [0] * 5
    return with_checksum(sized(table.HEADER.pack(*header) + body + strings))


def test_sections_that_share_rules(fuzzer: Fuzzer) -> None:
    """X3: A small file cannot be a policy of a billion rules, which would take minutes to index, or overflow."""
    good = table_of(Policy(rules=(rule(3),)))
    for number in (3000, 90_000):
        fuzzer.give(grown(good, number, number, lambda i, number=number: (0, number)))
    fuzzer.give(grown(good, 3, 2, lambda i: (1, 1)))
    assert (fuzzer.taken, fuzzer.refused) == (0, 3)
    fuzzer.give(grown(good, 50, 100_000, lambda i: (i * 2000, 2000)))
    assert fuzzer.taken == 1
    assert fuzzer.slowest < 5


def test_functions_that_may_take_hours(fuzzer: Fuzzer) -> None:
    """P5, X3: A table that allows a function more time than a policy can is refused."""
    begin, size = areas(fuzzer.good)[3]
    for timeout in (0, 10_001, 0x7FFFFFFF, 0xFFFFFFFF):
        data = bytearray(fuzzer.good)
        struct.pack_into("=I", data, begin + size - table.FUNCTION.size + 8, timeout)
        fuzzer.give(with_checksum(bytes(data)))
    assert (fuzzer.taken, fuzzer.refused) == (0, 4)


# --- while it changes -------------------------------------------------------------------------------------------------


def rule(line: int, **fields: object) -> Rule:
    values: dict[str, object] = {"role": 3, "local": (), "remote": (), "action": 2, "otherwise": 0, "providers": ()}
    return Rule(place=Place("/etc/p.toml", line), **{**values, **fields})  # type: ignore[arg-type]


def counting_table(number: int) -> bytes:
    """As flows_host.c's generation_thread wants it."""
    from interposer.config.addresses import parse_pattern

    idle = [rule(n, role=table.ROLE_LISTEN, local=(parse_pattern(":1"),)) for n in range(number)]
    told = (
        {"action": table.ACTION_SAN, "otherwise": 2, "providers": ("unix",)}
        if number % 2
        else {"action": 1, "otherwise": 1}
    )
    direct = rule(1000, role=table.ROLE_CONNECT, remote=(parse_pattern(":1-50"),), **told)
    function = Function("m", "f", 100, "/m.py", Place("/etc/p.toml", 1))
    asks = rule(1001, role=table.ROLE_CONNECT, action=table.ACTION_ASK, function=function)
    return table_of(Policy(rules=(*idle, direct, asks)))


def test_replaced_while_eight_threads_decide(tmp_path: Path) -> None:
    """P6, T13: Each decision is wholly of one table, direct, asked or remembered, and none is of an older one than the
    decision before it. Under the thread sanitizer."""
    tables = [counting_table(number) for number in range(210)]
    path = put(tmp_path / "table", tables[0])
    with running(build("thread")) as host:
        # A second of the host's clock is 2.5 ms, so that it sees most of the tables.
        assert host.tell("hurry 400", f"load {path}") == ["ok", "0"]
        host.start("generations 8")
        for number, data in enumerate(tables):
            put(path, data)
            # The host takes 8 ms to read one table in four: the next one comes meanwhile, or after all have seen it.
            time.sleep((0.004, 0.004, 0.03)[number % 3])
        time.sleep(0.1)
        host.start("stop")
        decisions, questions, mixed, backward, last = map(int, host.finish().split())
        print(f"{decisions} decisions, {questions} questions")
        assert (mixed, backward, last) == (0, 0, len(tables) - 1)
        assert decisions > 5000
        assert questions > 100


def test_replaced_without_memory(tmp_path: Path) -> None:
    """P6, X6: Without memory for a new table the old one stays, whole; with memory again the new one is taken."""
    path = put(tmp_path / "table", counting_table(2))
    with running(build("address,undefined")) as host:
        assert host.tell("hurry 100", f"load {path}", "starve 1") == ["ok", "0", "ok"]
        put(path, counting_table(3))
        request = decide_command((table.ROLE_CONNECT, 2, ZERO, 0, LOCALHOST, 7))
        for _ in range(5):
            assert host.ask(request).startswith("1 1 0,0,0,0 1 2 ")
            time.sleep(0.02)
        assert host.ask("starve 0") == "ok"
        time.sleep(0.02)
        assert host.ask(request).startswith("2 2 1,0,0,0 0 3 ")


class Writer:
    """Does something again and again while others work."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.steps = steps
        self.ended = threading.Event()
        self.times = 0
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.ended.is_set():
            for step in self.steps:
                step()
                self.times += 1
                time.sleep(0.003)

    def __enter__(self) -> Writer:
        self.thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self.ended.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def started(folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit status, verdict for a connect in the program's table, and what was said on standard error."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "run"), "XDG_CONFIG_HOME": str(folder)}
    done = subprocess.run([SANRUN, *options, "env", "-0"], env=environment, capture_output=True, text=True, timeout=60)
    variables = dict(word.partition("=")[::2] for word in done.stdout.split("\0"))
    if "INTERPOSER_TABLE" not in variables:
        return done.returncode, "", done.stderr
    data = Path(variables["INTERPOSER_TABLE"]).read_bytes()
    assert table.sound(data)
    compiled = Table(data)
    action, otherwise, _, _, number, _ = Engine(compiled, Facts()).decide(*REQUESTS[0])
    line = "-" if number == table.RULE_DEFAULT else str(compiled.rules[number].line)
    return done.returncode, f"{action} {otherwise} {line}", done.stderr


def started_often(folder: Path, *options: str, times: int = 30) -> list[tuple[int, str, str]]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda _: started(folder, *options), range(times)))


def rewrite(path: Path, text: str) -> Callable[[], None]:
    """By a rename, as editors do it."""

    def write() -> None:
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.rename(path)

    return write


TCP = 'version = 1\n[defaults]\notherwise = "tcp"\n[[rule]]\nuse = "tcp"\n'
SAN = 'version = 1\n[defaults]\notherwise = "error"\n# more\n# lines\n[[rule]]\nuse = "unix"\n'


def test_policy_rewritten_while_programs_start(tmp_path: Path) -> None:
    """P4, P6: Every start is by the whole old or the whole new policy, and the last one written wins."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "policy.toml"
    tcp, san = rewrite(path, TCP), rewrite(path, SAN)
    tcp()
    with Writer(san, tcp) as writer:
        results = started_often(tmp_path, "--policy", str(path))
    assert writer.times > 50
    assert {(status, verdict) for status, verdict, _ in results} <= {(0, "1 1 4"), (0, "2 2 6")}, results
    for write, verdict in ((tcp, "1 1 4"), (san, "2 2 6")) * 3:
        write()
        assert started(tmp_path, "--policy", str(path)) == (0, verdict, "")


def test_policy_cut_while_programs_start(tmp_path: Path) -> None:
    """P4: A file that is written in place is read whole, or refused by name; nobody sees a traceback."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "policy.toml"
    # Cut anywhere, it is no policy: the last line counts.
    text = "version = 1\n[[rule]]\nuse = [\n" + "# much\n" * 300 + '"tcp"]\n'

    def write() -> None:
        with path.open("w") as file:
            for start in range(0, len(text), 300):
                file.write(text[start : start + 300])
                file.flush()

    write()
    with Writer(write):
        results = started_often(tmp_path, "--policy", str(path))
    for status, verdict, said in results:
        assert (status, verdict) in ((0, "1 1 2"), (125, "")), said
        assert "Traceback" not in said
        assert status == 0 or str(path) in said
    assert started(tmp_path, "--policy", str(path)) == (0, "1 1 2", "")


@pytest.mark.parametrize("named", [True, False])
def test_drop_ins_appear_and_vanish(tmp_path: Path, named: bool) -> None:
    """P4, P6: policy.d/*.toml may come and go while programs start: every start is with them or without."""
    (tmp_path / "run").mkdir()
    place = tmp_path / "interposer"
    (place / "policy.d").mkdir(parents=True)
    (place / "policy.toml").write_text("version = 1\n")
    drop_in = place / "policy.d" / "10.toml"
    appear = rewrite(drop_in, 'version = 1\n[[rule]]\nuse = "tcp"\n')
    options = ("--policy", str(place / "policy.toml")) if named else ()
    with Writer(appear, drop_in.unlink) as writer:
        results = started_often(tmp_path, *options, times=40)
    assert writer.times > 50
    assert {(status, verdict) for status, verdict, _ in results} <= {(0, "2 1 -"), (0, "1 1 2")}, results
    with suppress(FileNotFoundError):
        drop_in.unlink()
    assert started(tmp_path, *options) == (0, "2 1 -", "")
    appear()
    assert started(tmp_path, *options) == (0, "1 1 2", "")


def test_table_is_never_seen_half_written(tmp_path: Path) -> None:
    """X3, P6: While launchers write one table over and over, a reader finds it whole each time, and nothing is left."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "policy.toml"
    rules = [f'[[rule]]\nremote = "10.0.0.{n}:80"\n' for n in range(200)]
    steps = [rewrite(path, "version = 1\n" + "".join(rules[:count])) for count in (100, 200)]
    steps[0]()
    assert started(tmp_path, "--policy", str(path)) == (0, "2 1 -", "")
    (place,) = (tmp_path / "run" / "interposer").glob("table-*")
    seen = set()
    with Writer(*steps), ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(started, tmp_path, "--policy", str(path)) for _ in range(8)]
        while not all(run.done() for run in runs):
            data = place.read_bytes()
            assert table.sound(data)
            assert stat.S_IMODE(place.stat().st_mode) == 0o644
            seen.add(len(data))
            time.sleep(0.001)
    assert [run.result() for run in runs] == [(0, "2 1 -", "")] * 8
    assert len(seen) > 1
    assert [file.name for file in place.parent.iterdir()] == [place.name]
