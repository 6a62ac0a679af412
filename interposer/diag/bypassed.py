"""Processes that inherited the switch from whoever started them, and that it cannot enter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from interposer.diag import tables
from interposer.launch import elf, environment


@dataclass(frozen=True, slots=True)
class Bypassed:
    """A process whose connections are all on plain TCP, and why."""

    pid: int
    exe: str
    why: str


def why(pid: int) -> str:
    """Why the library cannot be at work in a process; "" where nothing hinders it, or the program cannot be read."""
    try:
        return elf.inspect(f"/proc/{pid}/exe", environment.library_head()).obstacle
    except (elf.NotFound, elf.NotExecutable, environment.Unusable):
        return ""


def processes() -> list[Bypassed]:
    """All that this user may see, by pid."""
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            if not tables.table_of(pid) or tables.variable(pid, "INTERPOSER") == "off":
                continue
            reason = why(pid)
            if reason:
                found.append(Bypassed(pid, os.readlink(f"/proc/{pid}/exe"), reason))
        except OSError:
            continue
    return found
