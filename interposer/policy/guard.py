"""What users' functions cannot do inside somebody else's program: import what changes it, start threads in it, handle
its signals, move it. Everything else is as in any Python.

Nobody is locked out by this: it keeps mistakes, and the habits of libraries, away from the program.
"""

from __future__ import annotations

import _thread
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_NAMES = """
    __future__ abc argparse array ast asyncio atexit base64 binascii bisect builtins bz2 calendar cmath codecs
    collections colorsys concurrent configparser contextlib contextvars copy copyreg csv dataclasses datetime decimal
    difflib dis email encodings enum errno fcntl filecmp fileinput fnmatch fractions functools gc genericpath getopt
    gettext glob graphlib grp gzip hashlib heapq hmac html http importlib inspect io ipaddress itertools json keyword
    linecache locale logging lzma marshal math mimetypes mmap netrc ntpath numbers opcode operator optparse os pathlib
    pickle pkgutil platform plistlib posix posixpath pprint pwd pyexpat queue quopri random re reprlib sched secrets
    select selectors shlex shutil signal socket sqlite3 sre_compile sre_constants sre_parse ssl stat statistics string
    stringprep struct subprocess sys sysconfig tarfile tempfile textwrap threading time timeit token tokenize tomllib
    traceback types typing unicodedata urllib uuid warnings weakref xml xmlrpc zipfile zipimport zlib zoneinfo
"""
ALLOWED = frozenset(_NAMES.split())
"""Of the standard library. That importing all of them leaves a program as it was is tested."""

INTERPRETERS = frozenset(("_interpreters", "_interpchannels", "_interpqueues", "_xxsubinterpreters"))

PROCESS_WIDE = (
    *("_exit", "abort", "execv", "execve", "chdir", "fchdir", "chroot", "umask", "putenv", "unsetenv", "nice"),
    *("setuid", "setgid", "seteuid", "setegid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups"),
    *("initgroups", "setsid", "setpgid", "setpriority", "unshare", "setns"),
)
SIGNALS = ("signal", "set_wakeup_fd", "siginterrupt", "setitimer", "alarm", "pthread_sigmask")


class Imports:
    """Refuses a module of the standard library that is not on the list, as if it were not there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if is_refused(name.partition(".")[0]):
            raise ModuleNotFoundError(f"{name} is not for policy functions: they run inside other programs", name=name)


def is_refused(top: str) -> bool:
    """With `ctypes` goes `_ctypes`; other private modules come with public ones that are on the list."""
    public = top.removeprefix("_")
    return top in INTERPRETERS or (public in sys.stdlib_module_names and not {top, public} & ALLOWED)


class SignalModule:
    """Gives the program's SIGINT back, which the import of _signal (by asyncio, subprocess) takes over."""

    def __init__(self, keep_sigint: Callable[[int], None]) -> None:
        self._keep_sigint = keep_sigint
        self._loader: Any = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != "_signal":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, None)
            if spec is not None and spec.loader is not None:
                self._loader = spec.loader
                spec.loader = self  # type: ignore[assignment]
                return spec
        return None

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._keep_sigint(1)
        try:
            self._loader.exec_module(module)
        finally:
            self._keep_sigint(0)
        # What Python itself says outside the main thread, and libraries are prepared for.
        refuse(module, SIGNALS, ValueError, lambda: False)


def refuse(module: ModuleType, names: tuple[str, ...], error: type[Exception], allowed: Callable[[], bool]) -> None:
    """Replaces functions of a module by ones that raise, except while `allowed()`."""
    for name in names:
        if (original := getattr(module, name, None)) is not None:
            setattr(module, name, _refusing(name, original, error, allowed))


def _refusing(
    name: str, original: Callable[..., Any], error: type[Exception], allowed: Callable[[], bool]
) -> Callable[..., Any]:
    def refused(*arguments: Any, **more: Any) -> Any:
        if not allowed():
            raise error(f"{name}() is not for policy functions: they run inside other programs")
        return original(*arguments, **more)

    return refused


def refuse_imports() -> None:
    sys.meta_path.insert(0, Imports())


def install(keep_sigint: Callable[[int], None], in_own_child: Callable[[], bool]) -> None:
    """For the life of the interpreter. `in_own_child` says whether this is a process that a function forked."""
    import _locale

    refuse_imports()
    sys.meta_path.insert(0, SignalModule(keep_sigint))
    refuse(_thread, ("start_new_thread", "start_new", "start_joinable_thread"), RuntimeError, in_own_child)
    refuse(posix, PROCESS_WIDE, PermissionError, in_own_child)
    # Python's own limit keeps recursion within the stack.
    refuse(sys, ("setrecursionlimit",), RuntimeError, in_own_child)

    set_locale, register = _locale.setlocale, posix.register_at_fork
    refusal: type[Exception] = vars(_locale)["Error"]

    def query_locale(category: int, locale: str | None = None) -> str:
        if locale is not None:
            raise refusal("setlocale() is not for policy functions: they run inside other programs")
        return set_locale(category)

    def register_at_fork(**hooks: Callable[[], object]) -> None:
        # What the program forks is none of a function's business; the library's own hooks mend its locks.
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.partition(".")[0] in sys.stdlib_module_names:
            register(**hooks)

    _locale.setlocale = query_locale
    posix.register_at_fork = register_at_fork  # type: ignore[assignment]
