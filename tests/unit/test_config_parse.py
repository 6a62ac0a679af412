# ruff: noqa: E501
"""Policy files to the model: what is understood, and what every mistake is answered with."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from interposer import config
from interposer.config.addresses import BadPattern, parse_pattern
from interposer.config.model import LoadedPolicy, Policy
from interposer.config.toml_lines import lines_of
from interposer.policy import table

EXAMPLE = """\
version = 1

[defaults]
providers = ["unix"]
otherwise = "error"
engine = "reactive"
timeout_ms = 250

[[process]]
exe = "redis-*"
name = "redis-server"
arg = ["--port=*", "--save"]
user = "root"
cgroup = "/system.slice/*"
env = "REDIS=*"
engine = "off"
otherwise = "tcp"
  [[process.rule]]
  role = "listen"
  local = "127.0.0.1:6379"
  use = ["unix"]

[[process]]
user = 1000
  [[process.rule]]
  role = "both"
  use = "unix"

[[rule]]
role = "connect"
remote = ["10.0.0.0/8:5432", "[fd00::]/8:80-90"]
use = "tcp"

[[rule]]
role = "listen"
local = "*:8080"
use = "python:site_policy:decide"
timeout_ms = 20
"""


def load(folder: Path, text: str, name: str = "policy.toml") -> LoadedPolicy:
    path = folder / name
    path.write_text(text)
    path.chmod(0o644)
    return config.load(str(path), {})


def problems(folder: Path, text: str) -> list[str]:
    """Each problem as "LINE: message; hint"."""
    path = folder / "policy.toml"
    with pytest.raises(config.PolicyError) as caught:
        load(folder, text)
    for problem in caught.value.problems:
        assert problem.file and problem.message and problem.hint, problem
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def only(folder: Path, text: str) -> str:
    found = problems(folder, text)
    assert len(found) == 1, found
    return found[0]


def test_example(tmp_path: Path) -> None:
    """P3, P4, P5: Every key of a policy arrives in the model, with its line."""
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    loaded = load(tmp_path, EXAMPLE)
    policy = loaded.policy
    assert loaded.warnings == ()
    assert loaded.files == (str(tmp_path / "policy.toml"),)
    assert loaded.modules == (str(tmp_path / "site_policy.py"),)
    assert (policy.providers, policy.otherwise, policy.engine) == (("unix",), 2, table.ENGINE_REACTIVE)
    redis, user = policy.sections
    assert [(p.kind, p.text, p.number) for p in redis.predicates] == [
        (1, "redis-*", 0), (2, "redis-server", 0), (3, "--port=*", 0), (3, "--save", 0), (4, "", 0),
        (5, "/system.slice/*", 0), (6, "REDIS=*", 0),
    ]  # fmt: skip
    assert (redis.engine, redis.otherwise, redis.providers) == (table.ENGINE_OFF, 1, ())
    assert [(p.kind, p.number) for p in user.predicates] == [(4, 1000)]
    (listen,) = redis.rules
    assert (listen.role, listen.action, listen.providers, listen.place.line) == (1, table.ACTION_SAN, ("unix",), 18)
    assert user.rules[0].role == 3
    postgres, asked = policy.rules
    assert (postgres.role, postgres.action, len(postgres.remote)) == (2, table.ACTION_TCP, 2)
    assert (asked.role, asked.action) == (1, table.ACTION_ASK)
    assert asked.function is not None
    assert (asked.function.module, asked.function.name, asked.function.timeout_ms) == ("site_policy", "decide", 20)


def test_role_when_none_is_given(tmp_path: Path) -> None:
    """P4: A rule without a role is of both, or of connect where it has a remote address."""
    loaded = load(tmp_path, HEAD + '[[rule]]\nremote = "10.0.0.1"\n[[rule]]\nlocal = "*:80"\nuse = "unix"\n')
    assert [rule.role for rule in loaded.policy.rules] == [2, 3]


def test_no_file_is_the_built_in_default() -> None:
    """P4: Without a file: unix, else TCP."""
    loaded = config.load_files([])
    assert loaded.policy == Policy()
    assert (loaded.policy.providers, loaded.policy.otherwise, loaded.files) == (("unix",), 1, ())


def test_files_are_merged(tmp_path: Path) -> None:
    """P4: Rules of drop-ins follow those of the file; their defaults take the place of its own, key by key."""
    drop_ins = tmp_path / "policy.d"
    drop_ins.mkdir()
    (drop_ins / "1.toml").write_text('version = 1\n[defaults]\notherwise = "error"\n[[rule]]\nlocal = ":2"\n')
    (drop_ins / "1.toml").chmod(0o644)
    loaded = load(tmp_path, 'version = 1\n[defaults]\notherwise = "tcp"\nengine = "off"\n[[rule]]\nlocal = ":1"\n')
    assert [(Path(rule.place.file).name, rule.place.line) for rule in loaded.policy.rules] == [
        ("policy.toml", 5), ("1.toml", 4),
    ]  # fmt: skip
    assert (loaded.policy.otherwise, loaded.policy.engine) == (table.OTHERWISE_ERROR, table.ENGINE_OFF)


HEAD = "version = 1\n"
MISTAKES = [
    ("versoin = 1\n", '1: unknown key "versoin" in the file, expected "version", "defaults", "process" or "rule"; did '
     'you mean "version"?'),
    ("", "1: no version; begin the file with version = 1"),
    ("version = 2\n", "1: version = 2, expected 1; write version = 1"),
    ('version = "1"\n', "1: version = \"1\", expected 1; write version = 1"),
    ("version = true\n", "1: version = true, expected 1; write version = 1"),
    (HEAD + "\n[defaults\n", "3: not TOML: Expected ']' at the end of a table declaration; correct the line"),
    (HEAD + 'x = "', "2: not TOML: "),
    (HEAD + "[defaults]\nengine = \"off\"\n[defaults]\n", "4: not TOML: Cannot declare ('defaults',) twice"),
    (HEAD + "[[rule]]\nlokal = \"*\"\n", '3: unknown key "lokal" in [[rule]], expected "role", "local", "remote", "use", '
     '"otherwise" or "timeout_ms"; did you mean "local"?'),
    (HEAD + '[[process]]\nexec = "x"\n', '3: unknown key "exec" in [[process]]'),
    (HEAD + "[defaults]\nxyzzy = 1\n", '3: unknown key "xyzzy" in [defaults], expected "providers", "otherwise", "engine", '
     '"ignore_firewall", "timeout_ms" or "python_path"; remove it'),
    (HEAD + "[[process]]\nexe = \"x\"\n[[process.rule]]\nfoo.bar = 1\n", '5: unknown key "foo" in [[process.rule]]'),
    (HEAD + "defaults = 3\n", "2: defaults is an integer, expected a table; write [defaults]"),
    (HEAD + "[rule]\nuse = \"tcp\"\n", "2: rule is a table, expected [[rule]] tables; write [[rule]]"),
    (HEAD + "[[rule]]\nrole = 3\n", '3: role is an integer, expected "listen", "connect" or "both"; write role = "listen"'),
    (HEAD + '[[rule]]\nrole = "lisen"\n', '3: role = "lisen", expected "listen", "connect" or "both"; did you mean "listen"?'),
    (HEAD + '[[rule]]\nrole = "server"\n', '3: role = "server", expected "listen", "connect" or "both"; '),
    (HEAD + '[[rule]]\nlocal = 80\n', '3: local is an integer, expected "ADDRESS"'),
    (HEAD + '[[rule]]\nlocal = [\n"127.0.0.1",\n80]\n', "5: local holds an integer"),
    (HEAD + '[[rule]]\nlocal = [\n"127.0.0.1",\n"10.0.0.256"]\n', '5: local: "10.0.0.256" is not an IPv4 address'),
    (HEAD + '[defaults]\nignore_firewall = "yes"\n',
     "3: ignore_firewall is a string, expected true or false; write ignore_firewall = true"),
    (HEAD + "[[rule]]\nlocal = []\n", "3: local is empty and matches nothing; name an address"),
    (HEAD + '[[rule]]\nlocal = "127.0.0.1:70000"\n', '3: local: "70000" is not a port; expected 1 to 65535'),
    (HEAD + '[[rule]]\nrole = "listen"\nremote = "10.0.0.1"\n', '4: remote on a rule with role = "listen": a listener has no '
     'remote address; write role = "connect", or local instead of remote'),
    (HEAD + '[[rule]]\nrole = "both"\nremote = "10.0.0.1"\n', '4: remote on a rule with role = "both"'),
    (HEAD + '[[rule]]\nuse = "unixx"\n', '3: unknown provider "unixx", expected "tcp", "unix", a list of providers, or '
     '"python:MODULE:FUNCTION"; did you mean "unix"?'),
    (HEAD + '[[rule]]\nuse = ["unix", "smc"]\n', '3: unknown provider "smc", expected "unix"; write "unix"'),
    (HEAD + '[[rule]]\nuse = ["unix", "unix"]\n', '3: provider "unix" is named twice; remove one'),
    (HEAD + '[[rule]]\nuse = ["unix", "tcp"]\n', '3: "tcp" is no SAN provider; '),
    (HEAD + "[[rule]]\nuse = []\n", "3: use is empty; "),
    (HEAD + "[[rule]]\nuse = 1\n", "3: use is an integer, expected "),
    (HEAD + '[[rule]]\nuse = "python:m"\n', '3: use: "python:m" does not name a function; write "python:MODULE:FUNCTION"'),
    (HEAD + '[[rule]]\nuse = "python:m:f()"\n', '3: use: "python:m:f()" does not name a function'),
    (HEAD + '[[rule]]\nuse = "pyton:m:f"\n', '3: use: "pyton:m:f" is none of "tcp", "unix", a list of providers, or '
     '"python:MODULE:FUNCTION"; did you mean "python:m:f"?'),
    (HEAD + '[[rule]]\nuse = ["unix", "python:m:f"]\n', '3: use: "python:m:f" is none of '),
    (HEAD + '[[rule]]\nuse = "tcp"\notherwise = "error"\n', '4: otherwise beside use = "tcp"'),
    (HEAD + '[[rule]]\nuse = "tcp"\ntimeout_ms = 5\n', "4: timeout_ms without a function to wait for; remove it"),
    (HEAD + '[[rule]]\notherwise = "eror"\n', '3: otherwise = "eror", expected "tcp" or "error"; did you mean "error"?'),
    (HEAD + '[defaults]\nengine = "embeded"\n', '3: engine = "embeded", expected "embedded", "startup", "helper", '
     '"reactive" or "off"; did you mean "embedded"?'),
    (HEAD + "[defaults]\nengine = false\n", "3: engine is true or false, expected "),
    (HEAD + "[defaults]\ntimeout_ms = 0\n", "3: timeout_ms = 0, expected 1 to 10000 milliseconds; write timeout_ms = 100"),
    (HEAD + "[defaults]\ntimeout_ms = true\n", "3: timeout_ms is true or false, expected 1 to 10000 milliseconds"),
    (HEAD + "[defaults]\ntimeout_ms = 1979-05-27\n", "3: timeout_ms is a date or time, expected "),
    (HEAD + "[defaults]\nproviders = []\n", '3: providers is empty; for TCP write a rule with use = "tcp"'),
    (HEAD + '[defaults]\nproviders = ["tcp"]\n', '3: "tcp" is no SAN provider; for TCP write a rule with use = "tcp"'),
    (HEAD + '[defaults]\npython_path = "lib"\n', '3: "lib" is not an absolute path; '),
    (HEAD + '[defaults]\npython_path = ["/nonexistent/x"]\n', '3: "/nonexistent/x" is no directory; '),
    (HEAD + "[[process]]\nengine = \"off\"\n", '2: [[process]] does not say which, expected "exe", "name", "arg", "user", '
     '"cgroup" or "env"; add one, or move its rules to [[rule]]'),
    (HEAD + '[[process]]\nengine = "off"\nexe = ["a", "b"]\n', '4: exe is a list, expected a pattern; write exe = "redis-*"'),
    (HEAD + '[[process]]\nengine = "off"\nexe = ""\n', '4: exe = "" can match nothing, expected a pattern; '),
    (HEAD + '[[process]]\nengine = "off"\nenv = "=x"\n', '4: env = "=x" can match nothing'),
    (HEAD + '[[process]]\nengine = "off"\nuser = "rot"\n', '4: unknown user "rot"; did you mean "root"?'),
    (HEAD + '[[process]]\nengine = "off"\nuser = -1\n', "4: user = -1 is no user id; expected 0 to "),
    (HEAD + '[[process]]\nengine = "off"\nuser = 1.5\n', "4: user is a number, expected a name or a user id; "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistake(tmp_path: Path, text: str, message: str) -> None:
    """P4: Each mistake is an error with its line, what was expected, the nearest word or what to do."""
    found = problems(tmp_path, text)
    assert found[0].startswith(message), found[0]
    assert len(found) == 1, found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """P4: One reading tells every mistake, in the order of the lines."""
    text = (
        HEAD
        + '[defaults]\nengin = 1\nproviders = ["unx", 7]\n[[rule]]\nrole = 1\nlocal = "x"\nuse = "y"\n[[rule]]\nz = 1\n'
    )
    found = problems(tmp_path, text)
    assert [int(problem.split(":")[0]) for problem in found] == [3, 4, 4, 6, 7, 8, 10]


def test_mistakes_of_all_files_are_told(tmp_path: Path) -> None:
    """P4: A drop-in's mistake is told with the drop-in's name, after those of the file."""
    drop_ins = tmp_path / "policy.d"
    drop_ins.mkdir()
    (drop_ins / "x.toml").write_text("version = 3\n")
    (drop_ins / "x.toml").chmod(0o644)
    found = problems(tmp_path, "version = 2\n")
    assert found[0].startswith("1: version = 2")
    assert found[1].startswith(f"{drop_ins / 'x.toml'}:1: version = 3")


def test_unreadable_files(tmp_path: Path) -> None:
    """P4, X3: Not UTF-8, and writable by everybody: errors that name the file."""
    path = tmp_path / "policy.toml"
    path.write_bytes(b"version = 1\n# \xff\n")
    path.chmod(0o644)
    with pytest.raises(config.PolicyError, match=r"policy\.toml:2: not UTF-8 text"):
        config.load(str(path), {})
    path.write_text("version = 1\n")
    path.chmod(0o666)
    with pytest.raises(config.PolicyError, match="everybody may write"):
        config.load(str(path), {})


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "[" * 5000 + "]" * 5000, "x = [" + "{a = " * 5000])
def test_deep_nesting(tmp_path: Path, text: str) -> None:
    """P4: A problem with the file's name, no traceback."""
    path = tmp_path / "policy.toml"
    path.write_text(HEAD + text)
    path.chmod(0o644)
    with pytest.raises(config.PolicyError, match=r"policy\.toml: nested too deeply"):
        config.load(str(path), {})


