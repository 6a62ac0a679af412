"""TOML policy files to the typed model. Reads everything and collects every problem, with file, line and remedy."""

from __future__ import annotations

import os
import pwd
import tomllib
from collections.abc import Iterable
from typing import Any, TypeVar

from interposer.config.addresses import FORMS, BadPattern, parse_pattern
from interposer.config.functions import BadFunction, find_function, split_use
from interposer.config.model import (
    TIMEOUT_MS,
    TIMEOUT_MS_MAX,
    Function,
    Pattern,
    Place,
    Policy,
    Predicate,
    Rule,
    Section,
)
from interposer.config.problems import PolicyError, Problem
from interposer.config.toml_lines import Path, lines_of
from interposer.config.words import nearest, quoted
from interposer.policy import table
from interposer.providers import NAMES as PROVIDERS

Value = TypeVar("Value")
Table = dict[str, Any]

VERSION = 1
ROLES = {
    "listen": table.ROLE_LISTEN,
    "connect": table.ROLE_CONNECT,
    "both": table.ROLE_LISTEN | table.ROLE_CONNECT,
}
OTHERWISE = {"tcp": table.OTHERWISE_TCP, "error": table.OTHERWISE_ERROR}
ENGINES = {
    "embedded": table.ENGINE_EMBEDDED,
    "startup": table.ENGINE_STARTUP,
    "helper": table.ENGINE_HELPER,
    "reactive": table.ENGINE_REACTIVE,
    "off": table.ENGINE_OFF,
}
PREDICATES = {
    "exe": table.PREDICATE_EXE,
    "name": table.PREDICATE_NAME,
    "arg": table.PREDICATE_ARG,
    "user": table.PREDICATE_USER,
    "cgroup": table.PREDICATE_CGROUP,
    "env": table.PREDICATE_ENV,
}
REPEATABLE = ("arg", "env")

TOP_KEYS = ("version", "defaults", "process", "rule")
DEFAULTS_KEYS = ("providers", "otherwise", "engine", "ignore_firewall", "timeout_ms", "python_path")
PROCESS_KEYS = (*PREDICATES, "rule", "engine", "otherwise", "providers", "ignore_firewall")
RULE_KEYS = ("role", "local", "remote", "use", "otherwise", "timeout_ms")

TCP_RULE = 'for TCP write a rule with use = "tcp"'
TYPES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "a table", float: "a number"}
USER_MAX = 0xFFFFFFFE


