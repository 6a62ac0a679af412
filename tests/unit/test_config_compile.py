"""The model to the bytes of the table, and the decision of the Python engine on it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from interposer import config
from interposer.config import late_python
from interposer.config.model import Policy
from interposer.config.parse import ENGINES
from interposer.policy import reasons, table
from interposer.policy.engine import Engine, Facts, Table, glob_matches, section_applies

LAUNCHER: dict[str, Any] = {
    "libpython": "/usr/lib/libpython3.11.so.1.0",
    "python_home": "/usr",
    "search_path": ["/usr/lib/python3.11", "/opt"],
    "engine_module": "/opt/engine.so",
    "helper": "/run/helper",
    "key": "the key",
}
ZERO = bytes(16)


def compiled(folder: Path, body: str, **options: Any) -> Table:
    path = folder / "policy.toml"
    path.write_text("version = 1\n" + body)
    path.chmod(0o644)
    return Table(config.compile_policy(config.load(str(path), {}).policy, **LAUNCHER, **options))


def v4(text: str) -> bytes:
    return table.V4_PREFIX + bytes(int(part) for part in text.split("."))


def listen(engine: Engine, address: bytes, port: int) -> tuple[int, int, tuple[int, ...], int, int, int]:
    return engine.decide(table.ROLE_LISTEN, 2, address, port, ZERO, 0)


def connect(engine: Engine, address: bytes, port: int) -> tuple[int, int, tuple[int, ...], int, int, int]:
    return engine.decide(table.ROLE_CONNECT, 2, ZERO, 0, address, port)


def test_frame() -> None:
    """P1: Header, checksum, generation, and what the launcher says all arrive."""
    data = config.compile_policy(Policy(), **LAUNCHER)
    fields = table.HEADER.unpack_from(data)
    assert fields[:5] == (b"SANTABLE", 1, len(data), zlib.crc32(data[table.HEADER.size :]), 0)
    found = Table(data)
    assert (found.libpython, found.python_home, found.engine_module) == tuple(
        LAUNCHER[key] for key in ("libpython", "python_home", "engine_module")
    )
    assert (found.helper, found.key, found.search_path) == ("/run/helper", "the key", ("/usr/lib/python3.11", "/opt"))
    assert found.generation > 1_600_000_000_000_000_000
    assert table.key_of(data) == "the key"
    assert table.key_of(data[:-1]) == table.key_of(b"") == table.key_of(b"x" * 200) == ""
    assert len(found.sections) == 1
    with pytest.raises(table.TableError):
        Table(data[:-1])


def test_first_match_wins(tmp_path: Path) -> None:
    """P1, P3: Sections that apply come first, then the global rules, then the defaults."""
    found = compiled(
        tmp_path,
        '[[process]]\nexe = "redis-*"\n[[process.rule]]\nlocal = "*:6379"\nuse = "tcp"\n'
        '[[rule]]\nrole = "listen"\nlocal = ["127.0.0.1:6379", "10.0.0.0/8"]\notherwise = "error"\n',
    )
    redis, other = Engine(found, Facts(b"/usr/bin/redis-server")), Engine(found, Facts(b"/usr/bin/nginx"))
    assert listen(redis, v4("127.0.0.1"), 6379) == (1, 1, (), reasons.POLICY_TCP, 0, table.FUNCTION_NONE)
    assert listen(other, v4("127.0.0.1"), 6379) == (2, 2, (1,), 0, 1, table.FUNCTION_NONE)
    assert listen(other, v4("10.1.1.1"), 80)[4] == 2
    assert (found.rules[1].line, found.rules[2].line) == (7, 7)
    assert listen(other, v4("11.1.1.1"), 80) == (2, 1, (1,), 0, table.RULE_DEFAULT, table.FUNCTION_NONE)
    assert connect(other, v4("127.0.0.1"), 6379)[4] == table.RULE_DEFAULT


def test_sections_set_defaults(tmp_path: Path) -> None:
    """P3: Of engine and otherwise the first applying section that sets one wins; a rule's own section comes before."""
    found = compiled(
        tmp_path,
        '[[process]]\nname = "a"\nengine = "helper"\n'
        '[[process]]\nuser = 7\nengine = "off"\notherwise = "error"\n'
        '[[process]]\nname = "*"\notherwise = "tcp"\n[[process.rule]]\nlocal = ":1"\n',
    )
    both = Engine(found, Facts(name=b"a", user=7))
    assert (both.engine, both.otherwise) == (table.ENGINE_HELPER, table.OTHERWISE_ERROR)
    assert listen(both, v4("127.0.0.1"), 1)[:2] == (2, table.OTHERWISE_TCP)
    assert listen(both, v4("127.0.0.1"), 2)[:2] == (2, table.OTHERWISE_ERROR)
    assert Engine(found, Facts(name=b"b")).engine == table.ENGINE_EMBEDDED


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", table.FIREWALL_HEED),
        ("[defaults]\nignore_firewall = true\n", table.FIREWALL_IGNORE),
        ("[defaults]\nignore_firewall = false\n", table.FIREWALL_HEED),
        ('[[process]]\nname = "a"\nignore_firewall = true\n', table.FIREWALL_IGNORE),
        ('[defaults]\nignore_firewall = true\n[[process]]\nname = "a"\nignore_firewall = false\n', table.FIREWALL_HEED),
        ('[[process]]\nname = "b"\nignore_firewall = true\n', table.FIREWALL_HEED),
    ],
)
def test_packet_filters(tmp_path: Path, body: str, expected: int) -> None:
    """X9, P3: The first applying section that says so decides whether packet filters are heeded; else [defaults] do."""
    sections = compiled(tmp_path, body).sections
    assert next(s.firewall for s in sections if s.firewall and section_applies(s, Facts(name=b"a"))) == expected


