"""Which processes run by which compiled table."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from interposer.launch.environment import LIBRARY

HELPER = "sanrun-helper"


@dataclass
class Programs:
    """Interposed processes that this user may look at."""

    by_table: dict[str, list[int]] = field(default_factory=dict)
    unknown: list[int] = field(default_factory=list)
    """Those that have overwritten their environment, as setproctitle does."""


def programs() -> Programs:
    """All of them, by the environment that each was started with."""
    found = Programs()
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            table = table_of(pid)
            if table:
                found.by_table.setdefault(table, []).append(pid)
            elif table is None and _has_our_library(pid):
                found.unknown.append(pid)
        except OSError:
            continue
    return found


def table_of(pid: int) -> str | None:
    """The table of a process, "" where it has none (a helper of ours), None where it does not say. Raises OSError."""
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
        if comm.read().strip() == HELPER:
            return ""
    return variable(pid, "INTERPOSER_TABLE")


def variable(pid: int, name: str) -> str | None:
    """Of the environment that a process was started with. Raises OSError."""
    prefix = f"{name}=".encode()
    with open(f"/proc/{pid}/environ", "rb") as environ:
        for word in environ.read().split(b"\0"):
            if word.startswith(prefix):
                return os.fsdecode(word[len(prefix) :])
    return None


def _has_our_library(pid: int) -> bool:
    """That of this installation; another one's programs have tables of their own."""
    ours = f" {os.path.realpath(LIBRARY)}"
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return any(line.rstrip("\n").removesuffix(" (deleted)").endswith(ours) for line in maps)
