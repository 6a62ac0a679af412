"""Compiled tables between starts: a policy is read again only when something that went into its table has changed.

On a hit nothing is imported that a starting interpreter has not loaded, but for small modules of our own.
"""

from __future__ import annotations

import os
import sys

import interposer
from interposer.config import locate
from interposer.config.problems import PolicyError, Problem
from interposer.launch import runtime
from interposer.launch.environment import ENGINE, PACKAGE
from interposer.policy import table as layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interposer.config.locate import Location
    from interposer.config.model import LoadedPolicy

__all__ = [
    "Cached", "Choice", "NoEngine", "PolicyError", "choose", "compile_choice", "fetch", "helper_address", "key",
    "origin", "path", "preview", "wants_helper", "warnings",
]  # fmt: skip

FILES = "\nother files that it was made from:\n"
PASSWD = "/etc/passwd"  # a policy's user names are looked up when it is compiled


class NoEngine(Exception):
    """The policy needs the Python engine, and it cannot run; the message says why and what to do."""


class Choice:
    """What decides which table a program gets: the policy's files and the options that change their meaning."""

    __slots__ = ("policy", "providers", "require")

    def __init__(self, policy: Location, providers: Sequence[str], require: bool) -> None:
        self.policy = policy
        self.providers = list(providers)
        self.require = require


class Cached:
    """A table on disk. `warnings` are of the policy, known only when it was compiled just now."""

    __slots__ = ("data", "path", "warnings")

    def __init__(self, path: str, data: bytes, warnings: Sequence[str] = ()) -> None:
        self.path = path
        self.data = data
        self.warnings = warnings


def choose(path_option: str | None, environ: Mapping[str, str], providers: Sequence[str], require: bool) -> Choice:
    """Finds the policy files. Raises PolicyError where one that was asked for by name is not there."""
    return Choice(locate.find(path_option, environ), providers, require)


def key(choice: Choice) -> str:
    """A text that differs whenever the table would, and from which a reload learns what the table was made of."""
    policy = choice.policy
    return "\n".join(
        (
            f"{interposer.__version__} {sys.version_info[:3]} {sys.base_prefix}",
            # A newer checkout under the same version.
            f"{_stamp(f'{PACKAGE}/config/compile.py')} {_stamp(f'{PACKAGE}/config/late_python.py')}",
            f"providers={','.join(choice.providers)} require={choice.require}",
            f"{'named' if policy.named else 'found'}={_quote(policy.path)}",
            locate.stamp(policy.files),
        )
    )


def origin(data: bytes) -> tuple[str, bool, list[str], bool] | None:
    """Of what a table was made, by its key: path of the policy, whether it was named, providers, require. None where it
    is not one that this installation could have made."""
    try:
        table = layout.Table(data) if layout.sound(data) else None
    except layout.TableError:
        return None
    lines = table.key.split("\n") if table and table.engine_module == ENGINE else []
    if len(lines) < 4 or not lines[0].endswith(f" {sys.base_prefix}"):
        return None
    providers, _, require = lines[2].removeprefix("providers=").partition(" require=")
    kind, equals, policy = lines[3].partition("=")
    if not equals or kind not in ("named", "found"):
        return None
    return _unquote(policy), kind == "named", [name for name in providers.split(",") if name], require == "True"


def path(directory: str, choice: Choice) -> str:
    """Stays the same while the policy's text changes, so that a reload reaches the programs that run by it."""
    scope = f"{choice.policy.named} {choice.policy.path}"
    text = "\n".join((PACKAGE, sys.base_prefix, scope, ",".join(choice.providers), str(choice.require)))
    return f"{directory}/table-{runtime.digest(text)}"


def fetch(choice: Choice, environ: Mapping[str, str], *, fresh: bool = False) -> Cached:
    """The table for a choice, from the cache unless `fresh`. Raises PolicyError, Refused and NoEngine."""
    place = path(runtime.directory(environ), choice)
    wanted = key(choice)
    if not fresh:
        data = runtime.read(place)
        if data is not None and layout.sound(data) and _current(layout.key_of(data), wanted):
            return Cached(place, data)
    loaded, data = compile_choice(choice, helper=helper_address(place))
    runtime.write(place, data)
    return Cached(place, data, [str(problem) for problem in warnings(loaded, data)])


