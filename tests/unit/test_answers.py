"""What native/flows.c does with the engine's answers: how long they hold, for which questions, under which table."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from build_c import HOSTS, NATIVE, compile_c

from interposer.config.compile import compile_policy
from interposer.config.model import Function, Pattern, Place, Policy, Rule
from interposer.policy import reasons, table

SOURCES = ("flows.c", "policy_table.c", "rule_index.c", "predicates.c", "endpoint.c", "real.c")
SAN, TCP = table.ACTION_SAN, table.ACTION_TCP
PLACE = Place("/etc/policy.toml", 3)
ASKS = Rule(PLACE, table.ROLE_CONNECT, (), (), table.ACTION_ASK, 0, (), Function("m", "f", 100, "/etc/m.py", PLACE))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("answers") / "answers_host"
    sources = [HOSTS / "answers_host.c", *(NATIVE / name for name in SOURCES)]
    return compile_c(output, *sources, flags=("-Wl,--wrap=clock_gettime",))


def write(path: Path, *rules: Rule, engine: int = table.ENGINE_EMBEDDED) -> str:
    data = compile_policy(
        Policy(rules=rules, engine=engine),
        libpython="",
        python_home="",
        search_path=[],
        engine_module="",
        helper="",
        key="",
    )
    path.write_bytes(data)
    return str(path)


def run(program: Path, *arguments: str) -> list[dict[str, str]]:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in done.stdout.splitlines()]


def asked(lines: list[dict[str, str]]) -> list[int]:
    return [int(line["asked"]) for line in lines]


@pytest.mark.parametrize("engine", [table.ENGINE_EMBEDDED, table.ENGINE_REACTIVE])
def test_an_answer_is_for_one_set_of_options(program: Path, tmp_path: Path, engine: int) -> None:
    """P1, P5: a function may look at the options, so its answer holds for the same options only."""
    lines = run(program, write(tmp_path / "table", ASKS, engine=engine), "options")
    assert asked(lines) == [1, 1, 1, 0, 0, 0, 1, 1, 0, 1]
    assert [int(line["options"]) for line in lines] == [0, 1, 2, 0, 0, 0, 1, 1, 0, 16]


def test_options_do_not_matter_where_no_function_can_see_them(program: Path, tmp_path: Path) -> None:
    """P1: a reactive policy without functions remembers its verdicts whatever the options."""
    lines = run(program, write(tmp_path / "table", engine=table.ENGINE_REACTIVE), "options")
    assert asked(lines) == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_buffers_are_remembered_too(program: Path, tmp_path: Path) -> None:
    """P5: the second connection gets the buffers that the first was given."""
    lines = run(program, write(tmp_path / "table", ASKS), "buffers")
    assert asked(lines) == [1, 0]
    assert [line["buffers"] for line in lines] == ["1073741824,7"] * 2


def test_an_answer_holds_as_long_as_it_says(program: Path, tmp_path: Path) -> None:
    """P1, P5: for five seconds, not at all, and until the policy changes."""
    lines = run(program, write(tmp_path / "table", ASKS), "memory")
    assert asked(lines) == [1, 0, 1, 0, 1, 1, 1, 1, 0]


def test_answers_that_are_over_make_room(program: Path, tmp_path: Path) -> None:
    """P1: the memory is full of answers that hold no longer, and keeps a thousand new ones all the same."""
    assert asked(run(program, write(tmp_path / "table", ASKS), "room")) == [1000]


def test_a_late_answer_is_not_used_when_the_policy_has_changed(program: Path, tmp_path: Path) -> None:
    """P6: the policy changes while a function runs: the answer is the new policy's, at once and from then on."""
    old = write(tmp_path / "table", ASKS)
    port = Pattern(3, bytes(16), 0, (80, 80), ":80")
    elsewhere = Pattern(3, bytes(16), 0, (81, 81), ":81")
    rules = [Rule(PLACE, 3, (), (pattern,), TCP, 1, ()) for pattern in (elsewhere, port)]
    lines = run(program, old, "overtaken", write(tmp_path / "new", *rules))
    assert asked(lines) == [1, 0, 0]
    for line in lines:
        assert (int(line["action"]), int(line["reason"]), line["rule"]) == (TCP, reasons.POLICY_TCP, "1")


def test_a_late_answer_is_asked_for_anew(program: Path, tmp_path: Path) -> None:
    """P6: where the new policy asks too, it is asked, and only its answer is remembered."""
    any_port = Pattern(3, bytes(16), 0, (81, 82), ":81-82")
    other = Rule(PLACE, 3, (), (any_port,), TCP, 1, ())
    lines = run(program, write(tmp_path / "table", ASKS), "overtaken", write(tmp_path / "new", other, ASKS))
    assert asked(lines) == [2, 0, 0]
    assert [(int(line["action"]), line["rule"]) for line in lines] == [(SAN, "1")] * 3


def test_a_policy_that_keeps_changing_means_tcp(program: Path, tmp_path: Path) -> None:
    """P5, P6: three answers in a row that came too late are TCP, with a reason, and nothing is remembered of them."""
    new = [write(tmp_path / f"new{i}", ASKS) for i in range(3)]
    lines = run(program, write(tmp_path / "table", ASKS), "overtaken", *new)
    assert asked(lines) == [3, 1, 0]
    assert (int(lines[0]["action"]), int(lines[0]["reason"])) == (TCP, reasons.ENGINE_BUSY)
    assert int(lines[1]["action"]) == SAN
