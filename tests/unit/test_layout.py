"""The structures that C and Python share have one layout: C's sizes and offsets against Python's struct formats."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from build_c import NATIVE, compile_c

from interposer.config import model
from interposer.diag import stats
from interposer.policy import functions, helper, reasons, request, table
from interposer.providers import NAMES

# The fields in the order of the format, padding left out, with the letters of their format.
TABLE_HEADER = (
    "magic version size crc flags generation sections nsections predicates npredicates rules nrules functions "
    "nfunctions strings strings_size search_path nsearch_path libpython python_home engine_module helper key reserved"
)
TABLE_RULE = (
    "role action otherwise reserved providers local_families local_prefix remote_families remote_prefix local_port[0] "
    "local_port[1] remote_port[0] remote_port[1] local remote function file line"
)
STATS_PAGE = (
    "magic version pid row_size nrows rows engine engine_reason max_row started table_generation "
    + " ".join(f"connections[{n}]" for n in range(stats.PROVIDERS))
    + " "
    + " ".join(f"listeners[{n}]" for n in range(stats.PROVIDERS))
    + " "
    + " ".join(f"reasons[{n}]" for n in range(stats.REASONS))
    + " upcalls"
)
VERDICT = "action otherwise providers reason rule function send_buffer receive_buffer remember_ms"
REQUEST = "role family noptions function rule " + " ".join(
    f"{side}.{field}" for side in ("local", "remote") for field in ("ip", "scope", "port", "reserved")
)
SOCK_OPTION = struct.Struct("=hhB16sx")
STRUCTURES = {
    "table_header": (table.HEADER, TABLE_HEADER),
    "table_section": (table.SECTION, "predicate npredicates rule nrules file line engine otherwise providers firewall"),
    "table_predicate": (table.PREDICATE, "kind text number reserved"),
    "table_rule": (table.RULE, TABLE_RULE),
    "table_function": (table.FUNCTION, "module name timeout_ms reserved file line"),
    "endpoint": (stats.ENDPOINT, "ip scope port reserved"),
    "stats_page": (stats.HEADER, STATS_PAGE),
    "stats_row": (stats.ROW, "role family provider reason local remote inode started rule sequence"),
    "sock_option": (SOCK_OPTION, "level name length value"),
    "helper_answer": (
        helper.REPLY, "type number generation " + " ".join(f"verdict.{field}" for field in VERDICT.split()),
    ),
}  # fmt: skip
CONSTANTS = {
    **{name: getattr(table, name) for name in dir(table) if name.startswith(("ROLE_", "FAMILY_", "ACTION_"))},
    **{name: getattr(table, name) for name in dir(table) if name.startswith(("OTHERWISE_", "ENGINE_", "PREDICATE_"))},
    **{name: getattr(table, name) for name in dir(table) if name.startswith("FIREWALL_")},
    **{f"PROVIDER_{name.upper()}": number for name, number in NAMES.items()},
    "PROVIDER_NONE": table.PROVIDER_NONE,
    "PROVIDERS_MAX": table.PROVIDERS_MAX,
    "TABLE_VERSION": table.VERSION,
    "TABLE_MAX_SIZE": table.MAX_SIZE,
    "TIMEOUT_MS_MAX": model.TIMEOUT_MS_MAX,
    "RULE_DEFAULT": table.RULE_DEFAULT,
    "FUNCTION_NONE": table.FUNCTION_NONE,
    "REMEMBER_NOT": functions.REMEMBER_NOT,
    "HELPER_FACT": helper.FACT,
    "HELPER_REQUEST": helper.REQUEST,
    "HELPER_ANSWER": helper.ANSWER,
    "HELPER_WATCH": helper.WATCH,
    "STATS_PROVIDERS": stats.PROVIDERS,
    "STATS_REASONS": stats.REASONS,
    **{f"REASON_{reason.symbol}": reason.number for reason in reasons.BY_NUMBER.values()},
}


def offsets_of(format_: str) -> list[int]:
    """The offset of each value that a format with "=" unpacks."""
    offsets: list[int] = []
    position, digits = 0, ""
    for letter in format_.lstrip("="):
        if letter.isdigit():
            digits += letter
            continue
        repeat = int(digits or 1)
        digits = ""
        width = struct.calcsize("=" + letter)
        if letter == "s":
            offsets.append(position)
        elif letter != "x":
            offsets += [position + n * width for n in range(repeat)]
        position += repeat * width
    return offsets


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("layout")
    lines = []
    for name, (_, fields) in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [f'printf("{name}.{f} %zu\\n", offsetof(struct {name}, {f}));' for f in fields.split()]
    lines += [f'printf("{name} %lld\\n", (long long){name});' for name in CONSTANTS]
    places = [f"decision_request.{field}" for field in (*REQUEST.split(), "options")]
    places += [f"helper_request.{field}" for field in ("type", "number", "generation")]
    lines += ['printf("{} %zu\\n", offsetof(struct {}, {}));'.format(place, *place.split(".", 1)) for place in places]
    lines.append('printf("helper_request %zu\\n", sizeof(struct helper_request));')
    source = folder / "layout.c"
    source.write_text(
        '#include "engine.h"\n#include "helper.h"\n#include "stats.h"\n#include "reasons.h"\n#include <stdio.h>\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = compile_c(folder / "layout", source)
    text = subprocess.run([str(program)], capture_output=True, text=True, timeout=10, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str, measured: dict[str, int]) -> None:
    """P2, O2: Size and every offset of a shared structure are the same in C and in Python."""
    layout, fields = STRUCTURES[name]
    assert layout.size == measured[name]
    offsets = offsets_of(layout.format)
    assert dict(zip(fields.split(), offsets, strict=True)) == {f: measured[f"{name}.{f}"] for f in fields.split()}


def test_question_to_the_helper(measured: dict[str, int]) -> None:
    """P8: the head of a question, then the request up to its pointer; the options that follow have one size."""
    head = measured["helper_request"]
    places = [measured[f"helper_request.{field}"] for field in ("type", "number", "generation")]
    places += [head + measured[f"decision_request.{field}"] for field in REQUEST.split()]
    assert offsets_of(helper.QUESTION.format) == places
    assert helper.QUESTION.size == head + measured["decision_request.options"]
    assert request.OPTION_SIZE == SOCK_OPTION.size == measured["sock_option"]


def test_constants(measured: dict[str, int]) -> None:
    """P2, O1: The constants of both sides are the same, reasons included."""
    assert {name: measured[name] for name in CONSTANTS} == CONSTANTS


def test_every_constant_of_the_header_is_covered() -> None:
    """P2: No enumeration of table.h is unknown to Python."""
    text = (NATIVE / "table.h").read_text()
    names = [word.split("=")[0].strip() for line in text.splitlines() if line.startswith("enum {")
             for word in line.partition("{")[2].partition("}")[0].split(",")]  # fmt: skip
    assert len(names) > 20
    assert set(names) <= set(CONSTANTS)


def test_reasons_are_whole() -> None:
    """O1: Every reason has a number, a symbol, a sentence and a hint, each number and symbol once."""
    lines = [line for line in Path(NATIVE / "reasons.def").read_text().splitlines() if line.startswith("REASON(")]
    assert len(reasons.BY_NUMBER) == len(reasons.BY_SYMBOL) == len(lines)
    for reason in reasons.BY_NUMBER.values():
        assert 0 < reason.number < stats.REASONS
        assert reason.symbol == reason.symbol.upper()
        assert len(reason.sentence) > 10 and reason.hint
    assert reasons.BY_SYMBOL["FUNCTION_NONSENSE"].hint.endswith('or "tcp"')
    assert reasons.ENGINE_OFF == 40
    with pytest.raises(AttributeError):
        _ = reasons.NO_SUCH_REASON
