"""The model to the bytes of native/table.h."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Sequence
from typing import Literal

from interposer.config import late_python
from interposer.config.check import pattern_pairs, search_folders
from interposer.config.model import Pattern, Place, Policy, Predicate, Rule
from interposer.config.parse import provider_numbers
from interposer.config.problems import PolicyError, Problem
from interposer.policy import table
from interposer.providers import NAMES as PROVIDERS

_BYTE_ORDER: Literal["little", "big"] = sys.byteorder


def compile_policy(
    policy: Policy,
    *,
    libpython: str,
    python_home: str,
    search_path: Sequence[str],
    engine_module: str,
    helper: str,
    key: str,
    providers_override: Sequence[str] | None = None,
    require: bool = False,
) -> bytes:
    """The compiled table.

    `search_path` is the engine's sys.path without users' modules, whose directories follow it. `providers_override`
    (--provider) takes the place of every list of providers in the policy; `("tcp",)` makes everything TCP. `require`
    (--require) makes every `otherwise` an error, that of rules with use = "tcp" included. Raises PolicyError for an
    unknown provider and for a policy that is too large.
    """
    writer = _Writer(providers_override, require)
    for section in policy.sections:
        writer.section(
            section.place, section.predicates, section.rules, section.engine, section.otherwise, section.providers,
            section.ignore_firewall,
        )
    if _may_embed(policy) and not writer.tcp_only:
        place = Place(late_python.PLACE, 0)
        for exe in late_python.PROGRAMS:
            condition = Predicate(table.PREDICATE_EXE, exe, 0, place)
            writer.section(place, (condition,), (), table.ENGINE_HELPER, 0, (), table.FIREWALL_INHERIT)
    writer.section(
        policy.place, (), policy.rules, policy.engine, policy.otherwise, policy.providers, policy.ignore_firewall
    )
    paths = [writer.text(path) for path in (*search_path, *search_folders(policy))]
    launcher = [writer.text(text) for text in (libpython, python_home, engine_module, helper, key)]
    return writer.finish(paths, launcher)


def _may_embed(policy: Policy) -> bool:
    """Whether Python may come into programs that no section with an `engine` applies to."""
    if policy.engine in (table.ENGINE_HELPER, table.ENGINE_OFF):
        return False
    return bool(policy.functions()) or policy.engine in (table.ENGINE_REACTIVE, table.ENGINE_STARTUP)


class _Writer:
    def __init__(self, providers_override: Sequence[str] | None, require: bool) -> None:
        self.require = require
        self.tcp_only = providers_override is not None and list(providers_override) == ["tcp"]
        self.override: bytes | None = None
        if providers_override is not None and not self.tcp_only:
            self.override = _provider_field(provider_numbers(providers_override))
        self.strings = bytearray(b"\0")
        self.offsets: dict[str, int] = {"": 0}
        self.sections: list[bytes] = []
        self.predicates: list[bytes] = []
        self.rules: list[bytes] = []
        self.functions: list[bytes] = []
        self.function_numbers: dict[tuple[str, str, int], int] = {}

    def text(self, text: str) -> int:
        if text not in self.offsets:
            raw = text.encode("utf-8", "surrogateescape")
            if b"\0" in raw:
                raise PolicyError([Problem("", 0, f"{text!r} holds a NUL character", "remove it")])
            self.offsets[text] = len(self.strings)
            self.strings += raw + b"\0"
        return self.offsets[text]

    def providers(self, names: Sequence[str]) -> bytes:
        """The field for a list of names; an empty one inherits, and the global scope's is never empty."""
        if self.tcp_only:
            return bytes(table.PROVIDERS_MAX)
        if self.override is not None and names:
            return self.override
        return _provider_field([PROVIDERS[name] for name in names])

    def section(
        self,
        place: Place,
        predicates: Sequence[Predicate],
        rules: Sequence[Rule],
        engine: int,
        otherwise: int,
        providers: Sequence[str],
        ignore_firewall: int,
    ) -> None:
        first_predicate, first_rule = len(self.predicates), len(self.rules)
        for predicate in predicates:
            self.predicates.append(table.PREDICATE.pack(predicate.kind, self.text(predicate.text), predicate.number, 0))
        for rule in rules:
            self.rule(rule)
        strict = table.OTHERWISE_ERROR if self.require and otherwise else otherwise
        self.sections.append(
            table.SECTION.pack(
                first_predicate,
                len(self.predicates) - first_predicate,
                first_rule,
                len(self.rules) - first_rule,
                self.text(place.file),
                place.line,
                engine,
                strict,
                self.providers(providers),
                ignore_firewall,
            )
        )

    def rule(self, rule: Rule) -> None:
        action = table.ACTION_TCP if self.tcp_only else rule.action
        otherwise = table.OTHERWISE_ERROR if self.require else rule.otherwise
        function = self.function(rule) if action == table.ACTION_ASK else 0
        file = self.text(rule.place.file)
        providers = self.providers(rule.providers) if action == table.ACTION_SAN else bytes(table.PROVIDERS_MAX)
        written = set()
        for local, remote in pattern_pairs(rule):
            record = table.RULE.pack(
                rule.role,
                action,
                otherwise,
                0,
                providers,
                *_side(local),
                *_side(remote),
                *local.ports,
                *remote.ports,
                local.address,
                remote.address,
                function,
                file,
                rule.place.line,
            )
            if record not in written:
                written.add(record)
                self.rules.append(record)

    def function(self, rule: Rule) -> int:
        function = rule.function
        assert function is not None
        identity = (function.module, function.name, function.timeout_ms)
        if identity not in self.function_numbers:
            self.function_numbers[identity] = len(self.functions)
            self.functions.append(
                table.FUNCTION.pack(
                    self.text(function.module),
                    self.text(function.name),
                    function.timeout_ms,
                    0,
                    self.text(function.place.file),
                    function.place.line,
                )
            )
        return self.function_numbers[identity]

    def finish(self, search_path: list[int], launcher: list[int]) -> bytes:
        body = bytearray()

        def area(records: Sequence[bytes]) -> tuple[int, int]:
            offset = table.HEADER.size + len(body)
            body.extend(b"".join(records))
            return offset, len(records)

        counts = [
            number
            for records in (self.sections, self.predicates, self.rules, self.functions)
            for number in area(records)
        ]
        path_offset, path_count = area([offset.to_bytes(4, _BYTE_ORDER) for offset in search_path])
        strings_offset, _ = area([bytes(self.strings)])
        size = table.HEADER.size + len(body)
        if size > table.MAX_SIZE:
            message = f"the compiled policy has {size} bytes, at most {table.MAX_SIZE} fit"
            raise PolicyError([Problem("", 0, message, "use fewer rules")])
        header = table.HEADER.pack(
            table.MAGIC,
            table.VERSION,
            size,
            zlib.crc32(body),
            0,
            time.time_ns(),
            *counts,
            strings_offset,
            len(self.strings),
            path_offset,
            path_count,
            *launcher,
            0,
        )
        return header + bytes(body)


def _side(pattern: Pattern) -> tuple[int, int]:
    return pattern.families, pattern.prefix


def _provider_field(numbers: Sequence[int]) -> bytes:
    return bytes(numbers).ljust(table.PROVIDERS_MAX, b"\0")
