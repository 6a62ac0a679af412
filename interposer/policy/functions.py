"""Users' policy functions: find, call, judge. One that raises, returns nonsense or is missing means TCP and a reason.

How long it takes is not watched here but by the caller's thread (native/engine.c, helper.py).
"""

from __future__ import annotations

import posix
import sys
from posix import _exit

from interposer.policy import reasons
from interposer.policy.request import Decision, NewRequest, Process, Request, address_text
from interposer.policy.table import (
    ACTION_SAN,
    ACTION_TCP,
    OTHERWISE_ERROR,
    OTHERWISE_INHERIT,
    OTHERWISE_TCP,
    PROVIDERS_MAX,
    ROLE_LISTEN,
    V4_PREFIX,
    WILDCARD_V4,
    WILDCARD_V6,
)
from interposer.providers import NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from interposer.policy.engine import Facts
    from interposer.policy.table import Table

    Answer = tuple[int, int, tuple[int, ...], int, int, int, int]
    """action, otherwise, providers, reason, send_buffer, receive_buffer, remember_ms: as in native/engine.h."""

OTHERWISE = {None: OTHERWISE_INHERIT, "tcp": OTHERWISE_TCP, "error": OTHERWISE_ERROR}
AF_INET = 2
BUFFER_MAX = 1 << 30
REMEMBER_NOT = 0xFFFFFFFF
REMEMBER_MAX = 4_000_000
"""Seconds, 46 days: milliseconds travel in 32 bits."""


class Functions:
    """The functions of one table, for one process."""

    def __init__(self, table: Table, facts: Facts, log: Callable[[str], None]) -> None:
        self._table = table
        self._places = {number: f"{rule.file}:{rule.line}" for number, rule in enumerate(table.rules)}
        self._process = Process(facts)
        self._log = log
        self._found: dict[int, Callable[[Request], object] | None] = {}

    def find(self, index: int) -> Callable[[Request], object] | None:
        """The function, imported at the first time; None where it cannot be had."""
        if index not in self._found:
            try:
                self._found[index] = self._import(index)
            except BaseException as error:
                self._log(f"{self._name(index)}: not imported: {_short(error, 300)}")
                self._found[index] = None
        return self._found[index]

    def find_all(self) -> None:
        for index in range(len(self._table.functions)):
            self.find(index)

    def decide(
        self,
        index: int,
        rule: int,
        role: int,
        family: int,
        local_ip: bytes,
        local_port: int,
        remote_ip: bytes,
        remote_port: int,
        options: bytes = b"",
    ) -> Answer:
        """The verdict, whatever the function does short of not returning. `options` are packed as in engine.h."""
        function = self._found.get(index) or self.find(index)
        if function is None:
            return tcp(reasons.FUNCTION_MISSING)
        # An unbound source has the family of the destination.
        if local_ip == WILDCARD_V6 and remote_ip.startswith(V4_PREFIX):
            local_ip = WILDCARD_V4
        request: Any = NewRequest(
            "listen" if role == ROLE_LISTEN else "connect",
            "v4" if family == AF_INET else "v6",
            (address_text(local_ip), local_port),
            None if role == ROLE_LISTEN else (address_text(remote_ip), remote_port),
            self._process,
            self._places.get(rule, "defaults"),
            options,
        )
        request.__class__ = Request
        _fork.running = True
        try:
            return self._judged(index, function, request)
        finally:
            if _fork.in_child:
                _exit(0)  # the function forked, and the child came back: it is nobody's
            _fork.running = False

    def _judged(self, index: int, function: Callable[[Request], object], request: Request) -> Answer:
        try:
            result = function(request)
        except BaseException as error:
            self._log(f"{self._name(index)} raised {_short(error, 300)}{_place(error)}")
            return tcp(reasons.FUNCTION_RAISED)
        try:
            return judge(result)
        except ValueError as error:
            self._log(f"{self._name(index)} returned {error}")
        except BaseException:
            self._log(f"{self._name(index)} returned a {type(result).__name__} that cannot be read")
        return tcp(reasons.FUNCTION_NONSENSE)

    def _name(self, index: int) -> str:
        function = self._table.functions[index]
        return f"python:{function.module}:{function.name} ({function.file}:{function.line})"

    def _import(self, index: int) -> Callable[[Request], object]:
        """From the directory of the policy file that names the module, else from sys.path."""
        wanted = self._table.functions[index]
        folder = wanted.file.rpartition("/")[0] or "/"
        top = wanted.module.partition(".")[0]
        origin = getattr(sys.modules.get(top), "__file__", None) or ""
        if _lies_in(origin, *_folders) and not _lies_in(origin, folder):
            # Of another policy directory; this one may have a module of that name too.
            for name in [name for name in sys.modules if name == top or name.startswith(top + ".")]:
                del sys.modules[name]
        _folders.add(folder)
        sys.path.insert(0, folder)
        try:
            __import__(wanted.module)
        finally:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)  # for what its functions import when they run
        function = getattr(sys.modules[wanted.module], wanted.name)
        if not callable(function):
            raise TypeError(f"{wanted.name} is not a function")
        return function  # type: ignore[no-any-return]


