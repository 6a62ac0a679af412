"""The policy as read: what the TOML files say, typed, each part with its place."""

from __future__ import annotations

from dataclasses import dataclass, field

from interposer.config.problems import Problem

ALL_PORTS = (0, 65535)
TIMEOUT_MS = 100
TIMEOUT_MS_MAX = 10_000


@dataclass(frozen=True, order=True)
class Place:
    """A line of a policy file."""

    file: str
    line: int


@dataclass(frozen=True)
class Pattern:
    """A set of endpoints: one address prefix and one range of ports.

    `prefix` counts bits of the 16 address bytes (IPv4 is ::ffff:a.b.c.d); `families` are bits of policy.table.
    """

    families: int
    address: bytes
    prefix: int
    ports: tuple[int, int]
    text: str

    @property
    def interval(self) -> tuple[int, int]:
        """The first and the last address as numbers."""
        first = int.from_bytes(self.address, "big")
        return first, first | ((1 << (128 - self.prefix)) - 1)


@dataclass(frozen=True)
class Function:
    """`use = "python:module:name"`; `path` is the file that will be imported."""

    module: str
    name: str
    timeout_ms: int
    path: str
    place: Place


@dataclass(frozen=True)
class Rule:
    """One [[rule]] or [[process.rule]].

    `local` and `remote` are alternatives; empty means any. `action` and `otherwise` are of policy.table; empty
    `providers` are the section's or the defaults'.
    """

    place: Place
    role: int
    local: tuple[Pattern, ...]
    remote: tuple[Pattern, ...]
    action: int
    otherwise: int
    providers: tuple[str, ...]
    function: Function | None = None


@dataclass(frozen=True)
class Predicate:
    """One condition of a [[process]]: the kind of policy.table, its pattern, or the user id."""

    kind: int
    text: str
    number: int
    place: Place


@dataclass(frozen=True)
class Section:
    """One [[process]]. It applies when all of its predicates hold."""

    place: Place
    predicates: tuple[Predicate, ...]
    rules: tuple[Rule, ...]
    engine: int
    otherwise: int
    providers: tuple[str, ...]
    ignore_firewall: int = 0


@dataclass(frozen=True)
class Policy:
    """All files together. Without any, this is the built-in default: unix, and TCP where it does not serve."""

    place: Place = Place("built-in defaults", 0)
    sections: tuple[Section, ...] = ()
    rules: tuple[Rule, ...] = ()
    providers: tuple[str, ...] = ("unix",)
    otherwise: int = 1
    engine: int = 1
    ignore_firewall: int = 1
    timeout_ms: int = TIMEOUT_MS
    python_path: tuple[str, ...] = ()

    def all_rules(self) -> tuple[Rule, ...]:
        """Every rule, in the order of the table."""
        return tuple(rule for section in self.sections for rule in section.rules) + self.rules

    def functions(self) -> tuple[Function, ...]:
        """The functions that rules ask, in the order of the rules."""
        return tuple(rule.function for rule in self.all_rules() if rule.function)


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy without errors, the files that it was read from in order, and what deserves a look.

    `modules` are the Python files of its functions.
    """

    policy: Policy
    files: tuple[str, ...] = ()
    warnings: tuple[Problem, ...] = ()
    modules: tuple[str, ...] = field(default=())
