"""The decision, in Python: which provider serves a listen() or a connect(), and by which rule.

The twin of native/flows.c on the same table: for every request both give the same verdict, which
tests/unit/test_flows.py proves. Imported inside other people's processes: no imports beyond the table's.
"""

from __future__ import annotations

from interposer.policy import reasons
from interposer.policy.table import (
    ACTION_ASK,
    ACTION_SAN,
    ACTION_TCP,
    ENGINE_INHERIT,
    ENGINE_OFF,
    FAMILY_V4,
    FAMILY_V6,
    FUNCTION_NONE,
    OTHERWISE_INHERIT,
    PREDICATE_ARG,
    PREDICATE_CGROUP,
    PREDICATE_ENV,
    PREDICATE_EXE,
    PREDICATE_NAME,
    PREDICATE_USER,
    ROLE_CONNECT,
    RULE_DEFAULT,
    V4_PREFIX,
    WILDCARD_V4,
    WILDCARD_V6,
    Rule,
    Section,
    Table,
)

__all__ = ["Engine", "Facts", "Table", "glob_matches"]

_POLICY_TCP = reasons.POLICY_TCP
_ENGINE_OFF = reasons.ENGINE_OFF


class Facts:
    """What process predicates look at: bytes, as the kernel gives them.

    `arguments` begins with argv[0], `environment` holds NAME=VALUE, `cgroups` the paths of /proc/self/cgroup.
    """

    __slots__ = ("arguments", "cgroups", "environment", "exe", "name", "user")

    def __init__(
        self,
        exe: bytes = b"",
        name: bytes = b"",
        arguments: tuple[bytes, ...] = (),
        environment: tuple[bytes, ...] = (),
        cgroups: tuple[bytes, ...] = (),
        user: int = 0,
    ) -> None:
        self.exe = exe
        self.name = name
        self.arguments = arguments
        self.environment = environment
        self.cgroups = cgroups
        self.user = user


class Engine:
    """The part of a table that applies to one process.

    `engine`, `otherwise` and `providers` are the process's: of the first applying section that sets one.
    """

    __slots__ = ("_rules", "engine", "otherwise", "providers", "table")

    def __init__(self, table: Table, facts: Facts) -> None:
        self.table = table
        self.engine = ENGINE_INHERIT
        self.otherwise = OTHERWISE_INHERIT
        self.providers: tuple[int, ...] = ()
        self._rules: list[tuple[int, Rule, Section | None]] = []
        last = len(table.sections) - 1
        for number, section in enumerate(table.sections):
            if not section_applies(section, facts):
                continue
            self.engine = self.engine or section.engine
            self.otherwise = self.otherwise or section.otherwise
            self.providers = self.providers or section.providers
            own = section if number < last else None
            for index in range(section.first_rule, section.first_rule + section.nrules):
                self._rules.append((index, table.rules[index], own))

    def decide(
        self, role: int, family: int, local_ip: bytes, local_port: int, remote_ip: bytes, remote_port: int
    ) -> tuple[int, int, tuple[int, ...], int, int, int]:
        """(action, otherwise, providers, reason, rule, function) for one listen() or connect().

        Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d; all zero where unknown. `family` is the socket's and decides
        nothing. ACTION_ASK means that `function` of the table has to be called.
        """
        if role == ROLE_CONNECT and local_ip in (WILDCARD_V4, WILDCARD_V6):
            # An unbound source has the family of the destination.
            local_ip = WILDCARD_V4 if remote_ip.startswith(V4_PREFIX) else WILDCARD_V6
        local_family = FAMILY_V4 if local_ip.startswith(V4_PREFIX) else FAMILY_V6
        remote_family = FAMILY_V4 if remote_ip.startswith(V4_PREFIX) else FAMILY_V6
        local = int.from_bytes(local_ip, "big")
        remote = int.from_bytes(remote_ip, "big")
        for index, rule, section in self._rules:
            if (
                rule.role & role
                and rule.local_families & local_family
                and rule.remote_families & remote_family
                and rule.local_first <= local_port <= rule.local_last
                and rule.remote_first <= remote_port <= rule.remote_last
                and local & rule.local_mask == rule.local
                and remote & rule.remote_mask == rule.remote
            ):
                return self._verdict(index, rule, section)
        if self.providers:
            return ACTION_SAN, self.otherwise, self.providers, 0, RULE_DEFAULT, FUNCTION_NONE
        return ACTION_TCP, self.otherwise, (), _POLICY_TCP, RULE_DEFAULT, FUNCTION_NONE

    def _verdict(
        self, index: int, rule: Rule, section: Section | None
    ) -> tuple[int, int, tuple[int, ...], int, int, int]:
        otherwise = rule.otherwise or (section.otherwise if section else 0) or self.otherwise
        if rule.action == ACTION_ASK:
            if self.engine == ENGINE_OFF:
                return ACTION_TCP, otherwise, (), _ENGINE_OFF, index, FUNCTION_NONE
            return ACTION_ASK, otherwise, (), 0, index, rule.function
        if rule.action == ACTION_SAN:
            providers = rule.providers or (section.providers if section else ()) or self.providers
            if providers:
                return ACTION_SAN, otherwise, providers, 0, index, FUNCTION_NONE
        return ACTION_TCP, otherwise, (), _POLICY_TCP, index, FUNCTION_NONE

    def providers_of(self, index: int) -> tuple[int, ...]:
        """The providers of a rule that applies here: its own, else its section's, else the process's.

        For RULE_DEFAULT the process's.
        """
        for number, rule, section in self._rules:
            if number == index:
                return rule.providers or (section.providers if section else ()) or self.providers
        return self.providers