class _Fork:
    """Whether a function is running, and whether this process was forked by it."""

    running = False
    in_child = False

    def after_in_child(self) -> None:
        self.in_child = self.running


def in_own_child() -> bool:
    """Whether this is a process that a function forked."""
    return _fork.in_child


_fork = _Fork()
posix.register_at_fork(after_in_child=_fork.after_in_child)

_folders: set[str] = set()


def forget_modules() -> None:
    """Lets the modules of users' functions be imported anew: the policy has changed, and they may have too."""
    for name, module in list(sys.modules.items()):
        if _lies_in(getattr(module, "__file__", None) or "", *_folders):
            del sys.modules[name]
    for folder in _folders:
        sys.path_importer_cache.pop(folder, None)


def tcp(reason: int, otherwise: int = OTHERWISE_INHERIT, remember_ms: int = 0) -> Answer:
    """The verdict that it is TCP, for that reason."""
    return ACTION_TCP, otherwise, (), reason, 0, 0, remember_ms


def judge(result: object) -> Answer:
    """What a function returned as a verdict. Raises ValueError on nonsense."""
    # The common answers first. Only of exact types: others have methods of their own.
    if type(result) is str:
        answer = _PLAIN.get(result)
        if answer is not None:
            return answer
    elif type(result) is list and len(result) == 1 and type(result[0]) is str:
        answer = _PLAIN.get(result[0])
        if answer is not None:
            return answer
    otherwise: str | None = None
    send_buffer = receive_buffer = remember_ms = 0
    if isinstance(result, Decision):
        otherwise = result.otherwise
        send_buffer = _bytes("send_buffer", result.send_buffer)
        receive_buffer = _bytes("receive_buffer", result.receive_buffer)
        remember_ms = _milliseconds(result.remember)
        names: object = result.providers
        if names == ():
            names = "tcp"
    else:
        names = result
        if isinstance(names, (list, tuple)) and not names:
            raise ValueError("an empty list")
    if isinstance(names, str):
        names = (names,)
    if isinstance(names, (list, tuple)) and len(names) > PROVIDERS_MAX:
        raise ValueError(f"too many providers, {len(names)}")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(_short(result))
    if otherwise is not None and (not isinstance(otherwise, str) or otherwise not in OTHERWISE):
        raise ValueError(f'otherwise={_short(otherwise)}; it is "tcp", "error" or None')
    if tuple(names) == ("tcp",):
        return tcp(reasons.FUNCTION_TCP, remember_ms=remember_ms)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"{_short(unknown[0])}, which is no provider; there are: {', '.join(NAMES)}")
    providers = tuple([NAMES[name] for name in names])
    if len(set(providers)) < len(providers):
        raise ValueError(f"{_short(result)}: one provider twice")
    return ACTION_SAN, OTHERWISE[otherwise], providers, 0, send_buffer, receive_buffer, remember_ms


_PLAIN: dict[str, Answer] = {
    name: (ACTION_SAN, OTHERWISE_INHERIT, (number,), 0, 0, 0, 0) for name, number in NAMES.items()
}
_PLAIN["tcp"] = tcp(reasons.FUNCTION_TCP)


def _bytes(name: str, value: object) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 < value <= BUFFER_MAX:
        raise ValueError(f"{name}={_short(value)}; it is a number of bytes from 1 to {BUFFER_MAX}, or None")
    return value


def _milliseconds(value: object) -> int:
    """0: until the policy changes, as in native/engine.h."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= REMEMBER_MAX:
        raise ValueError(f"remember={_short(value)}; it is a number of seconds from 0 to {REMEMBER_MAX}, or None")
    return int(value * 1000) or 1 if value else REMEMBER_NOT


def _lies_in(path: str, *folders: str) -> bool:
    return any(path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _short(value: object, length: int = 80) -> str:
    try:
        return repr(value)[:length]
    except BaseException:
        return f"a {type(value).__name__}"


def _place(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f" at {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
