"""The decision in C (native/flows.c and its parts) and in Python (policy/engine.py), on the same tables."""

from __future__ import annotations

import ipaddress
import os
import random
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from build_c import HOSTS, NATIVE, compile_c

from interposer.config.compile import compile_policy
from interposer.config.model import ALL_PORTS, Function, Pattern, Place, Policy, Predicate, Rule, Section
from interposer.policy import reasons, table
from interposer.policy.engine import Engine, Facts, Table

SOURCES = ("flows.c", "policy_table.c", "rule_index.c", "predicates.c", "endpoint.c", "real.c")
ZERO = bytes(16)


def v4(text: str) -> bytes:
    return table.V4_PREFIX + bytes(int(part) for part in text.split("."))


def v6(text: str) -> bytes:
    return ipaddress.IPv6Address(text).packed


class Host:
    """A running flows_host."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="surrogateescape"
        )

    def tell(self, *commands: str) -> list[str]:
        assert self.process.stdin and self.process.stdout
        answers = []
        # In portions that fit the pipes, so that neither side waits for the other.
        for start in range(0, len(commands), 50):
            portion = commands[start : start + 50]
            self.process.stdin.write("".join(command + "\n" for command in portion))
            self.process.stdin.flush()
            for command in portion:
                line = self.process.stdout.readline()
                assert line, f"the host died at {command!r}: {self.process.wait(timeout=10)}"
                answers.append(line.rstrip("\n"))
        return answers

    def ask(self, command: str) -> str:
        return self.tell(command)[0]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(timeout=10) == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("flows") / "flows_host"
    return compile_c(output, HOSTS / "flows_host.c", *(NATIVE / name for name in SOURCES))


@pytest.fixture
def host(program: Path) -> Iterator[Host]:
    running = Host(program)
    try:
        yield running
        running.close()
    finally:
        running.process.kill()
        running.process.wait(timeout=10)


def table_of(policy: Policy, **options: object) -> bytes:
    launcher = {
        "libpython": "/usr/lib/libpython3.11.so.1.0",
        "python_home": "/usr",
        "search_path": ["/usr/lib/python3.11"],
        "engine_module": "/opt/engine.so",
        "helper": "",
        "key": "key",
    }
    return compile_policy(policy, **{**launcher, **options})  # type: ignore[arg-type]


def facts_command(facts: Facts) -> str:
    def text(value: bytes) -> str:
        return value.hex() or "-"

    def many(values: tuple[bytes, ...]) -> str:
        return text(b"".join(value + b"\0" for value in values))

    return (
        f"facts {facts.user} {text(facts.exe)} {text(facts.name)} {many(facts.arguments)} "
        f"{many(facts.environment)} {many(facts.cgroups)}"
    )


def put(path: Path, data: bytes) -> Path:
    """As the launcher does: a temporary name, then a rename."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.chmod(0o644)
    os.replace(fresh, path)
    return path


# Small pools, so that random rules and requests meet.
ADDRESSES = [
    v4("0.0.0.0"), v4("127.0.0.1"), v4("127.0.0.2"), v4("10.0.0.1"), v4("10.1.2.3"), v4("255.255.255.255"),
    v6("::"), v6("::1"), v6("fd00::1"), v6("fd00:0:0:1::1"), v6("::fffe:7f00:1"), v6("::ffff:0:0"), b"\xff" * 16,
]  # fmt: skip
PREFIXES = [0, 1, 8, 63, 64, 65, 80, 95, 96, 97, 104, 120, 127, 128]
PORTS = [0, 1, 79, 80, 81, 443, 6379, 8000, 8080, 65534, 65535]
WORDS = [b"redis-server", b"nginx", b"a", b"ab", b"b", b"aab", b"", b"x/y"]
GLOBS = ["*", "?", "a*", "*b", "a?b", "*a*b*", "redis-*", "nginx", "??", "**", "x/*", "*/y", "/usr/*/nginx", "é*"]


def random_pattern(random_: random.Random) -> Pattern:
    families = random_.choice([1, 2, 3, 3])
    prefix = random_.choice(PREFIXES)
    mask = table.prefix_mask(prefix)
    address = (int.from_bytes(random_.choice(ADDRESSES), "big") & mask).to_bytes(16, "big")
    first, last = sorted([random_.choice(PORTS), random_.choice(PORTS)])
    ports = random_.choice([ALL_PORTS, (first, first), (first, last)])
    return Pattern(families, address, prefix, ports, "")


