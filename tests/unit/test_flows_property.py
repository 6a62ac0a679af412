"""P2: random policies and random requests, judged three times: by the compiled table in C, by the Python engine, and by
a naive reading of the TOML text that shares no line with either, nor with the parser and the compiler.

A case begins as TOML text. What it should mean is written down below, in `Naive`, as README.md and the comments of
native/table.h say it.
"""

from __future__ import annotations

import ipaddress
import pwd
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flows_driver import Host, Request, build, decide_command, facts_command, put, running, table_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from interposer.config.check import check_policy
from interposer.config.parse import read_policy
from interposer.policy import reasons, table
from interposer.policy.engine import Engine, Facts, Table
from interposer.providers import NAMES

MORE_PROVIDERS = {"unix": 1, "alpha": 2, "beta": 3, "gamma": 4, "delta": 5}
"""More than there are, so that their order shows."""
FUNCTIONS = "def f(request): return 'tcp'\ndef g(request): return 'tcp'\n"
REQUESTS = 30
"""For each policy."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


# --- what a policy means, naively -------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """`rule` is (file, line), None for [defaults]; `function` is (module, name, timeout_ms), `reason` a symbol."""

    action: str
    otherwise: str
    providers: tuple[str, ...]
    reason: str
    rule: tuple[str, int] | None
    function: tuple[str, str, int] | None


@dataclass
class Naive:
    """The policy of some files, for one process, read as a person would."""

    files: Sequence[tuple[str, str]]
    """Names and texts, in order."""
    facts: Facts
    override: tuple[str, ...] | None = None
    require: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name, text in self.files:
            data = tomllib.loads(text)
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.startswith("[[")]
            places = iter([(name, n) for n, line in lines if line.endswith("rule]]")])
            # Rules of sections stand below their section, and global ones at the end of the text.
            for section in data.get("process", []):
                for rule in section.get("rule", []):
                    rule["place"] = next(places)
                holds = [self.holds(key, section[key]) for key in section if key in self.PREDICATES]
                if all(holds):
                    self.sections.append(section)
            for rule in data.get("rule", []):
                rule["place"] = next(places)
                self.rules.append(rule)
            self.defaults.update(data.get("defaults", {}))

    PREDICATES = ("exe", "name", "arg", "user", "cgroup", "env")

    def holds(self, key: str, wanted: Any) -> bool:
        result = self.predicate(key, wanted)
        self.seen[f"{key} {result}"] += 1
        return result

    def predicate(self, key: str, wanted: Any) -> bool:
        facts = self.facts
        if key == "exe":
            return glob(wanted, facts.exe if "/" in wanted else facts.exe.split(b"/")[-1])
        if key == "name":
            return glob(wanted, facts.name)
        if key == "user":
            number = int(wanted) if str(wanted).isdigit() else pwd.getpwnam(wanted).pw_uid
            return facts.user == number
        if key == "cgroup":
            return any(glob(wanted, path) for path in facts.cgroups)
        every = [wanted] if isinstance(wanted, str) else wanted
        if key == "arg":
            return all(any(glob(pattern, word) for word in facts.arguments[1:]) for pattern in every)
        environment: dict[bytes, bytes] = {}
        for variable in facts.environment:
            name, _, value = variable.partition(b"=")
            environment.setdefault(name, value)
        for pattern in every:
            name, given, wanted_value = pattern.partition("=")
            value = environment.get(name.encode())
            if value is None or (given and not glob(wanted_value, value)):
                return False
        return True

    def first(self, key: str, built_in: Any) -> Any:
        """What the process has: of its first section that says so, else of [defaults]."""
        for section in self.sections:
            if key in section:
                return section[key]
        return self.defaults.get(key, built_in)

    @property
    def engine(self) -> str:
        return self.first("engine", "embedded")

    def providers(self, *scopes: Any) -> tuple[str, ...]:
        if self.override == ("tcp",):
            return ()
        found = next(scope for scope in (*scopes, self.first("providers", "unix")) if scope is not None)
        return self.override or as_tuple(found)

    def otherwise(self, *scopes: str | None) -> str:
        if self.require:
            return "error"
        return next(scope for scope in (*scopes, self.first("otherwise", "tcp")) if scope is not None)

    def decide(self, role: str, local: tuple[Address, int], remote: tuple[Address, int] | None) -> Outcome:
        if remote is not None and int(local[0]) == 0:
            local = (type(remote[0])(0), local[1])
        of_sections = [(rule, section) for section in self.sections for rule in section.get("rule", [])]
        for rule, section in of_sections + [(rule, {}) for rule in self.rules]:
            if self.matches(rule, role, local, remote):
                return self.outcome(rule, section)
        providers = self.providers()
        if providers:
            return Outcome("san", self.otherwise(), providers, "", None, None)
        return Outcome("tcp", self.otherwise(), (), "POLICY_TCP", None, None)

    def matches(
        self, rule: dict[str, Any], role: str, local: tuple[Address, int], remote: tuple[Address, int] | None
    ) -> bool:
        wanted = rule.get("role", "connect" if "remote" in rule else "both")
        if wanted not in ("both", role):
            return False
        if "local" in rule and not any(contains(text, *local) for text in as_tuple(rule["local"])):
            return False
        if "remote" in rule:
            return remote is not None and any(contains(text, *remote) for text in as_tuple(rule["remote"]))
        return True

    def outcome(self, rule: dict[str, Any], section: dict[str, Any]) -> Outcome:
        place = rule["place"]
        use = as_tuple(rule["use"]) if "use" in rule else None
        if use == ("tcp",):
            # Said in so many words, it is allowed where everything else is strict.
            return Outcome("tcp", self.otherwise("tcp"), (), "POLICY_TCP", place, None)
        otherwise = self.otherwise(rule.get("otherwise"), section.get("otherwise"))
        if self.override == ("tcp",):
            return Outcome("tcp", otherwise, (), "POLICY_TCP", place, None)
        if use and use[0].startswith("python:"):
            if self.engine == "off":
                return Outcome("tcp", otherwise, (), "ENGINE_OFF", place, None)
            _, module, name = use[0].split(":")
            timeout = rule.get("timeout_ms", self.defaults.get("timeout_ms", 100))
            return Outcome("ask", otherwise, (), "", place, (module, name, timeout))
        return Outcome("san", otherwise, self.providers(use, section.get("providers")), "", place, None)


def as_tuple(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def glob(pattern: str, text: bytes) -> bool:
    parts = {b"*": b".*", b"?": b"."}
    pieces = re.findall(rb".", pattern.encode(), re.DOTALL)
    return re.fullmatch(b"".join(parts.get(piece, re.escape(piece)) for piece in pieces), text, re.DOTALL) is not None


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@cache
def pattern(text: str) -> tuple[Network | None, int, int]:
    """The network, None for every address, and the ports of "ADDRESS/PREFIX:PORTS"."""
    parts = re.fullmatch(r"(\[[^]]*\]|[^:/]*)(?:/(\d+))?(?::(.*))?", text)
    assert parts, text
    host, prefix, ports = parts.groups()
    first, _, last = ("0-65535" if ports in (None, "*") else ports).partition("-")
    if host in ("", "*"):
        return None, int(first), int(last or first)
    base = ipaddress.ip_address(host.strip("[]"))
    length = int(prefix) if prefix else base.max_prefixlen
    if isinstance(base, ipaddress.IPv6Address) and base.ipv4_mapped and length >= 96:
        return ipaddress.IPv4Network((base.ipv4_mapped, length - 96)), int(first), int(last or first)
    return ipaddress.ip_network((base, length)), int(first), int(last or first)


def contains(text: str, address: Address, port: int) -> bool:
    network, first, last = pattern(text)
    return first <= port <= last and (network is None or address in network)


def as_address(packed: bytes) -> Address:
    """The switch's 16 bytes."""
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address