class PolicyReader:
    """Reads policy files one after the other; `policy()` is all of them together.

    `problems` and `warnings` grow as it reads; what is wrong is left out of the model.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._files: list[_File] = []
        self._defaults: dict[str, Any] = {}
        self._place = Policy().place

    def read(self, path: str) -> None:
        """Reads one file. A later file's [defaults] override an earlier one's, key by key."""
        try:
            with open(path, "rb") as source:
                mode = os.fstat(source.fileno()).st_mode
                text = source.read().decode()
        except OSError as error:
            message = f"the policy file cannot be read: {error.strerror}"
            self.problems.append(Problem(path, 0, message, "make it readable"))
            return
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.problems.append(Problem(path, line, "not UTF-8 text", "save the file as UTF-8"))
            return
        if mode & 0o002:
            self.problems.append(Problem(path, 0, "everybody may write the policy file", f"chmod o-w {path}"))
        file = _File(path, self.problems, self.warnings)
        if not file.parse(text):
            return
        self._files.append(file)
        defaults = file.defaults()
        self._defaults.update(defaults)
        if defaults or self._place.line == 0:
            self._place = file.place(("defaults",))

    def policy(self) -> Policy:
        """The model of all files read."""
        timeout_ms = self._defaults.setdefault("timeout_ms", TIMEOUT_MS)
        python_path = self._defaults.setdefault("python_path", ())
        sections: list[Section] = []
        rules: list[Rule] = []
        for file in self._files:
            file.timeout_ms = timeout_ms
            file.folders = [os.path.dirname(file.path), *python_path]
            sections += file.sections()
            rules += file.rules()
        return Policy(place=self._place, sections=tuple(sections), rules=tuple(rules), **self._defaults)


class _File:
    def __init__(self, path: str, problems: list[Problem], warnings: list[Problem]) -> None:
        self.path = path
        self.problems = problems
        self.warnings = warnings
        self.data: Table = {}
        self.lines: dict[Path, int] = {}
        self.timeout_ms = TIMEOUT_MS
        self.folders: list[str] = []

    def parse(self, text: str) -> bool:
        try:
            self.data = tomllib.loads(text)
            self.lines = lines_of(text)
        except RecursionError:
            self.problems.append(Problem(self.path, 0, "nested too deeply", "take brackets away"))
            return False
        except tomllib.TOMLDecodeError as error:
            message, line = _toml_error(str(error), text)
            self.problems.append(Problem(self.path, line, f"not TOML: {message}", "correct the line"))
            return False
        self.known_keys((), self.data, TOP_KEYS, "the file")
        version = self.data.get("version")
        misspelt = any(nearest(key, TOP_KEYS) == "version" for key in self.data)
        if version is None and not misspelt:
            self.problems.append(Problem(self.path, 1, "no version", f"begin the file with version = {VERSION}"))
        elif version is not None and (type(version) is not int or version != VERSION):
            self.error(("version",), f"version = {_show(version)}, expected {VERSION}", f"write version = {VERSION}")
        return True

    def place(self, path: Path) -> Place:
        while path and path not in self.lines:
            path = path[:-1]
        return Place(self.path, self.lines.get(path, 1))

    def error(self, path: Path, message: str, hint: str) -> None:
        self.problems.append(Problem(self.path, self.place(path).line, message, hint))

    def warn(self, path: Path, message: str, hint: str) -> None:
        self.warnings.append(Problem(self.path, self.place(path).line, message, hint))

    def known_keys(self, path: Path, values: Table, valid: Iterable[str], where: str) -> None:
        for key in values:
            if key not in valid:
                near = nearest(key, valid)
                hint = f'did you mean "{near}"?' if near else "remove it"
                self.error((*path, key), f'unknown key "{key}" in {where}, expected {quoted(valid)}', hint)

    def take(self, path: Path, values: Table, key: str, wanted: type[Value], expected: str) -> Value | None:
        """The value of a key if it is there and of the wanted type."""
        value = values.get(key)
        if value is None:
            return None
        if type(value) is not wanted:
            self.error((*path, key), f"{key} is {_kind(value)}, expected {expected}", f"write {key} = {_example(key)}")
            return None
        return value

    def word(self, path: Path, values: Table, key: str, valid: dict[str, int]) -> int:
        """The number of a keyword, 0 where it is missing or wrong."""
        value = self.take(path, values, key, str, quoted(valid))
        if value is None:
            return 0
        if value not in valid:
            near = nearest(value, valid)
            hint = f'did you mean "{near}"?' if near else f"write one of {quoted(valid)}"
            self.error((*path, key), f'{key} = "{value}", expected {quoted(valid)}', hint)
        return valid.get(value, 0)

    def strings(self, path: Path, values: Table, key: str, expected: str) -> list[tuple[Path, str]] | None:
        """A string or a list of strings, each with its path; None where missing or wrong."""
        value = values.get(key)
        if value is None:
            return None
        where = (*path, key)
        if type(value) is str:
            return [(where, value)]
        if type(value) is not list:
            self.error(where, f"{key} is {_kind(value)}, expected {expected}", f"write {key} = {_example(key)}")
            return None
        found: list[tuple[Path, str]] = []
        for index, element in enumerate(value):
            if type(element) is not str:
                message = f"{key} holds {_kind(element)}, expected {expected}"
                self.error((*where, index), message, f"write {key} = {_example(key)}")
            else:
                found.append(((*where, index), element))
        return found if found or not value else None

    def tables(self, path: Path, values: Table, key: str, header: str) -> list[tuple[Path, Table]]:
        value = values.get(key)
        if value is None:
            return []
        if type(value) is not list or not all(type(element) is dict for element in value):
            self.error((*path, key), f"{key} is {_kind(value)}, expected {header} tables", f"write {header}")
            return []
        return [((*path, key, index), element) for index, element in enumerate(value)]

    def defaults(self) -> dict[str, Any]:
        path: Path = ("defaults",)
        values = self.data.get("defaults", {})
        if type(values) is not dict:
            self.error(path, f"defaults is {_kind(values)}, expected a table", "write [defaults]")
            return {}
        self.known_keys(path, values, DEFAULTS_KEYS, "[defaults]")
        found = {
            "providers": self.providers(path, values),
            "otherwise": self.word(path, values, "otherwise", OTHERWISE),
            "engine": self.word(path, values, "engine", ENGINES),
            "ignore_firewall": self.ignore_firewall(path, values),
            "timeout_ms": self.timeout(path, values),
            "python_path": self.python_path(path, values),
        }
        return {key: value for key, value in found.items() if value}

    def python_path(self, path: Path, values: Table) -> tuple[str, ...]:
        folders = self.strings(path, values, "python_path", "a list of absolute directories") or []
        for where, folder in folders:
            if not os.path.isabs(folder):
                self.error(where, f'"{folder}" is not an absolute path', "write the path from / on")
            elif not os.path.isdir(folder):
                self.error(where, f'"{folder}" is no directory', "create it or correct the path")
        return tuple(os.path.normpath(folder) for _, folder in folders)

    def ignore_firewall(self, path: Path, values: Table) -> int:
        value = self.take(path, values, "ignore_firewall", bool, "true or false")
        return table.FIREWALL_INHERIT if value is None else table.FIREWALL_IGNORE if value else table.FIREWALL_HEED

    def timeout(self, path: Path, values: Table) -> int:
        expected = f"1 to {TIMEOUT_MS_MAX} milliseconds"
        value = self.take(path, values, "timeout_ms", int, expected)
        if value is not None and not 1 <= value <= TIMEOUT_MS_MAX:
            message = f"timeout_ms = {value}, expected {expected}"
            self.error((*path, "timeout_ms"), message, f"write timeout_ms = {TIMEOUT_MS}")
            return 0
        return value or 0

    def providers(self, path: Path, values: Table) -> tuple[str, ...]:
        found = self.strings(path, values, "providers", f"a list of {quoted(PROVIDERS)}")
        if found is None:
            return ()
        if not found:
            self.error((*path, "providers"), "providers is empty", TCP_RULE)
        return self.provider_names((*path, "providers"), found)

    def provider_names(self, path: Path, found: list[tuple[Path, str]]) -> tuple[str, ...]:
        names: list[str] = []
        for where, name in found:
            if name in names:
                self.error(where, f'provider "{name}" is named twice', "remove one")
            elif name == "tcp":
                self.error(where, '"tcp" is no SAN provider', TCP_RULE + "; what follows the providers is `otherwise`")
            elif name not in PROVIDERS:
                near = nearest(name, PROVIDERS)
                hint = f'did you mean "{near}"?' if near else f"write {quoted(PROVIDERS)}"
                self.error(where, f'unknown provider "{name}", expected {quoted(PROVIDERS)}', hint)
            else:
                names.append(name)
        if len(names) > table.PROVIDERS_MAX:
            self.error(path, f"{len(names)} providers, expected at most {table.PROVIDERS_MAX}", "remove some")
            del names[table.PROVIDERS_MAX :]
        return tuple(names)

    def sections(self) -> list[Section]:
        return [self.section(path, values) for path, values in self.tables((), self.data, "process", "[[process]]")]

    def section(self, path: Path, values: Table) -> Section:
        self.known_keys(path, values, PROCESS_KEYS, "[[process]]")
        if not any(key in PREDICATES or key not in PROCESS_KEYS for key in values):
            message = f"[[process]] does not say which, expected {quoted(PREDICATES)}"
            self.error(path, message, "add one, or move its rules to [[rule]]")
        section = Section(
            place=self.place(path),
            predicates=tuple(self.predicates(path, values)),
            rules=tuple(
                self.rule(where, table_, "[[process.rule]]")
                for where, table_ in self.tables(path, values, "rule", "[[process.rule]]")
            ),
            engine=self.word(path, values, "engine", ENGINES),
            otherwise=self.word(path, values, "otherwise", OTHERWISE),
            providers=self.providers(path, values),
            ignore_firewall=self.ignore_firewall(path, values),
        )
        if not any(key in values for key in ("rule", "engine", "otherwise", "providers", "ignore_firewall")):
            hint = "add a [[process.rule]], engine, otherwise, providers or ignore_firewall"
            self.warn(path, "[[process]] changes nothing", hint)
        return section

    def predicates(self, path: Path, values: Table) -> Iterable[Predicate]:
        for key, kind in PREDICATES.items():
            if key == "user":
                if "user" in values:
                    yield Predicate(kind, "", self.user(path, values["user"]), self.place((*path, key)))
                continue
            if key in REPEATABLE:
                patterns = self.strings(path, values, key, "a pattern, or a list that must all match") or []
            else:
                pattern = self.take(path, values, key, str, "a pattern")
                patterns = [] if pattern is None else [((*path, key), pattern)]
            for where, text in patterns:
                if not text or "\0" in text or (key == "env" and text.startswith("=")):
                    example = f"write {key} = {_example(key)}"
                    self.error(where, f"{key} = {_show(text)} can match nothing, expected a pattern", example)
                elif "[" in text or "{" in text:
                    message = f'{key} = "{text}": only * and ? are special, [ and {{ stand for themselves'
                    self.warn(where, message, "use ? for one character")
                yield Predicate(kind, text, 0, self.place(where))

    def user(self, path: Path, value: object) -> int:
        where = (*path, "user")
        if type(value) is int or (type(value) is str and value.isascii() and value.isdigit()):
            number = int(value)
            if 0 <= number <= USER_MAX:
                return number
            self.error(where, f"user = {_show(value)} is no user id", f"expected 0 to {USER_MAX}")
        elif type(value) is str:
            try:
                return pwd.getpwnam(value).pw_uid
            except (KeyError, ValueError):
                near = nearest(value, (entry.pw_name for entry in pwd.getpwall()))
                hint = f'did you mean "{near}"?' if near else "write a user of this machine, or a user id"
                self.error(where, f'unknown user "{value}"', hint)
        else:
            message = f"user is {_kind(value)}, expected a name or a user id"
            self.error(where, message, f"write user = {_example('user')}")
        return 0

    def rules(self) -> list[Rule]:
        return [self.rule(path, values, "[[rule]]") for path, values in self.tables((), self.data, "rule", "[[rule]]")]

    def rule(self, path: Path, values: Table, where: str) -> Rule:
        self.known_keys(path, values, RULE_KEYS, where)
        role = self.word(path, values, "role", ROLES)
        if "role" not in values:
            role = ROLES["connect"] if "remote" in values else ROLES["both"]
        elif "remote" in values and role and role != table.ROLE_CONNECT:
            self.error(
                (*path, "remote"),
                f'remote on a rule with role = "{values["role"]}": a listener has no remote address',
                'write role = "connect", or local instead of remote',
            )
        otherwise = self.word(path, values, "otherwise", OTHERWISE)
        action, providers, function = self.use(path, values)
        if action == table.ACTION_TCP:
            if otherwise:
                message = 'otherwise beside use = "tcp": there is no provider to fail'
                self.error((*path, "otherwise"), message, "remove it")
            # Said in so many words, TCP is allowed even where the section or the defaults are strict.
            otherwise = table.OTHERWISE_TCP
        if "timeout_ms" in values and action != table.ACTION_ASK:
            self.error((*path, "timeout_ms"), "timeout_ms without a function to wait for", "remove it")
        return Rule(
            place=self.place(path),
            role=role or ROLES["both"],
            local=self.patterns(path, values, "local"),
            remote=self.patterns(path, values, "remote"),
            action=action,
            otherwise=otherwise,
            providers=providers,
            function=function,
        )

    def patterns(self, path: Path, values: Table, key: str) -> tuple[Pattern, ...]:
        found = self.strings(path, values, key, f"{FORMS}, or a list")
        if found is None:
            return ()
        if not found:
            self.error((*path, key), f"{key} is empty and matches nothing", f"name an address, or remove {key} for any")
        patterns = []
        for where, text in found:
            try:
                patterns.append(parse_pattern(text))
            except BadPattern as problem:
                self.error(where, f"{key}: {problem}", problem.hint)
        return tuple(patterns)

    def use(self, path: Path, values: Table) -> tuple[int, tuple[str, ...], Function | None]:
        expected = f'"tcp", {quoted(PROVIDERS)}, a list of providers, or "python:MODULE:FUNCTION"'
        found = self.strings(path, values, "use", expected)
        if found is None:
            return table.ACTION_SAN, (), None
        where: Path = (*path, "use")
        if [name for _, name in found] == ["tcp"]:
            return table.ACTION_TCP, (), None
        if len(found) == 1 and found[0][1].partition(":")[0] == "python":
            return table.ACTION_ASK, (), self.function(path, found[0][0], found[0][1], values)
        if not found:
            self.error(where, "use is empty", 'write use = "tcp", or remove it for the default providers')
        for element, name in found:
            if ":" in name:
                message = f'use: "{name}" is none of {expected}'
                scheme, _, rest = name.partition(":")
                hint = 'a function stands alone: use = "python:MODULE:FUNCTION"'
                if len(found) == 1 and nearest(scheme, ["python"]):
                    hint = f'did you mean "python:{rest}"?'
                self.error(element, message, hint)
                return table.ACTION_SAN, (), None
        if len(found) == 1 and found[0][1] not in PROVIDERS:
            element, name = found[0]
            near = nearest(name, ["tcp", *PROVIDERS])
            hint = f'did you mean "{near}"?' if near else f"write {expected}"
            self.error(element, f'unknown provider "{name}", expected {expected}', hint)
            return table.ACTION_SAN, (), None
        return table.ACTION_SAN, self.provider_names(where, found), None

    def function(self, path: Path, where: Path, text: str, values: Table) -> Function | None:
        timeout_ms = self.timeout(path, values) or self.timeout_ms
        try:
            module, name = split_use(text)
            found = find_function(module, name, self.folders)
        except BadFunction as problem:
            here = self.place(where)
            if problem.file:
                origin = f"{problem} (used at {here.file}:{here.line})"
                self.problems.append(Problem(problem.file, problem.line, origin, problem.hint))
            else:
                self.error(where, f"use: {problem}", problem.hint)
            return None
        return Function(module, name, timeout_ms, found, self.place(where))


def read_policy(files: Iterable[str]) -> tuple[Policy, list[Problem], list[Problem]]:
    """The model of the files, the errors and the warnings."""
    reader = PolicyReader()
    for path in files:
        reader.read(path)
    return reader.policy(), reader.problems, reader.warnings


def provider_numbers(names: Iterable[str]) -> tuple[int, ...]:
    """The numbers of providers named on a command line. Raises PolicyError with the nearest valid words."""
    problems: list[Problem] = []
    file = _File("", problems, [])
    listed = list(names)
    if not listed:
        problems.append(Problem("", 0, "no provider is named", f"write {quoted(PROVIDERS)}"))
    found = file.provider_names((), [((), name) for name in listed])
    if problems:
        raise PolicyError([Problem("", 0, problem.message, problem.hint) for problem in problems])
    return tuple(PROVIDERS[name] for name in found)


def _toml_error(message: str, text: str) -> tuple[str, int]:
    sentence, _, place = message.partition(" (at ")
    words = place.replace(",", " ").split()
    line = int(words[1]) if len(words) > 1 and words[0] == "line" else text.count("\n") + 1
    return sentence, line


def _kind(value: object) -> str:
    return TYPES.get(type(value), "a date or time")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _example(key: str) -> str:
    return {
        "role": '"listen"',
        "local": '"127.0.0.1:6379"',
        "remote": '"10.0.0.0/8:5432"',
        "use": '["unix"]',
        "providers": '["unix"]',
        "otherwise": '"tcp"',
        "engine": '"embedded"',
        "ignore_firewall": "true",
        "timeout_ms": str(TIMEOUT_MS),
        "python_path": '["/etc/interposer/python"]',
        "exe": '"redis-*"',
        "name": '"redis-server"',
        "arg": '"--port=*"',
        "user": '"www-data"',
        "cgroup": '"/system.slice/*"',
        "env": '"NAME=*"',
    }[key]