def random_rule(random_: random.Random, line: int) -> Rule:
    place = Place(random_.choice(["/etc/a.toml", "/etc/b.toml"]), line)
    action = random_.choice([table.ACTION_TCP, table.ACTION_SAN, table.ACTION_SAN, table.ACTION_ASK])
    function = None
    if action == table.ACTION_ASK:
        function = Function("m", random_.choice(["f", "g"]), random_.choice([100, 200]), "/etc/m.py", place)
    return Rule(
        place=place,
        role=random_.randint(1, 3),
        local=tuple(random_pattern(random_) for _ in range(random_.choice([0, 0, 1, 2]))),
        remote=tuple(random_pattern(random_) for _ in range(random_.choice([0, 0, 1, 2]))),
        action=action,
        otherwise=random_.choice([0, 0, 1, 2]),
        providers=random_.choice([(), ("unix",)]) if action == table.ACTION_SAN else (),
        function=function,
    )


def random_glob(random_: random.Random, subject: bytes) -> str:
    """Mostly one that has something to do with the subject."""
    text = subject.decode()
    first, last = sorted((random_.randint(0, len(text)), random_.randint(0, len(text))))
    near = [
        text,
        text[:first] + "*" + text[last:],
        text[:first] + "?" + text[first + 1 :],
        text.rpartition("/")[2] + "*",
    ]
    return random_.choice([*near, random_.choice(GLOBS)]) or "*"


def random_predicate(random_: random.Random, facts: Facts) -> Predicate:
    kind = random_.randint(1, 6)
    text, number = "", 0
    if kind == table.PREDICATE_EXE:
        text = random_glob(random_, random_.choice([facts.exe, facts.exe.rpartition(b"/")[2]]))
    elif kind == table.PREDICATE_NAME:
        text = random_glob(random_, facts.name)
    elif kind == table.PREDICATE_ARG:
        text = random_glob(random_, random_.choice([*facts.arguments, b"x"]))
    elif kind == table.PREDICATE_USER:
        number = random_.choice([facts.user, 1000])
    elif kind == table.PREDICATE_CGROUP:
        text = random_glob(random_, random_.choice([*facts.cgroups, b"x"]))
    else:
        name, _, value = random_.choice([*facts.environment, b"A=b"]).decode().partition("=")
        text = name + random_.choice(["", "=", "=" + random_glob(random_, value.encode())])
    return Predicate(kind, text, number, Place("/etc/a.toml", 1))


def random_policy(random_: random.Random, facts: Facts) -> Policy:
    size = random_.choice([0, 1, 3, 8, 8, 30, 200])
    sections = tuple(
        Section(
            place=Place("/etc/a.toml", line),
            predicates=tuple(random_predicate(random_, facts) for _ in range(random_.choice([0, 1, 1, 2]))),
            rules=tuple(random_rule(random_, line + n) for n in range(random_.randint(0, size))),
            engine=random_.choice([0, 0, 0, 1, 1, 4, 5]),
            otherwise=random_.choice([0, 1, 2]),
            providers=random_.choice([(), (), ("unix",)]),
        )
        for line in range(random_.randint(0, 4))
    )
    return Policy(
        place=Place("/etc/a.toml", 3),
        sections=sections,
        rules=tuple(random_rule(random_, 1000 + n) for n in range(random_.randint(0, size))),
        otherwise=random_.choice([1, 2]),
        engine=random_.choice([1, 1, 1, 1, 2, 3, 4, 5]),
    )


def random_facts(random_: random.Random) -> Facts:
    def some(values: list[bytes]) -> tuple[bytes, ...]:
        # An empty string ends a list.
        return tuple(value for value in random_.choices(values, k=random_.randint(0, 3)) if value)

    return Facts(
        exe=random_.choice([b"/usr/bin/", b"/usr/sbin/", b"", b"/"]) + random_.choice(WORDS),
        name=random_.choice(WORDS),
        arguments=some(WORDS),
        environment=some([b"A=a", b"A=", b"B=ab", b"PATH=x/y", b"PATHS=a", b"A", b"B=redis-server"]),
        cgroups=some([b"/", b"/user.slice", b"x/y", b"a"]),
        user=random_.choice([0, 1000, 1001]),
    )