# --- random cases -----------------------------------------------------------------------------------------------------


class Choose:
    """Where random numbers come from: hypothesis, which makes a failure small, or a seeded generator."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer
        """From first to last, both included; the first is the simplest."""

    def of(self, *values: Any) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def once_in(self, times: int) -> bool:
        return self.integer(1, times) == times

    def some(self, make: Callable[[], Any], most: int, again: int = 3) -> list[Any]:
        """A list that ends after each element with a chance of one in `again`."""
        found: list[Any] = []
        while len(found) < most and self.integer(0, again - 1):
            found.append(make())
        return found


def seeded(choose: Choose) -> Choose:
    """For what need not be small, at one number's cost."""
    return Choose(random.Random(choose.integer(0, 1 << 30)).randint)


V4 = ("127.0.0.1", "0.0.0.0", "127.0.0.2", "10.0.0.1", "10.1.2.3", "169.254.7.7", "255.255.255.255")
V6 = (
    "::1", "::", "fd00::1", "fd00:0:0:1::1", "fe80::1", "fe80::2:1", "2001:db8::ffff", "::fffe:7f00:1", "::7f00:1",
    "::1:0:0:1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
)  # fmt: skip
KNOWN = tuple(
    [table.V4_PREFIX + ipaddress.IPv4Address(text).packed for text in V4]
    + [ipaddress.IPv6Address(text).packed for text in V6]
)
PORTS = (80, 1, 2, 79, 81, 443, 6379, 8000, 8080, 32768, 65534, 65535)
WORDS = ("redis-server", "a", "ab", "aab", "b", "x/y", "nginx", "é", "a*b", "a[b]", "a\nb")
EXES = ("/usr/bin/redis-server", "/usr/sbin/nginx", "/a", "ab", "", "/opt/x/y", "/usr/bin/é")
VARIABLES = ("A=a", "A", "A=", "B=ab", "PATH=x/y", "PATHS=a", "B=redis-server", "a=A", "A==b", "É=é")
CGROUPS = ("/", "/user.slice", "/system.slice/nginx.service", "x/y")
USERS = (0, 65534, 1000, 4294967294)


