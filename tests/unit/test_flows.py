"""The decision in C: native/flows.c and its parts, in a process that does nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flows_driver import BAD, NO_TABLE, ZERO, Host, build, put, running, table_of

from interposer.config.model import ALL_PORTS, Function, Pattern, Place, Policy, Rule
from interposer.policy import reasons, table
from interposer.policy.engine import Table


def v4(text: str) -> bytes:
    return table.V4_PREFIX + bytes(int(part) for part in text.split("."))


@pytest.fixture
def host() -> Iterator[Host]:
    with running(build()) as made:
        yield made


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
BY_DEFAULT = f"2 1 1,0,0,0 0 {table.RULE_DEFAULT} {table.FUNCTION_NONE}"


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