def random_request(random_: random.Random) -> tuple[int, int, bytes, int, bytes, int]:
    def address() -> bytes:
        base = random_.choice(ADDRESSES)
        if random_.random() < 0.3:
            base = (int.from_bytes(base, "big") ^ 1 << random_.randint(0, 127)).to_bytes(16, "big")
        return base

    role = random_.choice([table.ROLE_LISTEN, table.ROLE_CONNECT])
    local = (address(), random_.choice(PORTS)) if random_.random() < 0.7 else (ZERO, 0)
    remote = (address(), random_.choice(PORTS)) if role == table.ROLE_CONNECT else (ZERO, 0)
    return role, random_.choice([2, 10]), *local, *remote


def in_python(engine: Engine, request: tuple[int, int, bytes, int, bytes, int]) -> str:
    """What flows_host prints for the request, foretold from the Python engine."""
    if engine.engine == table.ENGINE_REACTIVE:
        # The stub's answer; what matters is that the whole decision was asked for.
        asked = f"asked {request[0]} {table.FUNCTION_NONE} {table.RULE_DEFAULT}"
        return f"1 {engine.otherwise} 0,0,0,0 26 {table.RULE_DEFAULT} {table.FUNCTION_NONE} {asked}"
    action, otherwise, providers, reason, rule, function = engine.decide(*request)
    asked = ""
    if action == table.ACTION_ASK:
        asked = f" asked {request[0]} {function} {rule}"
        action, reason, function = table.ACTION_TCP, reasons.STARTING, table.FUNCTION_NONE
    numbers = ",".join(str(number) for number in (*providers, 0, 0, 0, 0)[:4])
    return f"{action} {otherwise} {numbers} {reason} {rule} {function}{asked}"


def compare(host: Host, path: Path, seed: int, policies: int, requests: int) -> None:
    random_ = random.Random(seed)
    for number in range(policies):
        facts = random_facts(random_)
        policy = random_policy(random_, facts)
        override = random_.choice([None, None, None, ("unix",), ("tcp",)])
        data = table_of(policy, providers_override=override, require=random_.random() < 0.2)
        put(path, data)
        assert host.tell(facts_command(facts), f"load {path}") == ["ok", "0"]
        engine = Engine(Table(data), facts)
        assert host.ask("state").split()[1] == str(engine.engine)
        cases = [random_request(random_) for _ in range(requests)]
        answers = host.tell(
            *(f"decide {role} {family} {a.hex()} {p} {b.hex()} {q}" for role, family, a, p, b, q in cases)
        )
        for case, answer in zip(cases, answers, strict=True):
            assert answer == in_python(engine, case), f"seed {seed}, policy {number}: {case}"


def test_c_and_python_agree(host: Host, tmp_path: Path) -> None:
    """P2, P3: Compiled table and Python engine give the same verdict, process predicates included."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    compare(host, tmp_path / "table", seed, policies=300, requests=25)


@pytest.mark.long
def test_c_and_python_agree_100_000_times(host: Host, tmp_path: Path) -> None:
    """P2: As above, on 100,000 requests."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    compare(host, tmp_path / "table", seed, policies=1000, requests=100)


def rule(line: int, **fields: object) -> Rule:
    values: dict[str, object] = {
        "place": Place("/etc/interposer/policy.toml", line),
        "role": 3,
        "local": (),
        "remote": (),
        "action": table.ACTION_SAN,
        "otherwise": 0,
        "providers": (),
    }
    return Rule(**{**values, **fields})  # type: ignore[arg-type]


def asking(line: int) -> Rule:
    place = Place("/etc/interposer/policy.toml", line)
    return rule(line, action=table.ACTION_ASK, function=Function("m", "f", 100, "/etc/m.py", place))


