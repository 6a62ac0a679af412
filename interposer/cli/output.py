"""What the verbs of sanctl print: tables and JSON, and messages on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from interposer.config.problems import Problem

GAP = "  "
PROBLEM = 1


class Failure(Exception):
    """Becomes a message on stderr and the exit status PROBLEM."""


def complain(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"sanctl: {clean(message)}\n")


def print_json(answer: dict[str, Any]) -> None:
    """One object, its version under the key "schema"."""
    import json

    print(json.dumps({"schema": 1, **answer}, indent=2))


def problems(found: Sequence[Problem]) -> list[dict[str, object]]:
    """Errors or warnings of a policy, for JSON."""
    return [{"file": one.file, "line": one.line, "message": one.message, "hint": one.hint} for one in found]


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell, those in `right` flush right. Lines are cut on a terminal only."""
    lines = [list(heads), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    limit = _terminal_width() if sys.stdout.isatty() else None
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(GAP.join(cells).rstrip()[:limit])


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def clean(text: str) -> str:
    """Other programs chose the text: what could steer a terminal is spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