def test_unbound_source_has_the_family_of_the_destination(tmp_path: Path) -> None:
    """P1: `local = "0.0.0.0/0"` on a connect means IPv4, bound or not."""
    found = compiled(tmp_path, '[[rule]]\nrole = "connect"\nlocal = "0.0.0.0/0"\nuse = "tcp"\n')
    engine = Engine(found, Facts())
    one = ZERO[:15] + b"\1"
    assert connect(engine, v4("10.0.0.1"), 80)[0] == table.ACTION_TCP
    assert connect(engine, one, 80)[0] == table.ACTION_SAN
    assert engine.decide(table.ROLE_CONNECT, 10, v4("0.0.0.0"), 0, one, 80)[0] == table.ACTION_SAN


def test_families(tmp_path: Path) -> None:
    """P4: 0.0.0.0/0 is IPv4 only, [::]/0 is IPv6 only, * is both."""
    found = compiled(tmp_path, '[[rule]]\nlocal = "0.0.0.0/0"\n[[rule]]\nlocal = "[::]/0"\n')
    engine = Engine(found, Facts())
    assert [listen(engine, ip, 1)[4] for ip in (v4("0.0.0.0"), v4("1.2.3.4"), ZERO, b"\xff" * 16)] == [0, 0, 1, 1]


def test_addresses_said_twice_are_written_once(tmp_path: Path) -> None:
    """P1: A list makes one table rule for each address, and for each pair of local and remote of one family."""
    assert len(compiled(tmp_path, '[[rule]]\nlocal = ["10.0.0.1", "10.0.0.2", "[::ffff:10.0.0.1]"]\n').rules) == 2
    body = '[[rule]]\nlocal = ["10.0.0.1", "[::1]"]\nremote = ["10.0.0.0/8", "[::1]", "*:80"]\n'
    assert len(compiled(tmp_path, body).rules) == 4


def test_functions_are_written_once(tmp_path: Path) -> None:
    """P5: A rule asks its function; the module's directory is on the engine's path, after Python's own."""
    (tmp_path / "site_policy.py").write_text("def decide(request): ...\n")
    use = 'use = "python:site_policy:decide"\n'
    body = f'[[rule]]\nlocal = ":1"\n{use}[[rule]]\nlocal = ":2"\n{use}[[rule]]\nlocal = ":3"\ntimeout_ms = 7\n{use}'
    found = compiled(tmp_path, body)
    assert [(f.module, f.name, f.timeout_ms) for f in found.functions] == [
        ("site_policy", "decide", 100), ("site_policy", "decide", 7),
    ]  # fmt: skip
    assert found.search_path == ("/usr/lib/python3.11", "/opt", str(tmp_path))
    engine = Engine(found, Facts())
    assert [listen(engine, ZERO, port)[0::5] for port in (1, 2, 3)] == [(3, 0), (3, 0), (3, 1)]
    off = Engine(compiled(tmp_path, '[defaults]\nengine = "off"\n' + body), Facts())
    assert listen(off, ZERO, 1) == (1, 1, (), reasons.ENGINE_OFF, 0, table.FUNCTION_NONE)


def test_require(tmp_path: Path) -> None:
    """X7: --require makes every verdict strict; otherwise = "error" leaves rules that say TCP alone."""
    body = (
        '[[process]]\nexe = "*"\notherwise = "tcp"\n[[rule]]\nlocal = ":1"\nuse = "tcp"\n[[rule]]\notherwise = "tcp"\n'
    )
    strict = Engine(compiled(tmp_path, body, require=True), Facts())
    assert [listen(strict, ZERO, port)[:2] for port in (1, 2)] == [(1, 2), (2, 2)]
    assert strict.otherwise == table.OTHERWISE_ERROR
    body = '[defaults]\notherwise = "error"\n[[rule]]\nlocal = ":1"\nuse = "tcp"\n'
    plain = Engine(compiled(tmp_path, body), Facts())
    assert [listen(plain, ZERO, port)[:2] for port in (1, 2)] == [(1, 1), (2, 2)]


