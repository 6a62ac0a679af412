"""Where C calls Python (P1): the up-calls of native/engine_module.h, and what a strange process must be spared of.

Runs inside other people's programs; starting it may cost a few milliseconds, so it imports next to nothing.
"""

from __future__ import annotations

import sys

from _interposer import ffi, lib

from interposer.policy.engine import Engine, Facts
from interposer.policy.table import ACTION_ASK, FUNCTION_NONE, PROVIDERS_MAX, Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from interposer.policy.functions import Functions

SOCK_OPTION = 22
"""Bytes of a struct sock_option."""


class Log:
    """Stands for stdout and stderr, which belong to the host: whole lines go to the log."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()[-4096:]
        for line in lines:
            log(line)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


class SignalGuard:
    """Finds _signal (asyncio, subprocess import it), whose import takes the host's SIGINT over, and gives it back."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != "_signal":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, None)
            if spec is not None and spec.loader is not None:
                spec.loader = SignalLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class SignalLoader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        lib.interposer_keep_sigint(1)
        try:
            self._loader.exec_module(module)
        finally:
            lib.interposer_keep_sigint(0)


class State:
    """The policy of this process; `engine` is made when a whole decision is asked for."""

    table: Table
    facts: Facts
    engine: Engine | None = None
    functions: Functions | None = None


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
    state.table = new
    state.engine = None
    state.functions = None
    if new.functions:
        from interposer.policy.functions import Functions, forget_modules

        forget_modules()
        state.functions = Functions(new, state.facts, log)
    for folder in new.search_path:
        if folder not in sys.path:
            sys.path.append(folder)
    return 1


@ffi.def_extern()  # type: ignore[untyped-decorator]
def interposer_prepare(function: int) -> int:
    if state.functions is not None:
        state.functions.find(function)
    return 1


@ffi.def_extern()  # type: ignore[untyped-decorator]
def interposer_decide(request: Any, out: Any) -> int:
    local, remote = request.local, request.remote
    local_ip, remote_ip = ffi.buffer(local.ip)[:], ffi.buffer(remote.ip)[:]
    function = request.function
    rule = request.rule
    send_buffer = receive_buffer = remember_ms = 0
    if function == FUNCTION_NONE:
        if state.engine is None:
            state.engine = Engine(state.table, state.facts)
        action, otherwise, providers, reason, rule, function = state.engine.decide(
            request.role, request.family, local_ip, local.port, remote_ip, remote.port
        )
    elif state.functions is None:
        return 0
    else:
        count = request.noptions
        options = ffi.buffer(request.options, count * SOCK_OPTION)[:] if count else b""
        action, otherwise, providers, reason, send_buffer, receive_buffer, remember_ms = state.functions.decide(
            function, rule, request.role, request.family, local_ip, local.port, remote_ip, remote.port, options
        )
    out.action = action
    out.otherwise = otherwise
    out.reason = reason
    out.rule = rule
    out.function = function if action == ACTION_ASK else FUNCTION_NONE
    out.send_buffer = send_buffer
    out.receive_buffer = receive_buffer
    out.remember_ms = remember_ms
    for i in range(PROVIDERS_MAX):
        out.providers[i] = providers[i] if i < len(providers) else 0
    return 1


sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = Log()  # type: ignore[assignment,misc]
sys.meta_path.insert(0, SignalGuard())