def random_facts(choose: Choose) -> Facts:
    def word() -> bytes:
        return b"\xff\xfe" if choose.once_in(12) else choose.of(*WORDS).encode()

    return Facts(
        exe=choose.of(*EXES).encode(),
        name=word(),
        arguments=tuple(choose.some(word, 5, 5)),
        environment=tuple(choose.some(lambda: choose.of(*VARIABLES).encode(), 4)),
        cgroups=tuple(choose.some(lambda: choose.of(*CGROUPS).encode(), 3)),
        user=choose.of(*USERS),
    )


def random_glob(choose: Choose, subject: bytes) -> str:
    """Mostly one that has to do with the subject."""
    text = subject.decode(errors="replace").replace("\0", "")
    first, last = sorted((choose.integer(0, len(text)), choose.integer(0, len(text))))
    return (
        choose.of(
            text,
            text[:first] + "*" + text[last:],
            text[:first] + "?" + text[first + 1 :],
            "*" + text[first:last] + "*",
            "*" + text[first:last] + "*" + text[last:],
            text.rpartition("/")[2],
            choose.of("*", "**", "?", "a*", "*b", "*a*b*", "x/*", "*/y", "/usr/*/nginx", "none"),
        )
        or "*"
    )


def random_predicates(choose: Choose, facts: Facts) -> dict[str, Any]:
    def pick(values: tuple[bytes, ...], other: bytes) -> bytes:
        return choose.of(*values, other)

    def variable() -> str:
        name, _, value = pick(facts.environment, b"A=b").decode().partition("=")
        return name + choose.of("", "=" + random_glob(choose, value.encode()), "=")

    def argument() -> str:
        return random_glob(choose, pick(facts.arguments, b"x"))

    def several(make: Callable[[], str]) -> str | list[str]:
        return make() if choose.of(True, False) else [make(), *choose.some(make, 2)]

    user = facts.user if choose.of(True, False) else choose.of(*USERS)
    makers: dict[str, Callable[[], Any]] = {
        "exe": lambda: random_glob(choose, choose.of(facts.exe, facts.exe, choose.of(*EXES).encode())),
        "name": lambda: random_glob(choose, choose.of(facts.name, facts.name, choose.of(*WORDS).encode())),
        "arg": lambda: several(argument),
        "user": lambda: choose.of(user, str(user), {0: "root", 65534: "nobody"}.get(user, user)),
        "cgroup": lambda: random_glob(choose, pick(facts.cgroups, b"x")),
        "env": lambda: several(variable),
    }
    keys = {choose.of(*makers)}
    while choose.once_in(3):
        keys.add(choose.of(*makers))
    return {key: makers[key]() for key in makers if key in keys}


