"""Where the policy files are. Never in the working directory: only a path that the user wrote is relative to it.

Imports os alone, because the launcher runs this on every start.
"""

from __future__ import annotations

import os

from interposer.config.problems import PolicyError, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    Result = TypeVar("Result")

ATTEMPTS, ATTEMPTS_IN_ERROR = 3, 20
SYSTEM_FILE = "/etc/interposer/policy.toml"


class Location:
    """Where a policy is.

    `path` is that of policy.toml, which need not exist where only policy.d/*.toml do, and "" for the built-in default.
    `named`: somebody asked for it by name. `files` are to be read in this order.
    """

    __slots__ = ("files", "named", "path")

    def __init__(self, path: str, named: bool, files: list[str]) -> None:
        self.path = path
        self.named = named
        self.files = files


def locate(path_option: str | None, environ: Mapping[str, str]) -> list[str]:
    """The policy files in the order in which they are read; empty where there is none, so the built-in default holds.

    As `find`.
    """
    return find(path_option, environ).files


def find(path_option: str | None, environ: Mapping[str, str]) -> Location:
    """The policy that applies.

    `path_option` is --policy. The first place with a file wins: --policy, $INTERPOSER_POLICY,
    $XDG_CONFIG_HOME/interposer/policy.toml, /etc/interposer/policy.toml. Beside it, policy.d/*.toml follow, sorted.
    Raises PolicyError where a file that was asked for by name is not there, and where one that was not belongs to
    somebody else.
    """
    if path_option is not None:
        path = os.path.abspath(path_option) if path_option else ""
        return Location(path, True, _named(path, ""))
    named = environ.get("INTERPOSER_POLICY", "")
    if named:
        if not os.path.isabs(named):
            raise PolicyError(
                [Problem("", 0, f"INTERPOSER_POLICY={named} is not an absolute path", "write the path from / on")]
            )
        return Location(named, True, _named(named, " that INTERPOSER_POLICY names"))
    for path in (os.path.join(_config_home(environ), "interposer", "policy.toml"), SYSTEM_FILE):
        location = at(path, named=False)
        if location is not None:
            return location
    return Location("", False, [])


def at(path: str, *, named: bool) -> Location | None:
    """The policy at a path where one was before; None where none is any more. Raises PolicyError as `find`."""
    if named:
        return Location(path, True, _named(path, "")) if os.path.lexists(path) else None
    files = [path] if os.path.isfile(path) else []
    files += _drop_ins(path, named=False)
    if not files:
        return None
    _check_owners(files)
    return Location(path, False, files)


def settled(location: Location, read: Callable[[Location], Result]) -> Result:
    """What `read` makes of a policy whose files did not change meanwhile. One that does is found and read again: a few
    times, and more often where it was in error. Raises PolicyError as `read` and `find` do.
    """
    for attempt in range(1, ATTEMPTS_IN_ERROR + 1):
        before = stamp(location.files)
        problem: PolicyError | None = None
        try:
            result = read(location)
        except PolicyError as error:
            problem = error
        now = (at(location.path, named=location.named) if location.path else None) or location
        if stamp(now.files) == before or attempt == (ATTEMPTS_IN_ERROR if problem else ATTEMPTS):
            break
        location = now
    if problem:
        raise problem
    return result


def stamp(files: list[str]) -> str:
    """A text that changes whenever one of the files does: the launcher's cache key for a policy."""
    parts = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            parts.append(f"{path}\t-")
        else:
            parts.append(f"{path}\t{status.st_ino}\t{status.st_size}\t{status.st_mtime_ns}\t{status.st_ctime_ns}")
    return "\n".join(parts)


def _named(path: str, whose: str) -> list[str]:
    if not os.path.isfile(path):
        what = "does not exist" if not os.path.exists(path) else "is not a file"
        raise PolicyError([Problem(path, 0, f"the policy file{whose} {what}", "name a TOML file")])
    return [path, *_drop_ins(path, named=True)]


def _check_owners(files: list[str]) -> None:
    """A policy can name code, so root with another user's HOME must not take that user's by itself."""
    problems = []
    for path in files:
        try:
            owner = os.stat(path).st_uid
        except FileNotFoundError:
            continue  # removed just now, which whoever reads it will find
        if owner not in (0, os.geteuid()):
            problems.append(
                Problem(
                    path, 0, f"the policy file belongs to user {owner}", "use it with --policy, or change its owner"
                )
            )
    if problems:
        raise PolicyError(problems)


def _drop_ins(path: str, *, named: bool) -> list[str]:
    folder = os.path.join(os.path.dirname(path), "policy.d")
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        # Of a place that nobody named, as another user's HOME, what cannot be reached is not there.
        if not named and isinstance(error, PermissionError) and not os.path.lexists(folder):
            return []
        message = f"the directory cannot be read: {error.strerror}"
        raise PolicyError([Problem(folder, 0, message, "make it readable, or remove it")]) from None
    found = [os.path.join(folder, name) for name in names if name.endswith(".toml") and not name.startswith(".")]
    return [name for name in found if os.path.isfile(name)]


def _config_home(environ: Mapping[str, str]) -> str:
    home = environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(home):
        return home
    home = environ.get("HOME", "")
    if not os.path.isabs(home):
        import pwd

        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = "/"
    return os.path.join(home, ".config")
