"""What `sanrun --dry-run` prints: the environment, the rules that apply to the program, in order, and the machine's
addresses with the providers that serve them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from interposer.config import late_python
from interposer.launch.elf import Program
from interposer.policy import table as layout
from interposer.policy.engine import Facts, Table, section_applies
from interposer.providers import NAMES

ENGINES = ("inherit", "embedded", "startup", "helper", "reactive", "off")
OTHERWISE = ("inherit", "tcp", "error")
NAME_SIZE = 15
"""Bytes of a program's name that the kernel keeps (/proc/self/comm)."""


def report(
    program: Program, command: Sequence[str], environ: Mapping[str, str], additions: Mapping[str, str], data: bytes
) -> str:
    """The text for one command; `data` is its compiled table."""
    lines = [f"program: {shlex.join(command)}", f"executes: {program.path}"]
    if program.binary != program.path:
        lines.append(f"which runs: {program.binary}")
    if program.obstacle:
        lines.append(f"not interposed: {program.obstacle}; it runs on plain TCP")
    if environ.get("INTERPOSER") == "off":
        lines.append("not interposed: INTERPOSER=off")
    lines += ["", "environment:", *(f"  {name}={value}" for name, value in additions.items())]
    lines += ["", "rules, first match wins:"]
    table = Table(data)
    facts = _facts(program, command, environ)
    engine = otherwise = firewall = 0
    engine_place = ""
    providers: tuple[int, ...] = ()
    for section in table.sections:
        if not section_applies(section, facts):
            continue
        if section.engine and not engine:
            engine, engine_place = section.engine, _place(section, section is table.sections[-1])
        otherwise = otherwise or section.otherwise
        firewall = firewall or section.firewall
        providers = providers or section.providers
        for rule in table.rules[section.first_rule : section.first_rule + section.nrules]:
            lines.append(f"  {rule.file}:{rule.line}: {_rule(rule, table)}")
    lines.append(f"  otherwise: {_providers(providers)}, else {OTHERWISE[otherwise]}")
    ignored = firewall == layout.FIREWALL_IGNORE
    lines.append(f"  packet filters: {'ignored' if ignored else 'where some act, TCP'}")
    lines += ["", f"engine: {ENGINES[engine]}, by {engine_place}"]
    lines += ["", "addresses of this machine:", *_addresses()]
    return "\n".join(lines) + "\n"


def _addresses() -> list[str]:
    from interposer.cli.addresses import row
    from interposer.diag import addresses

    try:
        table = addresses.table()
    except addresses.AddressesError as error:
        return [f"  {error}"]
    lines = ["  {2} on {0} ({1}): {3}".format(*row(entry)) for entry in table.entries]
    return lines + [f"  {each.name} cannot be used: {each.problem}" for each in table.providers if each.problem]


def _place(section: layout.Section, last: bool) -> str:
    if last:
        return "[defaults]"
    if section.file != late_python.PLACE:
        return f"{section.file}:{section.line}"
    pattern = os.fsdecode(section.predicates[0][1])
    return f'the {section.file}: "{pattern}" by {late_python.PROGRAMS.get(pattern, "something")}'


def _facts(program: Program, command: Sequence[str], environ: Mapping[str, str]) -> Facts:
    arguments = list(command) if program.binary == program.path else [program.binary, program.path, *command[1:]]
    try:
        with open("/proc/self/cgroup", "rb") as file:
            cgroups = tuple(line.rstrip(b"\n").split(b":", 2)[2] for line in file)
    except OSError:
        cgroups = ()
    return Facts(
        exe=os.fsencode(os.path.realpath(program.binary)),
        name=os.fsencode(os.path.basename(program.path))[:NAME_SIZE],
        arguments=tuple(map(os.fsencode, arguments)),
        environment=tuple(os.fsencode(f"{name}={value}") for name, value in environ.items()),
        cgroups=cgroups,
        user=os.geteuid(),
    )


def _rule(rule: layout.Rule, table: Table) -> str:
    roles = {layout.ROLE_LISTEN: "listen", layout.ROLE_CONNECT: "connect"}
    role = roles.get(rule.role, "both")
    if rule.action == layout.ACTION_ASK:
        function = table.functions[rule.function]
        return f"{role} -> python:{function.module}:{function.name}"
    if rule.action == layout.ACTION_TCP:
        return f"{role} -> tcp"
    return f"{role} -> {_providers(rule.providers) if rule.providers else 'the providers below'}"


def _providers(numbers: Sequence[int]) -> str:
    names = {number: name for name, number in NAMES.items()}
    return ", ".join(names.get(number, str(number)) for number in numbers) or "tcp"