def random_pattern(choose: Choose) -> str:
    kind = choose.of("v4", "v4", "v6", "mapped", "*", "")
    host = kind
    if kind in ("v4", "v6", "mapped"):
        bits = 32 if kind == "v4" else 128
        number = int(ipaddress.ip_address(choose.of(*(V6 if kind == "v6" else V4))))
        if kind == "mapped":
            number |= 0xFFFF00000000
        length = bits
        if choose.of(True, False):
            length = (
                choose.integer(0, bits)
                if choose.of(True, False)
                else choose.of(bits - 1, 96, 8, 65, 64, 63, 0) % (bits + 1)
            )
            number = number >> (bits - length) << (bits - length)
        address = (ipaddress.IPv4Address if kind == "v4" else ipaddress.IPv6Address)(number)
        text = choose.of(str(address), address.exploded)
        if kind == "mapped" and number >> 32 == 0xFFFF and choose.of(True, False):
            text = f"::ffff:{ipaddress.IPv4Address(number & 0xFFFFFFFF)}"
        host = text if kind == "v4" else f"[{text}]"
        if length < bits or choose.once_in(4):
            host += f"/{length}"
    first, last = sorted((choose.of(*PORTS), choose.of(*PORTS)))
    ports = choose.of("", f":{first}", f":{first}-{last}", f":{first}-{last}", ":*", f":{first}-{first}")
    return host + (ports or ":*" if not host else ports)


def random_patterns(choose: Choose) -> str | list[str]:
    first = random_pattern(choose)
    return first if choose.of(True, False) else [first, *choose.some(lambda: random_pattern(choose), 3)]


def random_providers(choose: Choose) -> str | list[str]:
    names = list(MORE_PROVIDERS)
    found = [names.pop(choose.integer(0, len(names) - 1))]
    while len(found) < table.PROVIDERS_MAX and choose.once_in(2):
        found.append(names.pop(choose.integer(0, len(names) - 1)))
    return found[0] if len(found) == 1 and choose.of(True, False) else found


def random_rule(choose: Choose) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    role = choose.of(None, "connect", "listen", "both")
    if role:
        rule["role"] = role
    if choose.of(True, False):
        rule["local"] = random_patterns(choose)
    if role in (None, "connect") and not choose.once_in(4):
        rule["remote"] = random_patterns(choose)
    use = choose.of("tcp", None, None, "providers", "function")
    if use == "tcp":
        rule["use"] = choose.of("tcp", ["tcp"])
    elif use == "providers":
        rule["use"] = random_providers(choose)
    elif use == "function":
        rule["use"] = "python:site_policy:" + choose.of("f", "g")
        if choose.once_in(3):
            rule["timeout_ms"] = choose.of(50, 100, 10000)
    if use != "tcp" and choose.once_in(3):
        rule["otherwise"] = choose.of("tcp", "error")
    return rule


def random_scope(choose: Choose) -> dict[str, Any]:
    """What a section and [defaults] have in common."""
    scope: dict[str, Any] = {}
    if choose.once_in(2):
        scope["providers"] = random_providers(choose)
    if choose.once_in(3):
        scope["otherwise"] = choose.of("tcp", "error")
    if choose.once_in(4):
        scope["engine"] = choose.of("reactive", "off", "helper", "embedded", "startup", "reactive", "off", "helper")
    return scope


def as_toml(header: str, values: dict[str, Any]) -> str:
    def value(given: Any) -> str:
        if isinstance(given, list):
            return "[" + ", ".join(value(one) for one in given) + "]"
        if isinstance(given, int):
            return str(given)
        return '"' + given.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    return f"{header}\n" + "".join(f"{key} = {value(given)}\n" for key, given in values.items())