def section_applies(section: Section, facts: Facts) -> bool:
    """Whether all predicates of a section hold."""
    return all(predicate_holds(kind, text, number, facts) for kind, text, number in section.predicates)


def predicate_holds(kind: int, text: bytes, number: int, facts: Facts) -> bool:
    """Whether one predicate (PREDICATE_*, its pattern, its number) holds."""
    if kind == PREDICATE_EXE:
        return glob_matches(text, facts.exe if b"/" in text else facts.exe[facts.exe.rfind(b"/") + 1 :])
    if kind == PREDICATE_NAME:
        return glob_matches(text, facts.name)
    if kind == PREDICATE_ARG:
        return any(glob_matches(text, argument) for argument in facts.arguments[1:])
    if kind == PREDICATE_USER:
        return facts.user == number
    if kind == PREDICATE_CGROUP:
        return any(glob_matches(text, path) for path in facts.cgroups)
    if kind == PREDICATE_ENV:
        name, separator, pattern = text.partition(b"=")
        for variable in facts.environment:
            key, _, value = variable.partition(b"=")
            if key == name:
                return not separator or glob_matches(pattern, value)
    return False


def glob_matches(pattern: bytes, text: bytes) -> bool:
    """`*` is any bytes, `?` is one byte, every other byte is itself."""
    first, *pieces = pattern.split(b"*")
    if not pieces:
        return len(first) == len(text) and _find(first, text, 0, len(text)) == 0
    last = pieces.pop()
    at, end = len(first), len(text) - len(last)
    if end < at or _find(first, text, 0, at) or _find(last, text, end, len(text)) != end:
        return False
    for piece in pieces:
        at = _find(piece, text, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True


def _find(piece: bytes, text: bytes, start: int, end: int) -> int:
    """bytes.find for a piece in which `?` is one byte: arguments and environments can have megabytes."""
    if b"?" not in piece:
        return text.find(piece, start, end)
    parts = piece.split(b"?")
    longest = max(parts, key=len)
    before = piece.index(longest)
    while start + len(piece) <= end:
        start = text.find(longest, start + before, end) - before
        if start + before < 0 or start + len(piece) > end:
            return -1
        at = start
        for part in parts:
            if not text.startswith(part, at):
                break
            at += len(part) + 1
        else:
            return start
        start += 1
    return -1