DECIDE = f"decide 2 2 {ZERO.hex()} 0 {v4('127.0.0.1').hex()} 80"
NO_TABLE = f"1 1 0,0,0,0 {reasons.BAD_TABLE} {table.RULE_DEFAULT} {table.FUNCTION_NONE}"
BY_DEFAULT = f"2 1 1,0,0,0 0 {table.RULE_DEFAULT} {table.FUNCTION_NONE}"
BAD = f"-{reasons.BAD_TABLE}"


def test_without_a_table_everything_is_tcp(host: Host) -> None:
    """O1, X8: No table was loaded: TCP, and the reason says so."""
    assert host.tell(DECIDE, "text 0 20", "state") == [NO_TABLE, "0 ", f"0 {table.ENGINE_OFF} 0 0"]


def test_built_in_default(host: Host, tmp_path: Path) -> None:
    """P1: Without any policy file the default is unix, else TCP, and no engine is asked."""
    data = table_of(Policy())
    path = put(tmp_path / "table", data)
    assert host.tell(f"load {path}", DECIDE) == ["0", BY_DEFAULT]
    generation = Table(data).generation
    assert host.ask("state") == f"{generation} {table.ENGINE_EMBEDDED} 0 1"


@pytest.mark.parametrize("size", [0, 1, 8, 103, 104, 200, -1])
def test_truncated_table_is_refused(host: Host, tmp_path: Path, size: int) -> None:
    """X3: A table cut short is refused."""
    path = put(tmp_path / "table", table_of(Policy(rules=(asking(3),)))[:size])
    assert host.tell(f"load {path}", DECIDE) == [BAD, NO_TABLE]


def test_table_with_wrong_frame_is_refused(host: Host, tmp_path: Path) -> None:
    """X3: Wrong magic, version, size or checksum: refused."""
    good = table_of(Policy(rules=(asking(3),)))
    for change in ((0, b"X"), (8, b"\2"), (12, b"\0"), (16, b"\0\0\0\0"), (len(good) - 2, b"\xff")):
        offset, byte = change
        bad = good[:offset] + byte + good[offset + len(byte) :]
        assert bad != good
        assert host.ask(f"load {put(tmp_path / 'table', bad)}") == BAD, change
    assert host.ask(f"load {put(tmp_path / 'table', good + bytes(4))}") == BAD


def with_checksum(data: bytes) -> bytes:
    return data[:16] + struct.pack("=I", zlib.crc32(data[table.HEADER.size :])) + data[20:]


def test_every_field_of_a_table_is_checked(host: Host, tmp_path: Path) -> None:
    """X3: Whatever single byte is changed under a right checksum, the table is refused or harmless."""
    section = Section(
        Place("/etc/p.toml", 3),
        (Predicate(table.PREDICATE_EXE, "*", 0, Place("/etc/p.toml", 4)),),
        (asking(5), rule(6, local=(Pattern(1, v4("10.0.0.0"), 104, (80, 90), ""),))),
        0,
        0,
        ("unix",),
    )
    good = table_of(Policy(sections=(section,), rules=(rule(9), asking(10))))
    path = tmp_path / "table"
    assert host.ask("facts 0 2f61 61 - - -") == "ok"
    refused = 0
    for offset in range(table.HEADER.size - 4 * 18, len(good)):
        for value in (0, 1, 0x7F, 0xFF):
            bad = bytearray(good)
            bad[offset] = value
            put(path, with_checksum(bytes(bad)))
            answers = host.tell(
                "facts 0 2f61 61 - - -", f"load {path}", DECIDE, DECIDE.replace(" 2 2", " 1 2"), "text 0 40"
            )
            refused += answers[1] == BAD
    assert refused > 500


def test_random_bytes_are_refused(host: Host, tmp_path: Path) -> None:
    """X3: Random bytes behind a right frame and checksum are refused, and crash nothing."""
    random_ = random.Random(7)
    good = table_of(Policy(rules=(rule(3),)))
    for _ in range(200):
        bad = with_checksum(good[:32] + random_.randbytes(len(good) - 32))
        assert host.ask(f"load {put(tmp_path / 'table', bad)}") == BAD