def random_text(choose: Choose, facts: Facts) -> str:
    parts = ["version = 1\n"]
    defaults = random_scope(choose)
    if choose.once_in(4):
        defaults["timeout_ms"] = choose.of(20, 100, 5000)
    if defaults:
        parts.append(as_toml("[defaults]", defaults))
    if choose.once_in(3):
        parts.append("# [[rule]] is what follows\n\n")

    def section() -> str:
        scope = random_predicates(choose, facts) | random_scope(choose)
        rules = [as_toml("[[process.rule]]", rule) for rule in choose.some(lambda: random_rule(choose), 8)]
        return as_toml("[[process]]", scope) + "".join(rules)

    parts += choose.some(section, 5)
    rules = choose.some(lambda: random_rule(choose), 12, 6)
    bulk = choose.of(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 30, 300)
    if bulk:
        quick = seeded(choose)
        rules += [random_rule(quick) for _ in range(bulk)]
    return "".join([*parts, *(as_toml("[[rule]]", rule) for rule in rules)])


class Case(NamedTuple):
    texts: tuple[str, ...]
    facts: Facts
    override: tuple[str, ...] | None
    require: bool
    requests: tuple[tuple[Request, tuple[int, int]], ...]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(pretty(self))


def pretty(case: Case) -> str:
    facts = {name: getattr(case.facts, name) for name in Facts.__slots__}
    requests = [(role, str(as_address(a)), p, str(as_address(b)), q) for (role, _, a, p, b, q), _ in case.requests]
    options = f"{facts}, override={case.override}, require={case.require}, {requests}"
    return "--- next file\n".join(case.texts) + f"--- {options}"


