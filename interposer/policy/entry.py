"""Where C calls Python (P1): the up-calls of native/engine_module.h.

Runs inside other people's programs; starting it may cost a few milliseconds, so it imports next to nothing.
"""

from __future__ import annotations

import encodings
import sys

from _interposer import ffi, lib

from interposer.policy.engine import Engine, Facts
from interposer.policy.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from interposer.policy.functions import Answer, Functions


class Log:
    """Stands for stdout and stderr, which belong to the host: whole lines go to the log."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()[:65536]  # a line without an end must not eat the host's memory
        for line in lines:
            log(line)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


class State:
    """The policy of this process; `engine` is made when a whole decision is asked for."""

    table: Table
    facts: Facts
    engine: Engine | None = None
    functions: Functions | None = None
    guarded = False


state = State()


def log(line: str) -> None:
    lib.interposer_log(line.encode("utf-8", "backslashreplace").replace(b"\0", b" "))


def strings(pointer: Any) -> tuple[bytes, ...]:
    """A list of C strings that an empty one ends."""
    found: list[bytes] = []
    offset = 0
    while pointer and (text := ffi.string(pointer + offset)):
        found.append(text)
        offset += len(text) + 1
    return tuple(found)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def interposer_configure(table: Any, size: int, facts: Any) -> int:
    new = Table(ffi.buffer(table, size)[:])
    if facts.exe != ffi.NULL:
        state.facts = Facts(
            ffi.string(facts.exe),
            ffi.string(facts.name),
            strings(facts.arguments),
            strings(facts.environment),
            strings(facts.cgroups),
            facts.user,
        )
    global decide_by_function
    state.table = new
    state.engine = None
    state.functions = decide_by_function = None
    if new.functions:
        from interposer.policy.functions import Functions, forget_modules, in_own_child

        if not state.guarded:
            from interposer.policy import guard

            guard.install(lib.interposer_keep_sigint, in_own_child)
            state.guarded = True
        forget_modules()
        state.functions = Functions(new, state.facts, log)
        decide_by_function = state.functions.decide
    for folder in new.search_path:
        if folder not in sys.path:
            sys.path.append(folder)
    return 1


@ffi.def_extern()  # type: ignore[untyped-decorator]
def interposer_prepare(function: int) -> int:
    if state.functions is not None:
        state.functions.find(function)
    return 1


def decide_by_rules(
    role: int, family: int, local_ip: bytes, local_port: int, remote_ip: bytes, remote_port: int
) -> tuple[int, int, tuple[int, ...], int, int, int]:
    if state.engine is None:
        state.engine = Engine(state.table, state.facts)
    return state.engine.decide(role, family, local_ip, local_port, remote_ip, remote_port)


decide_by_function: Callable[..., Answer] | None = None
"""Functions.decide of the table of today."""

# Compiled in, so it does not know where its other modules are.
encodings.__path__ = [f"{folder}/encodings" for folder in sys.path]
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = Log()  # type: ignore[assignment,misc]
