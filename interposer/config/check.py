"""What is wrong with a policy as a whole: rules that can never match, rules that overlap, modules that hide each other.

A rule is a set of boxes: role, address family, and an interval for each of local address, local port, remote address
and remote port. It is shadowed when earlier rules that apply wherever it applies leave nothing of its boxes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

from interposer.config.model import ALL_PORTS, Function, Pattern, Place, Policy, Predicate, Rule, Section
from interposer.config.problems import Problem
from interposer.policy.table import (
    FAMILY_V4,
    FAMILY_V6,
    PREDICATE_ENV,
    PREDICATE_EXE,
    PREDICATE_NAME,
    PREDICATE_USER,
    ROLE_CONNECT,
    ROLE_LISTEN,
)

Interval = tuple[int, int]
Box = tuple[int, int, tuple[Interval, Interval, Interval, Interval]]

ANY = Pattern(FAMILY_V4 | FAMILY_V6, bytes(16), 0, ALL_PORTS, "*")
EVERYTHING: Interval = (0, (1 << 128) - 1)
# The addresses of a family. IPv4's lie amid those of IPv6, but no IPv6 rule matches them.
SPACES: dict[int, Interval] = {FAMILY_V4: (0xFFFF00000000, 0xFFFFFFFFFFFF), FAMILY_V6: EVERYTHING}
# Beyond this many fragments a rule counts as reachable: the check must end.
FRAGMENTS_MAX = 512
WARNINGS_MAX = 50


def check_policy(policy: Policy) -> tuple[list[Problem], list[Problem]]:
    """The errors and the warnings of a policy that parsed."""
    errors: list[Problem] = []
    warnings: list[Problem] = []
    for number, section in enumerate(policy.sections):
        earlier = [rule for other in policy.sections[:number] if _implied(other, section) for rule in other.rules]
        _check_scope(earlier, section.rules, errors, warnings)
        _check_engine(policy.sections[:number], section, warnings)
    always = [rule for section in policy.sections if _always(section) for rule in section.rules]
    _check_scope(always, policy.rules, errors, warnings)
    _check_modules(policy, errors)
    if len(warnings) > WARNINGS_MAX:
        more = len(warnings) - WARNINGS_MAX
        warnings[WARNINGS_MAX:] = [Problem("", 0, f"{more} more warnings", "correct the first ones")]
    return errors, warnings


def search_folders(policy: Policy) -> tuple[str, ...]:
    """The directories of users' modules, in the order of the engine's sys.path."""
    functions = policy.functions()
    if not functions:
        return ()
    folders = [os.path.dirname(function.place.file) for function in functions]
    return tuple(dict.fromkeys([*folders, *policy.python_path]))


def _implied(other: Section, section: Section) -> bool:
    """Whether `other` surely applies to every process that `section` applies to."""
    return all(
        _holds_always(general) or any(_covers(general, special) for special in section.predicates)
        for general in other.predicates
    )


def _always(section: Section) -> bool:
    return all(map(_holds_always, section.predicates))


def _holds_always(predicate: Predicate) -> bool:
    return predicate.kind in (PREDICATE_EXE, PREDICATE_NAME) and not predicate.text.strip("*")


def _covers(general: Predicate, special: Predicate) -> bool:
    """Whether the one surely holds wherever the other does."""
    if general.kind != special.kind:
        return False
    if general.kind == PREDICATE_USER:
        return general.number == special.number
    wide, narrow = general.text, special.text
    if general.kind == PREDICATE_ENV:
        name, value, wide = wide.partition("=")
        same, given, narrow = narrow.partition("=")
        return name == same and (not value or (bool(given) and _glob_covers(wide, narrow)))
    if general.kind == PREDICATE_EXE and "/" in narrow and "/" not in wide:
        narrow = narrow.rpartition("/")[2]
        if "*" in narrow or "?" in narrow:
            return False  # they match "/" too, so the last part can be anything
    elif general.kind == PREDICATE_EXE and "/" in wide and "/" not in narrow:
        return False
    return _glob_covers(wide, narrow)


def _glob_covers(wide: str, narrow: str) -> bool:
    """Whether `wide` matches the text of `narrow`, where a `*` stands for any text and only another one matches it."""
    beginning = wide.partition("*")[0].partition("?")[0]
    if beginning == wide or not narrow.startswith(beginning):
        return wide == narrow
    reached = {0}
    for symbol in ("", *narrow):
        if symbol:
            reached = {
                at if wide[at] == "*" else at + 1
                for at in reached
                if at < len(wide) and (wide[at] in ("*", symbol) or (wide[at] == "?" and symbol != "*"))
            }
        for at in sorted(reached):
            while at < len(wide) and wide[at] == "*":
                at += 1
                reached.add(at)
    return len(wide) in reached


def _check_engine(earlier: tuple[Section, ...], section: Section, warnings: list[Problem]) -> None:
    for other in earlier:
        if section.engine and other.engine and _implied(other, section):
            first = _line(section.place, other.place)
            message = f"this engine is never used: the [[process]] at {first} sets one for all that this applies to"
            warnings.append(Problem(*_at(section.place), message, "move the section up, or remove its engine"))
            return


def pattern_pairs(rule: Rule) -> Iterator[tuple[Pattern, Pattern]]:
    """The pairs of local and remote patterns that can match together: those that share a family."""
    for local, remote in product(rule.local or (ANY,), rule.remote or (ANY,)):
        if local.families & remote.families:
            yield local, remote


def boxes_of(rule: Rule) -> list[Box]:
    """What a rule matches."""
    boxes: list[Box] = []
    for local, remote in pattern_pairs(rule):
        for family, space in SPACES.items():
            if not local.families & remote.families & family:
                continue
            here, there = _common(local.interval, space), _common(remote.interval, space)
            if rule.role & ROLE_LISTEN:
                boxes.append((ROLE_LISTEN, family, (local.ports, here, EVERYTHING, EVERYTHING)))
            if rule.role & ROLE_CONNECT:
                boxes.append((ROLE_CONNECT, family, (remote.ports, there, local.ports, here)))
    return boxes


def _common(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), min(a[1], b[1])


def _disjoint(a: Box, b: Box) -> bool:
    if a[0] != b[0] or a[1] != b[1]:
        return True
    return any(x[0] > y[1] or y[0] > x[1] for x, y in zip(a[2], b[2], strict=True))


def _contains(outer: Box, inner: Box) -> bool:
    if outer[0] != inner[0] or outer[1] != inner[1]:
        return False
    return all(x[0] <= y[0] and y[1] <= x[1] for x, y in zip(outer[2], inner[2], strict=True))


def _subtract(box: Box, other: Box) -> list[Box]:
    """The parts of `box` outside `other`, which overlaps it."""
    role, family, sides = box
    parts: list[Box] = []
    rest = list(sides)
    for axis, (low, high) in enumerate(other[2]):
        first, last = rest[axis]
        if first < low:
            parts.append((role, family, _replaced(rest, axis, (first, low - 1))))
        if last > high:
            parts.append((role, family, _replaced(rest, axis, (high + 1, last))))
        rest[axis] = _common((first, last), (low, high))
    return parts


def _replaced(sides: list[Interval], axis: int, side: Interval) -> tuple[Interval, Interval, Interval, Interval]:
    a, b, c, d = (side if number == axis else old for number, old in enumerate(sides))
    return a, b, c, d


class _Index:
    """Boxes by role, family and single port, so that a thousand rules of a port each stay cheap to check."""

    def __init__(self) -> None:
        self._by_port: dict[tuple[int, int, int], list[tuple[int, Box]]] = {}
        self._ranges: dict[tuple[int, int], list[tuple[int, Box]]] = {}
        self._all: dict[tuple[int, int], list[tuple[int, Box]]] = {}

    def add(self, number: int, box: Box) -> None:
        role, family, ((first, last), *_) = box
        entry = (number, box)
        self._all.setdefault((role, family), []).append(entry)
        if first == last:
            self._by_port.setdefault((role, family, first), []).append(entry)
        else:
            self._ranges.setdefault((role, family), []).append(entry)

    def overlapping(self, box: Box) -> list[tuple[int, Box]]:
        role, family, ((first, last), *_) = box
        if first == last:
            near = self._by_port.get((role, family, first), []) + self._ranges.get((role, family), [])
        else:
            near = self._all.get((role, family), [])
        return [entry for entry in near if not _disjoint(entry[1], box)]


def _check_scope(earlier: list[Rule], rules: tuple[Rule, ...], errors: list[Problem], warnings: list[Problem]) -> None:
    index = _Index()
    seen: list[tuple[Rule, list[Box]]] = []
    for rule in earlier:
        _remember(rule, boxes_of(rule), index, seen)
    for rule in rules:
        boxes = boxes_of(rule)
        if not boxes:
            if rule.local and rule.remote:
                message = "the rule can never match: local and remote are of different families"
                errors.append(_problem(rule, message, "write both as IPv4 or both as IPv6"))
            continue
        left, found = _uncovered(boxes, index)
        places = _places(rule, [seen[number][0] for number in found])
        if not left:
            decide = "decide" if len(found) > 1 else "decides"
            message = f"the rule can never match: {places} already {decide} all that it matches"
            errors.append(_problem(rule, message, "move it up, or remove it"))
            continue
        for number in found:
            other, other_boxes = seen[number]
            if number >= len(earlier) and _outcome(other) != _outcome(rule) and not _inside(other_boxes, boxes):
                message = f"overlaps {_places(rule, [other])}, which decides otherwise and wins where both match"
                warnings.append(_problem(rule, message, "make one narrower if that is not meant"))
        _remember(rule, boxes, index, seen)


def _remember(rule: Rule, boxes: list[Box], index: _Index, seen: list[tuple[Rule, list[Box]]]) -> None:
    for box in boxes:
        index.add(len(seen), box)
    seen.append((rule, boxes))


def _uncovered(boxes: list[Box], index: _Index) -> tuple[list[Box], list[int]]:
    """What earlier rules leave of the boxes, and the numbers of those that overlap them, in order."""
    found: set[int] = set()
    left: list[Box] = []
    for box in boxes:
        parts = [box]
        for number, other in index.overlapping(box):
            found.add(number)
            if len(parts) <= FRAGMENTS_MAX:
                parts = [
                    piece for part in parts for piece in ([part] if _disjoint(part, other) else _subtract(part, other))
                ]
        left += parts
    return left, sorted(found)


def _inside(inner: list[Box], outer: list[Box]) -> bool:
    """Whether each inner box lies within an outer one: an exception before its rule, which is no mistake."""
    return all(any(_contains(box, part) for box in outer) for part in inner)


def _outcome(rule: Rule) -> tuple[object, ...]:
    function = rule.function and (rule.function.path, rule.function.name)
    return rule.action, rule.otherwise, rule.providers, function


def _line(here: Place, there: Place) -> str:
    return f"line {there.line}" if there.file == here.file else f"{there.file}:{there.line}"


def _places(rule: Rule, others: list[Rule]) -> str:
    shown = [_line(rule.place, other.place) for other in others[:3]]
    if len(others) > 3:
        shown.append(f"{len(others) - 3} more")
    text = shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1] if shown else ""
    return ("the rule at " if len(others) == 1 else "the rules at ") + text


def _problem(rule: Rule, message: str, hint: str) -> Problem:
    return Problem(*_at(rule.place), message, hint)


def _at(place: Place) -> tuple[str, int]:
    return place.file, place.line


def _check_modules(policy: Policy, errors: list[Problem]) -> None:
    """One interpreter imports all modules, so a name must mean the same file for every policy file."""
    folders = search_folders(policy)
    first: dict[str, Function] = {}
    for function in policy.functions():
        known = first.setdefault(function.module, function)
        loaded = _first_with(folders, function.module.partition(".")[0])
        if known.path != function.path or (loaded and not function.path.startswith(loaded + "/")):
            other = known.path if known.path != function.path else f"the one in {loaded}"
            message = f'the module "{function.module}" is {function.path} here, but the engine would load {other}'
            errors.append(Problem(*_at(function.place), message, "give the two modules different names"))


def _first_with(folders: tuple[str, ...], top: str) -> str | None:
    for folder in folders:
        if os.path.isfile(f"{folder}/{top}.py") or os.path.isdir(f"{folder}/{top}"):
            return folder
    return None