def interesting(texts: Sequence[str]) -> tuple[list[bytes], list[int]]:
    """Addresses and ports inside and just outside of the rules of a policy."""
    lines = [line for text in texts for line in text.split("\n") if line.startswith(("local = ", "remote = "))]
    addresses, ports = [], []
    for word in (word for line in lines for word in re.findall(r'"([^"]*)"', line)):
        network, first, last = pattern(word)
        ports += [port for port in (first - 1, first, first + 1, last - 1, last, last + 1) if 0 < port < 65536]
        if network is not None:
            begin = int(network.network_address)
            after, size = begin + network.num_addresses, 1 << network.max_prefixlen
            for number in {begin - 1, begin, after - 1, after, begin + network.num_addresses // 2}:
                packed = (number % size).to_bytes(network.max_prefixlen // 8, "big")
                addresses.append(packed if len(packed) == 16 else table.V4_PREFIX + packed)
    return addresses, ports


def random_request(choose: Choose, addresses: list[bytes], ports: list[int]) -> tuple[Request, tuple[int, int]]:
    def address() -> bytes:
        packed = choose.of(*(addresses if addresses and not choose.once_in(4) else KNOWN))
        if choose.once_in(5):
            packed = (int.from_bytes(packed, "big") ^ 1 << choose.integer(0, 127)).to_bytes(16, "big")
        return packed

    def port() -> int:
        return choose.of(*(ports if ports and not choose.once_in(4) else PORTS))

    role = choose.of(table.ROLE_CONNECT, table.ROLE_LISTEN)
    remote, remote_port = (address(), port()) if role == table.ROLE_CONNECT else (bytes(16), 0)
    local, local_port = address(), port()
    # A socket that is bound to one family cannot connect to the other.
    if choose.once_in(3) or (remote_port and type(as_address(local)) is not type(as_address(remote))):
        local, local_port = choose.of(bytes(16), table.WILDCARD_V4), choose.of(0, local_port)
    scopes = tuple(choose.of(0, 1, 2) if packed.startswith(b"\xfe\x80") else 0 for packed in (local, remote))
    family = choose.of(2, 10)
    return (role, family, local, local_port, remote, remote_port), scopes  # type: ignore[return-value]


def random_case(choose: Choose) -> Case:
    facts = random_facts(choose)
    texts = (random_text(choose, facts),)
    if choose.once_in(3):
        texts += (random_text(choose, facts),)
    override = choose.of(None, None, None, None, ("tcp",), ("beta",), ("gamma", "unix"))
    near = interesting(texts)
    requests = [random_request(seeded(choose), *near) for _ in range(REQUESTS)]
    return Case(texts, facts, override, choose.once_in(6), tuple(requests))


integers = cache(st.integers)


@st.composite
def cases(draw: Any) -> Case:
    return random_case(Choose(lambda first, last: draw(integers(first, last))))


# --- the comparison ---------------------------------------------------------------------------------------------------

ACTIONS = {table.ACTION_TCP: "tcp", table.ACTION_SAN: "san", table.ACTION_ASK: "ask"}
OTHERWISE = {table.OTHERWISE_TCP: "tcp", table.OTHERWISE_ERROR: "error"}
ENGINES = {
    table.ENGINE_EMBEDDED: "embedded",
    table.ENGINE_STARTUP: "startup",
    table.ENGINE_HELPER: "helper",
    table.ENGINE_REACTIVE: "reactive",
    table.ENGINE_OFF: "off",
}
PROVIDER_NAMES = {number: name for name, number in MORE_PROVIDERS.items()}


class Comparison:
    """Judges cases, and counts what they were about."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.counts: Counter[str] = Counter()
        (folder / "site_policy.py").write_text(FUNCTIONS)
        # The stub answers what is never remembered, and leaves `otherwise` open.
        assert host.ask(f"answer 1 0 0 {reasons.STARTING} {table.RULE_DEFAULT}") == "ok"

    def judge(self, case: Case) -> None:
        files = []
        for number, text in enumerate(case.texts):
            path = self.folder / f"policy{number}.toml"
            path.write_text(text)
            files.append((str(path), text))
        policy, problems, _ = read_policy([path for path, _ in files])
        assert not problems, [str(problem) for problem in problems]
        unreachable = set()
        if len(policy.all_rules()) < 40:
            errors, _ = check_policy(policy)
            unreachable = {(error.file, error.line) for error in errors}
            assert all("can never match" in error.message for error in errors)
        data = table_of(policy, providers_override=case.override, require=case.require)
        compiled = Table(data)
        naive = Naive(files, case.facts, case.override, case.require)
        engine = Engine(compiled, case.facts)
        path = put(self.folder / "table", data)
        commands = [decide_command(*request) for request in case.requests]
        answers = self.host.tell(facts_command(case.facts), f"load {path}", "starve 1", *commands, "starve 0")
        assert answers[:2] == ["ok", "0"], answers
        scanned = answers[3:-1]
        *indexed, state = self.host.tell(*commands, "state")
        assert ENGINES[int(state.split()[1])] == ENGINES[engine.engine] == naive.engine
        assert scanned == indexed, "with memory for an index and without"
        for (request, _), answer in zip(case.requests, indexed, strict=True):
            role = "listen" if request[0] == table.ROLE_LISTEN else "connect"
            local, remote = (as_address(request[2]), request[3]), (as_address(request[4]), request[5])
            wanted = naive.decide(role, local, remote if role == "connect" else None)
            assert named(engine.decide(*request), compiled) == wanted, ("Python", request, local, remote)
            assert wanted.rule not in unreachable, ("a rule that can never match", wanted)
            self.counts[wanted.action] += 1
            self.counts["by a rule" if wanted.rule else "by default"] += 1
            if naive.engine == "reactive":
                asked = f"asked {request[0]} {table.FUNCTION_NONE} {table.RULE_DEFAULT}"
                assert answer.endswith(asked), ("C", request, answer)
                continue
            assert in_c(answer, request[0], compiled) == wanted, ("C", request, local, remote, answer)
        self.counts["requests"] += len(case.requests)
        self.counts["unreachable rules"] += len(unreachable)
        self.counts[f"engine {naive.engine}"] += 1
        self.counts["several sections"] += len(naive.sections) > 1
        self.counts += naive.seen


def named(verdict: tuple[int, int, tuple[int, ...], int, int, int], compiled: Table) -> Outcome:
    """A verdict with names in place of numbers."""
    action, otherwise, providers, reason, rule, function = verdict
    place = asked = None
    if rule != table.RULE_DEFAULT:
        place = (compiled.rules[rule].file, compiled.rules[rule].line)
    if action == table.ACTION_ASK:
        found = compiled.functions[function]
        asked = (found.module, found.name, found.timeout_ms)
    names = tuple(PROVIDER_NAMES[number] for number in providers)
    symbol = reasons.BY_NUMBER[reason].symbol if reason else ""
    return Outcome(ACTIONS[action], OTHERWISE[otherwise], names, symbol, place, asked)


def in_c(answer: str, role: int, compiled: Table) -> Outcome:
    """What flows_host printed; a question to the engine counts as the verdict "ask"."""
    words = answer.split()
    action, otherwise, reason, rule, function = (int(words[i]) for i in (0, 1, 3, 4, 5))
    providers = tuple(int(number) for number in words[2].split(",") if number != "0")
    if words[6:7] == ["asked"]:
        assert (action, providers, reason) == (table.ACTION_TCP, (), reasons.STARTING)
        assert (int(words[7]), int(words[9])) == (role, rule)
        action, reason, function = table.ACTION_ASK, 0, int(words[8])
    return named((action, otherwise, providers, reason, rule, function), compiled)


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparison]:
    for name, number in MORE_PROVIDERS.items():
        monkeypatch.setitem(NAMES, name, number)
    for name in set(NAMES) - set(MORE_PROVIDERS):
        monkeypatch.delitem(NAMES, name)
    with running(build()) as host:
        yield Comparison(host, tmp_path)


def of_seed(seed: int) -> Case:
    return random_case(Choose(random.Random(seed).randint))


def smaller(comparison: Comparison, case: Case) -> Case:
    """What is left of a case that fails when every section and rule is gone that it does not need."""

    def fails(candidate: Case) -> bool:
        try:
            comparison.judge(candidate)
        except AssertionError:
            return True
        return False

    for request in case.requests:
        if fails(case._replace(requests=(request,))):
            case = case._replace(requests=(request,))
            break
    for number, text in enumerate(case.texts):
        blocks = re.split(r"(?m)^(?=\[)", text)
        for block in blocks[:]:
            without = [other for other in blocks if other is not block]
            candidate = (*case.texts[:number], "".join(without), *case.texts[number + 1 :])
            if block in blocks[1:] and fails(case._replace(texts=candidate)):
                blocks, case = without, case._replace(texts=candidate)
    return case


def judge_seeds(comparison: Comparison, first: int, count: int) -> None:
    """Policies of every size: fast."""
    for seed in range(first, first + count):
        case = of_seed(seed)
        try:
            comparison.judge(case)
        except AssertionError as error:
            print(f"seed {seed}:\n{pretty(smaller(comparison, case))}")
            raise AssertionError(f"seed {seed}: {error}") from None


def judge_examples(comparison: Comparison, count: int) -> None:
    """Small ones, which hypothesis makes smaller still where they fail."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        comparison.judge(case)

    run()


def about_what_they_should_be(counts: Counter[str], policies: int) -> None:
    print(dict(sorted(counts.items())))
    assert counts["requests"] == policies * REQUESTS
    for what in ("tcp", "san", "ask", "by a rule", "by default", "several sections", "unreachable rules"):
        assert counts[what] > policies / 10, what
    for key in Naive.PREDICATES:
        assert min(counts[f"{key} True"], counts[f"{key} False"]) > policies / 50, key
    for engine in ENGINES.values():
        assert counts[f"engine {engine}"] > policies / 100, engine


def test_c_and_python_and_the_text_agree(comparison: Comparison) -> None:
    """P2, P3, P4: Compiled table and Python engine give the verdict that the policy's text says, process predicates
    included; a rule that the check calls unreachable never decides."""
    judge_seeds(comparison, 0, 180)
    judge_examples(comparison, 40)
    about_what_they_should_be(comparison.counts, 220)


@pytest.mark.long
def test_c_and_python_and_the_text_agree_100_000_times(comparison: Comparison) -> None:
    """P2, P3, P4: As above, on 100,000 requests."""
    judge_seeds(comparison, 1000, 2800)
    judge_examples(comparison, 600)
    about_what_they_should_be(comparison.counts, 3400)