def test_provider_option(tmp_path: Path) -> None:
    """P4: --provider takes the place of the policy's lists; "tcp" makes everything TCP; nonsense is an error."""
    body = '[[rule]]\nlocal = ":1"\nuse = "tcp"\n[[rule]]\nlocal = ":2"\nuse = "unix"\n'
    engine = Engine(compiled(tmp_path, body, providers_override=["unix"]), Facts())
    assert [listen(engine, ZERO, port)[0] for port in (1, 2, 3)] == [1, 2, 2]
    engine = Engine(compiled(tmp_path, body, providers_override=["tcp"]), Facts())
    assert {listen(engine, ZERO, port)[0] for port in (1, 2, 3)} == {table.ACTION_TCP}
    for names, hint in ((["unxi"], 'did you mean "unix"?'), ([], "no provider"), (["unix", "unix"], "twice")):
        with pytest.raises(config.PolicyError) as caught:
            compiled(tmp_path, body, providers_override=names)
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (b"*", b"", True), (b"?", b"", False), (b"a*c", b"abbbc", True), (b"a*c", b"ac", True), (b"a*c", b"ab", False),
        (b"redis-*", b"redis-server", True), (b"*a*b", b"xaybzab", True), (b"[a]", b"a", False), (b"[a]", b"[a]", True),
        (b"", b"", True), (b"", b"x", False), (b"**", b"x", True), (b"*?", b"", False), (b"*/x", b"/a/b/x", True),
    ],
)  # fmt: skip
def test_glob(pattern: bytes, text: bytes, matches: bool) -> None:
    """P3: * is any bytes, ? is one, and nothing else is special."""
    assert glob_matches(pattern, text) is matches


def engine_of(found: Table, exe: str, **facts: Any) -> int:
    return Engine(found, Facts(exe=exe.encode(), **facts)).engine


RULE = '[[rule]]\nrole = "connect"\nuse = "python:site_policy:decide"\n'


def test_programs_that_may_load_python_later(tmp_path: Path) -> None:
    """P8: they use the helper without being told, by the name of the executable; all others embed."""
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    found = compiled(tmp_path, RULE)
    for exe in ("/usr/lib/postgresql/15/bin/postgres", "/usr/bin/vim.nox", "/usr/bin/uwsgi-core", "/usr/sbin/apache2"):
        assert engine_of(found, exe) == table.ENGINE_HELPER, exe
    for exe in ("/usr/bin/nvim", "/usr/sbin/nginx", "/usr/bin/postgresql", "/usr/bin/postgres/server", ""):
        assert engine_of(found, exe) == table.ENGINE_EMBEDDED, exe
    assert len(found.sections) == 1 + len(late_python.PROGRAMS)
    assert {section.engine for section in found.sections[:-1]} == {table.ENGINE_HELPER}
    assert all(any(character.isalpha() for character in what) for what in late_python.PROGRAMS.values())


@pytest.mark.parametrize(
    "body, expected",
    [
        ('[[process]]\nexe = "postgres"\nengine = "embedded"\n', "embedded"),
        ('[[process]]\nenv = "MINE=1"\nengine = "reactive"\n', "reactive"),
        ('[[process]]\nexe = "postgres"\notherwise = "error"\n', "helper"),
        ('[[process]]\nexe = "vim"\nengine = "embedded"\n', "helper"),
        ('[defaults]\nengine = "embedded"\n', "helper"),
        ('[defaults]\nengine = "startup"\n', "helper"),
        ('[defaults]\nengine = "reactive"\n', "helper"),
        ('[defaults]\nengine = "off"\n', "off"),
        ('[defaults]\nengine = "helper"\n', "helper"),
    ],
)
def test_own_section_overrides_the_built_in_list(tmp_path: Path, body: str, expected: str) -> None:
    """P8: [defaults] is about programs in general and switches only off; a section that applies decides."""
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    found = compiled(tmp_path, body + RULE)
    assert engine_of(found, "/usr/bin/postgres", environment=(b"MINE=1",)) == ENGINES[expected]


def test_built_in_list_costs_nothing_where_python_never_runs(tmp_path: Path) -> None:
    """P1, P8: tables without functions hold the user's sections alone."""
    for body in ("", '[[rule]]\nrole = "connect"\nuse = "tcp"\n', '[defaults]\nengine = "off"\n'):
        assert len(compiled(tmp_path, body).sections) == 1
    assert len(compiled(tmp_path, '[defaults]\nengine = "reactive"\n').sections) > 1
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    assert len(compiled(tmp_path, RULE, providers_override=["tcp"]).sections) == 1