def test_table_that_others_may_write_is_refused(host: Host, tmp_path: Path) -> None:
    """X3: Group- or world-writable tables, symbolic links, pipes and directories are refused."""
    path = put(tmp_path / "table", table_of(Policy()))
    for mode in (0o664, 0o646, 0o666):
        path.chmod(mode)
        assert host.ask(f"load {path}") == BAD
    path.chmod(0o644)
    link = tmp_path / "link"
    link.symlink_to(path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for other in (link, pipe, tmp_path, tmp_path / "missing"):
        assert host.ask(f"load {other}") == BAD
    assert host.ask(f"load {path}") == "0"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_table_of_a_stranger_is_refused(host: Host, tmp_path: Path) -> None:
    """X3: Only root's tables and the reader's own are taken."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    path = put(tmp_path / "table", table_of(Policy()))
    os.chown(path, 1234, 1234)
    assert host.ask(f"load {path}") == BAD
    assert host.tell("user 1234", f"load {path}") == ["0", "0"]
    os.chown(path, 0, 0)
    assert host.ask(f"load {path}") == "0"
    os.chown(path, 4321, 0)
    assert host.ask(f"load {path}") == BAD


def eventually(host: Host, command: str, wanted: Callable[[str], bool]) -> float:
    """Repeats a command until its answer is as wanted; the seconds that took. Bounded."""
    start = time.monotonic()
    while True:
        answer = host.ask(command)
        waited = time.monotonic() - start
        if wanted(answer):
            return waited
        assert waited < 5, answer
        time.sleep(0.02)


def test_changed_policy_is_noticed_within_a_second(host: Host, tmp_path: Path) -> None:
    """P6: Replacing the table changes the verdicts of a running process within a second; a bad one changes nothing."""
    path = put(tmp_path / "table", table_of(Policy()))
    assert host.tell(f"load {path}", DECIDE) == ["0", BY_DEFAULT]
    put(path, table_of(Policy(rules=(rule(7, action=table.ACTION_TCP, otherwise=1),))))
    assert eventually(host, DECIDE, lambda answer: answer.startswith("1 1")) < 1
    put(path, b"nonsense" * 50)
    time.sleep(1.1)
    assert host.ask(DECIDE).startswith("1 1")
    path.unlink()
    time.sleep(1.1)
    assert host.ask(DECIDE).startswith("1 1")
    put(path, table_of(Policy()))
    assert eventually(host, DECIDE, lambda answer: answer == BY_DEFAULT) < 1


def test_engine_answers_are_remembered(host: Host, tmp_path: Path) -> None:
    """P1: The engine is asked once for a request; a new table makes it be asked again."""
    path = put(tmp_path / "table", table_of(Policy(rules=(asking(7),))))
    said = f"2 1 1,0,0,0 0 0 {table.FUNCTION_NONE}"
    assert host.tell(f"load {path}", "answer 2 0 1 0 99", DECIDE, DECIDE) == ["0", "ok", f"{said} asked 2 0 0", said]
    assert host.ask(DECIDE.replace(" 80", " 81")) == f"{said} asked 2 0 0"
    put(path, table_of(Policy(rules=(rule(5, role=1), asking(7)))))
    eventually(host, DECIDE, lambda answer: answer.endswith("asked 2 0 1"))
    # An engine that only could not answer now is asked again.
    assert host.ask(f"answer 1 0 0 {reasons.ENGINE_BUSY} 0") == "ok"
    busy = [host.ask(DECIDE.replace(" 80", " 82")) for _ in range(2)]
    assert [answer.endswith("asked 2 0 1") for answer in busy] == [True, True]


def test_many_flows_stay_bounded(host: Host, tmp_path: Path) -> None:
    """P1, X6: More requests than flows are remembered only cost questions, and every answer is the right one."""
    path = put(tmp_path / "table", table_of(Policy(engine=table.ENGINE_REACTIVE, rules=(asking(7),))))
    assert host.tell(f"load {path}", f"answer 2 2 1 0 {table.RULE_DEFAULT}") == ["0", "ok"]
    requests = [f"decide 2 2 {ZERO.hex()} 0 {v4('127.0.0.1').hex()} {port}" for port in range(1, 20001)]
    said = f"2 2 1,0,0,0 0 {table.RULE_DEFAULT} {table.FUNCTION_NONE}"
    for answer in host.tell(*requests):
        assert answer.startswith(said)
    again = [" asked" in answer for answer in host.tell(*requests[-100:])]
    assert again.count(True) < 20


def test_reactive_asks_for_everything(host: Host, tmp_path: Path) -> None:
    """P1, P8: With engine = "reactive" the engine makes every first decision."""
    path = put(tmp_path / "table", table_of(Policy(engine=table.ENGINE_REACTIVE, rules=(rule(7),))))
    assert host.ask(f"load {path}") == "0"
    for action, reason in ((2, 0), (1, reasons.POLICY_TCP)):
        port = 80 + action
        assert host.ask(f"answer {action} 1 {action - 1} {reason} 0") == "ok"
        request = DECIDE.replace(" 80", f" {port}")
        said = f"{action} 1 {action - 1},0,0,0 {reason} 0 {table.FUNCTION_NONE}"
        asked = f" asked 2 {table.FUNCTION_NONE} {table.RULE_DEFAULT}"
        assert host.tell(request, request) == [said + asked, said]


def test_nonsense_of_the_engine_is_tcp(host: Host, tmp_path: Path) -> None:
    """P5: An answer that is no verdict becomes TCP with a reason."""
    path = put(tmp_path / "table", table_of(Policy(rules=(asking(7),))))
    assert host.tell(f"load {path}", "answer 77 9 0 0 0") == ["0", "ok"]
    assert host.ask(DECIDE).startswith(f"1 1 0,0,0,0 {reasons.FUNCTION_NONSENSE} 0 ")


def test_threads_forks_and_reloads(host: Host, tmp_path: Path) -> None:
    """P6, T13: Many threads decide, the process forks, and the table changes all the while."""
    path = put(tmp_path / "table", table_of(Policy(rules=(asking(7),))))
    assert host.tell(f"load {path}", "answer 2 1 1 0 0") == ["0", "ok"]
    assert host.process.stdin and host.process.stdout
    host.process.stdin.write("storm 3 2500\n")
    host.process.stdin.flush()
    for number in range(25):
        rules = tuple(asking(line) if line % 3 else rule(line) for line in range(number + 1))
        put(path, table_of(Policy(rules=rules)))
        time.sleep(0.1)
    decisions, wrong = map(int, host.process.stdout.readline().split())
    assert wrong == 0
    assert decisions > 1000


def test_rule_text(host: Host, tmp_path: Path) -> None:
    """O1: A rule is named by file and line, cut at the left where it does not fit."""
    path = put(tmp_path / "table", table_of(Policy(rules=(rule(12),))))
    assert host.ask(f"load {path}") == "0"
    text = "/etc/interposer/policy.toml:12"
    assert host.ask("text 0 80") == f"30 {text}"
    assert host.ask("text 0 31") == f"30 {text}"
    assert host.ask("text 0 30") == "29 ..." + text[-26:]
    assert host.ask("text 0 17") == "16 ...olicy.toml:12"
    assert host.ask("text 0 7") == "6 ...:12"
    assert host.ask("text 0 6") == "0 "
    assert host.ask("text 0 0") == "0 "
    assert host.ask(f"text {table.RULE_DEFAULT} 80") == "8 defaults"
    assert host.ask("text 1 80") == "8 defaults"


def test_a_thousand_rules_cost_little(host: Host, tmp_path: Path) -> None:
    """P1: A thousand rules, by port or by prefix, are not scanned one by one (which costs 700 ns)."""
    by_port = tuple(rule(n, remote=(Pattern(3, ZERO, 0, (n + 1, n + 1), ""),)) for n in range(1000))
    by_prefix = tuple(
        rule(n, remote=(Pattern(1, v4(f"10.{n // 250}.{n % 250}.0"), 120, ALL_PORTS, ""),)) for n in range(1000)
    )
    for rules, address, port in ((by_port, "127.0.0.1", 1000), (by_prefix, "10.3.249.7", 80)):
        path = put(tmp_path / "table", table_of(Policy(rules=rules)))
        assert host.ask(f"load {path}") == "0"
        nanoseconds = min(
            float(host.ask(f"bench 200000 2 {ZERO.hex()} 0 {v4(address).hex()} {port}")) for _ in range(3)
        )
        print(f"{nanoseconds:.0f} ns")
        assert nanoseconds < 400
