"""Compiles the policies behind existing tables anew, so that the programs that run by them follow (P6).

A table is replaced by rename or not at all. One whose policy is gone is removed when no program runs by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from interposer.config import locate
from interposer.config.problems import PolicyError, Problem
from interposer.launch import runtime, table_cache

RELOADED, REMOVED, KEPT, FAILED = "reloaded", "removed", "kept", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of a table. `policy` are the files that it was compiled from, or the one that is gone."""

    table: str
    result: str
    policy: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    helper: bool = field(default=False)
    """Whether programs under the table may ask the helper process."""


def tables(environ: Mapping[str, str]) -> list[str]:
    """The tables in the run-time directory of this user. Raises Refused."""
    place = runtime.directory(environ, make=False)
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return []
    return sorted(f"{place}/{name}" for name in names if name.startswith("table-") and "." not in name)


def is_ours(table: str) -> bool:
    """Whether this installation made the table for this user."""
    data = runtime.read(table)
    return data is not None and table_cache.origin(data) is not None


def reload(table: str, programs: Sequence[int], unknown: Sequence[int], environ: Mapping[str, str]) -> Outcome:
    """Compiles the policy of a table of ours; `programs` are the processes that run by it, `unknown` may."""
    try:
        runtime.check(os.path.dirname(table), environ)
        data = runtime.read(table)
        origin = table_cache.origin(data) if data is not None else None
        if origin is None:
            return _failed(table, "this installation did not make it for this user", "start its programs anew")
        path, named, providers, require = origin
        location = locate.at(path, named=named) if path else None
        if location is None and path and not programs and not unknown:
            os.unlink(table)
            return Outcome(table, REMOVED, (path,))
        if location is None and named:
            return _gone(table, path, programs, unknown)
        if location is None:
            location = locate.find(None, {**environ, "INTERPOSER_POLICY": ""})
        choice = table_cache.Choice(location, providers, require)
        address = table_cache.helper_address(table)
        loaded, fresh = table_cache.compile_choice(choice, helper=address)
        runtime.write(table, fresh)
    except PolicyError as error:
        return Outcome(table, FAILED, problems=error.problems)
    except (runtime.Refused, table_cache.NoEngine) as error:
        return _failed(table, str(error), "")
    except OSError as error:
        return _failed(table, f"{error.strerror}", "")
    warnings = tuple(table_cache.warnings(loaded, fresh))
    return Outcome(table, RELOADED, loaded.files, (), warnings, table_cache.wants_helper(fresh))


def _gone(table: str, path: str, programs: Sequence[int], unknown: Sequence[int]) -> Outcome:
    which = ", ".join(map(str, (programs or unknown)[:5])) + ("..." if len(programs or unknown) > 5 else "")
    if programs:
        message = f"its policy {path} is gone, and programs run by it: {which}"
        return _failed(table, message, "put the policy back", path)
    message = f"its policy {path} is gone, but programs that do not say by which policy they run might need it: {which}"
    return Outcome(table, KEPT, (path,), warnings=(Problem(table, 0, message),))


def _failed(table: str, message: str, hint: str, *policy: str) -> Outcome:
    return Outcome(table, FAILED, policy, (Problem(table, 0, message, hint),))