def preview(choice: Choice, environ: Mapping[str, str]) -> Cached:
    """The table that `fetch` would make; nothing is written. Raises as `fetch` does."""
    place = path(runtime.directory(environ, make=False), choice)
    loaded, data = compile_choice(choice, helper=helper_address(place))
    return Cached(place, data, [str(problem) for problem in warnings(loaded, data)])


def compile_choice(choice: Choice, *, helper: str) -> tuple[LoadedPolicy, bytes]:
    """Reads and compiles the policy. Raises PolicyError and NoEngine."""

    def read(policy: Location) -> tuple[str, LoadedPolicy]:
        return key(Choice(policy, choice.providers, choice.require)), config.load_files(policy.files)

    from interposer import config
    from interposer.config.compile import compile_policy
    from interposer.launch import libpython

    made_of, loaded = locate.settled(choice.policy, read)
    library = libpython.find()
    libpythons = [library] if library else libpython.candidates()  # where it would appear
    data = compile_policy(
        loaded.policy,
        libpython=library,
        python_home=libpython.python_home(),
        search_path=libpython.search_path(),
        engine_module=ENGINE,
        helper=helper,
        key=made_of + FILES + locate.stamp([PASSWD, ENGINE, *libpythons, *loaded.modules]),
        providers_override=choice.providers or None,
        require=choice.require,
    )
    if wants_engine(data) and not os.path.exists(ENGINE):
        raise NoEngine(f"the policy asks Python, but {ENGINE} does not exist; build it (tools/build) or reinstall")
    return loaded, data


def wants_engine(data: bytes) -> bool:
    """Whether some program under this table may ask Python."""
    return wants_helper(data) or layout.ENGINE_STARTUP in _engines(data)


def warnings(loaded: LoadedPolicy, data: bytes) -> list[Problem]:
    """What is wrong with a policy that was compiled to `data`, short of an error."""
    found = list(loaded.warnings)
    header = layout.HEADER.unpack_from(data)
    strings, library = header[14], header[18]
    if data[strings + library] == 0 and wants_engine(data) and _engines(data) - {layout.ENGINE_HELPER}:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        message = f"the policy asks Python, but no libpython{version} was found for {sys.base_prefix}"
        hint = f"install it (Debian: apt install libpython{version}); until then programs ask the slower helper process"
        found.append(Problem("", 0, message, hint))
    return found


def wants_helper(data: bytes) -> bool:
    """Whether some program under this table may ask the helper process: a function, unless Python is off everywhere, or
    in reactive mode, where a program that cannot embed Python asks it everything."""
    engines = _engines(data)
    return layout.ENGINE_REACTIVE in engines or (_functions(data) > 0 and engines != {layout.ENGINE_OFF})


def helper_address(table_path: str) -> str:
    """The abstract address of the helper process that serves a table; derived, so that it can stand in a cached one."""
    return f"interposer-helper/{os.geteuid()}/{runtime.digest(table_path)}"


def _current(stored: str, wanted: str) -> bool:
    """Whether a table with that key is what `wanted` asks for; only a table knows which modules its policy names."""
    policy, _, files = stored.partition(FILES)
    return policy == wanted and files == locate.stamp([line.split("\t")[0] for line in files.splitlines()])


def _functions(data: bytes) -> int:
    return int(layout.HEADER.unpack_from(data)[13])


def _engines(data: bytes) -> set[int]:
    header = layout.HEADER.unpack_from(data)
    first, count = header[6], header[7]
    found = {layout.SECTION.unpack_from(data, first + i * layout.SECTION.size)[6] for i in range(count)}
    return found - {layout.ENGINE_INHERIT}


def _stamp(path: str) -> str:
    try:
        return str(os.stat(path).st_mtime_ns)
    except OSError:
        return "-"


def _quote(path: str) -> str:
    return path.replace("%", "%25").replace("\n", "%0A")


def _unquote(text: str) -> str:
    return text.replace("%0A", "\n").replace("%25", "%")