def test_user_names_and_numbers(tmp_path: Path) -> None:
    """P3: A user is a name of this machine, or a number."""
    entry = pwd.getpwuid(os.getuid())
    for written in (f'"{entry.pw_name}"', f'"{entry.pw_uid}"', str(entry.pw_uid)):
        loaded = load(tmp_path, HEAD + f'[[process]]\nuser = {written}\nengine = "off"\n')
        assert loaded.policy.sections[0].predicates[0].number == entry.pw_uid


def test_sections_that_do_nothing_are_warned_of(tmp_path: Path) -> None:
    """P4: A section without effect and a bracket in a pattern are warnings."""
    loaded = load(tmp_path, HEAD + '[[process]]\nexe = "a[bc]"\n')
    assert [str(warning).removeprefix(f"{tmp_path}/policy.toml:") for warning in loaded.warnings] == [
        "2: [[process]] changes nothing; add a [[process.rule]], engine, otherwise, providers or ignore_firewall",
        '3: exe = "a[bc]": only * and ? are special, [ and { stand for themselves; use ? for one character',
    ]


V4 = table.V4_PREFIX
PATTERNS = [
    ("*", (3, bytes(16), 0, (0, 65535))),
    ("*:80", (3, bytes(16), 0, (80, 80))),
    (":80", (3, bytes(16), 0, (80, 80))),
    ("*:*", (3, bytes(16), 0, (0, 65535))),
    ("*:8000-8999", (3, bytes(16), 0, (8000, 8999))),
    ("127.0.0.1:6379", (1, V4 + b"\x7f\0\0\1", 128, (6379, 6379))),
    ("127.0.0.1", (1, V4 + b"\x7f\0\0\1", 128, (0, 65535))),
    ("10.0.0.0/8:5432", (1, V4 + b"\x0a\0\0\0", 104, (5432, 5432))),
    ("0.0.0.0/0", (1, V4 + bytes(4), 96, (0, 65535))),
    ("0.0.0.0:80", (1, V4 + bytes(4), 128, (80, 80))),
    ("[::]/0", (2, bytes(16), 0, (0, 65535))),
    ("[::1]:80", (2, bytes(15) + b"\1", 128, (80, 80))),
    ("[fd00::]/8:1-2", (2, b"\xfd" + bytes(15), 8, (1, 2))),
    ("[::ffff:10.0.0.1]:80", (1, V4 + b"\x0a\0\0\1", 128, (80, 80))),
    ("[::ffff:10.0.0.0]/104", (1, V4 + b"\x0a\0\0\0", 104, (0, 65535))),
]


