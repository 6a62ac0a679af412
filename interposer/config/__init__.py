"""From policy files to the compiled table. `load` and `compile_policy` are what the launcher and sanctl call.

Imported only when no compiled table is cached; `interposer.config.locate` alone is cheap.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from interposer.config.compile import compile_policy
    from interposer.config.model import LoadedPolicy
    from interposer.config.problems import PolicyError, Problem

__all__ = ["LoadedPolicy", "PolicyError", "Problem", "compile_policy", "load", "load_files"]

_HOMES = {
    "LoadedPolicy": "model",
    "PolicyError": "problems",
    "Problem": "problems",
    "compile_policy": "compile",
}


def load(path_option: str | None, environ: Mapping[str, str]) -> LoadedPolicy:
    """The policy that applies: see locate.find for where it is looked for.

    Raises PolicyError with every problem found, in the order of the files.
    """
    from interposer.config.locate import find, settled

    return settled(find(path_option, environ), lambda location: load_files(location.files))


def load_files(files: list[str]) -> LoadedPolicy:
    """The policy in these files, in this order; without any, the built-in default. Raises PolicyError."""
    from interposer.config.check import check_policy
    from interposer.config.model import LoadedPolicy
    from interposer.config.parse import read_policy
    from interposer.config.problems import PolicyError

    policy, errors, warnings = read_policy(files)
    if not errors:
        more_errors, more_warnings = check_policy(policy)
        errors += more_errors
        warnings += more_warnings
    order = {path: number for number, path in enumerate(files)}
    errors.sort(key=lambda problem: (order.get(problem.file, len(order)), problem.line))
    warnings.sort(key=lambda problem: (order.get(problem.file, len(order)), problem.line))
    if errors:
        raise PolicyError(errors)
    modules = dict.fromkeys(function.path for function in policy.functions())
    return LoadedPolicy(policy, tuple(files), tuple(warnings), tuple(modules))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