@pytest.mark.parametrize(("text", "wanted"), PATTERNS)
def test_pattern(text: str, wanted: tuple[object, ...]) -> None:
    """P4: Every form of an address; a v4-mapped one is IPv4."""
    found = parse_pattern(text)
    assert (found.families, found.address, found.prefix, found.ports) == wanted


BAD_PATTERNS = [
    ("localhost:80", 'write "127.0.0.1" or "[::1]"'),
    ("example.org", "names are not looked up"),
    ("::1", 'write "[::1]"'),
    ("::1:80", 'write "[::1:80]"'),
    ("fd00::/8", 'write "[fd00::]/8"'),
    ("[fd00::/8]", 'write "[fd00::]/8"'),
    ("[::1", 'write "[::1]:80"'),
    ("[::1]80", 'write "[::1]:80"'),
    ("[127.0.0.1]:80", "expected"),
    ("[fe80::1%eth0]:80", "write the address without %INTERFACE"),
    ("1:2:3", "expected"),
    ("10/8", 'write "10.0.0.0/8"'),
    ("10.1/16", 'write "10.1.0.0/16"'),
    ("10.0.0.1/8", 'write "10.0.0.0/8" for the network'),
    ("[fd00::1]/8", 'write "[fd00::]/8" for the network'),
    ("10.0.0.0/33", "expected 0 to 32"),
    ("10.0.0.0/", "expected 0 to 32"),
    ("10.0.0.0/-1", "expected 0 to 32"),
    ("[::]/129", "expected 0 to 128"),
    ("010.0.0.1", "expected"),
    ("80", 'write ":80"'),
    ("*:0", "expected 1 to 65535"),
    ("*:", "expected 1 to 65535"),
    ("*:65536", "expected 1 to 65535"),
    ("*:http", "expected 1 to 65535"),
    ("*:90-80", 'write "80-90"'),
    ("*:80-", "expected 1 to 65535"),
    ("*:٣", "expected 1 to 65535"),
    ("*/8", "expected"),
]


@pytest.mark.parametrize(("text", "hint"), BAD_PATTERNS)
def test_bad_pattern(text: str, hint: str) -> None:
    """P4: A bad address or port is refused with what to write instead."""
    with pytest.raises(BadPattern) as caught:
        parse_pattern(text)
    assert hint in caught.value.hint


def test_lines_of_toml() -> None:
    """P4: Keys, tables and elements have their lines, whatever TOML they are written in."""
    text = (
        '# comment with [[rule]] = "x"\r\n'
        "version = 1 # 2\n"
        'text = """a\n[not.a.table]\nkey = 1 \\""" still\n"""\n'
        "raw = '''\nx = 1''''\n"
        "[a . 'b c'.\"d\\u0041\"]\n"
        "list = [ # one\n  1, 'two]',\n  [3,\n 4], {x = 5, y.z = \"}\"},\n]\n"
        "when = 1979-05-27 07:32:00\n"
        "[[rule]]\nlocal = 1\n[[rule]]\nlocal = 2\n"
        "[[rule.sub]]\nk = 1\n[rule.plain]\nk = 2\n[[rule.sub]]\nk = 3\n"
    )
    lines = lines_of(text)
    numbered = text.replace("\r\n", "\n").split("\n")
    expected: dict[tuple[str | int, ...], str] = {
        ("version",): "version = 1 # 2",
        ("text",): 'text = """a',
        ("raw",): "raw = '''",
        ("a", "b c", "dA"): "[a . 'b c'.\"d\\u0041\"]",
        ("a", "b c", "dA", "list"): "list = [ # one",
        ("a", "b c", "dA", "list", 1): "  1, 'two]',",
        ("a", "b c", "dA", "list", 2, 1): ' 4], {x = 5, y.z = "}"},',
        ("a", "b c", "dA", "list", 3, "y", "z"): ' 4], {x = 5, y.z = "}"},',
        ("a", "b c", "dA", "when"): "when = 1979-05-27 07:32:00",
        ("rule", 1): "[[rule]]",
        ("rule", 1, "local"): "local = 2",
        ("rule", 1, "sub", 0, "k"): "k = 1",
        ("rule", 1, "plain"): "[rule.plain]",
        ("rule", 1, "plain", "k"): "k = 2",
        ("rule", 1, "sub", 1, "k"): "k = 3",
    }
    assert {path: numbered[lines[path] - 1] for path in expected} == expected
    assert lines["rule", 0] != lines["rule", 1]
