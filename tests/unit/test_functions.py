"""Users' policy functions without a process around them: interposer.policy.functions and request."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import pytest

from interposer import config
from interposer.config.compile import compile_policy
from interposer.policy import reasons
from interposer.policy.engine import Facts
from interposer.policy.functions import Functions, forget_modules, judge
from interposer.policy.request import Decision, Process, Request, address_text
from interposer.policy.table import (
    ACTION_SAN,
    ACTION_TCP,
    OTHERWISE_ERROR,
    OTHERWISE_INHERIT,
    OTHERWISE_TCP,
    PROVIDER_UNIX,
    ROLE_CONNECT,
    ROLE_LISTEN,
    RULE_DEFAULT,
    Table,
)

V4 = bytes(10) + b"\xff\xff"
LOCALHOST = V4 + bytes([127, 0, 0, 1])
FACTS = Facts(b"/usr/bin/curl", b"curl", (b"curl", b"-s"), (b"HOME=/root", b"A=b=c"), (b"/user.slice",), 1000)


@pytest.fixture(autouse=True)
def clean_modules():
    path = list(sys.path)
    yield
    forget_modules()
    sys.path[:] = path


def table(directory: Path, *names: str, module: str = "site_policy") -> Table:
    """A table whose rules ask those functions, in that order."""
    rules = [
        f'[[rule]]\nrole = "connect"\nremote = "127.0.0.1:{81 + i}"\nuse = "python:{module}:{name}"\n'
        for i, name in enumerate(names)
    ]
    policy = directory / "policy.toml"
    policy.write_text("version = 1\n" + "".join(rules))
    data = compile_policy(
        config.load_files([str(policy)]).policy,
        libpython="",
        python_home="",
        search_path=[],
        engine_module="",
        helper="",
        key="",
    )
    return Table(data)


def decide(functions: Functions, index: int = 0, role: int = ROLE_CONNECT) -> tuple[int, int, tuple[int, ...], int]:
    return functions.decide(index, index, role, 2, bytes(16), 0, LOCALHOST, 81)


@pytest.mark.parametrize(
    "result, expected",
    [
        ("tcp", (ACTION_TCP, OTHERWISE_INHERIT, (), reasons.FUNCTION_TCP)),
        (["tcp"], (ACTION_TCP, OTHERWISE_INHERIT, (), reasons.FUNCTION_TCP)),
        ("unix", (ACTION_SAN, OTHERWISE_INHERIT, (PROVIDER_UNIX,), 0)),
        (["unix"], (ACTION_SAN, OTHERWISE_INHERIT, (PROVIDER_UNIX,), 0)),
        (("unix",), (ACTION_SAN, OTHERWISE_INHERIT, (PROVIDER_UNIX,), 0)),
        (Decision("unix"), (ACTION_SAN, OTHERWISE_INHERIT, (PROVIDER_UNIX,), 0)),
        (Decision(["unix"], otherwise="error"), (ACTION_SAN, OTHERWISE_ERROR, (PROVIDER_UNIX,), 0)),
        (Decision(["unix"], otherwise="tcp"), (ACTION_SAN, OTHERWISE_TCP, (PROVIDER_UNIX,), 0)),
        (Decision(), (ACTION_TCP, OTHERWISE_INHERIT, (), reasons.FUNCTION_TCP)),
    ],
)
def test_judges_what_a_function_may_return(result, expected):
    """P5: a provider, a list of providers, "tcp" and Decision are answers."""
    assert judge(result) == expected


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    "result",
    [
        None,
        True,
        0,
        1.5,
        b"unix",
        {},
        [],
        ["unix", "unix"],
        ["unix", 1],
        "shm9",
        ["unix", "tcp"],
        Nasty(),
        object,
        Decision("unix", otherwise="perhaps"),
        Decision("unix", otherwise=[]),
    ],
)
def test_anything_else_is_nonsense(result):
    """P5: nonsense is noticed, and naming it in the log cannot fail."""
    with pytest.raises(ValueError):
        judge(result)


def test_function_sees_the_request(tmp_path):
    """P5: the request says role, addresses, process and rule, and cannot be changed."""
    (tmp_path / "site_policy.py").write_text(
        "seen = []\ndef decide(request):\n    seen.append(request)\n    return 'unix'\n"
    )
    functions = Functions(table(tmp_path, "decide"), FACTS, print)
    assert decide(functions) == (ACTION_SAN, OTHERWISE_INHERIT, (PROVIDER_UNIX,), 0)
    assert functions.decide(0, RULE_DEFAULT, ROLE_LISTEN, 10, bytes(16), 80, bytes(16), 0)[0] == ACTION_SAN
    connect, listen = sys.modules["site_policy"].seen
    assert (connect.role, connect.family) == ("connect", "v4")
    assert (connect.local, connect.remote) == (("0.0.0.0", 0), ("127.0.0.1", 81))
    assert connect.rule == f"{tmp_path}/policy.toml:2"
    assert (listen.role, listen.family, listen.local, listen.remote) == ("listen", "v6", ("::", 80), None)
    process = connect.process
    assert (process.exe, process.name, process.user) == ("/usr/bin/curl", "curl", 1000)
    assert process.arguments == ("curl", "-s")
    assert process.environment == {"HOME": "/root", "A": "b=c"}
    assert process.cgroups == ("/user.slice",)
    assert "curl" in repr(connect) and "127.0.0.1" in repr(connect)
    for frozen, name in ((connect, "role"), (process, "exe"), (Decision("unix"), "providers")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, "x")


@pytest.mark.parametrize(
    "body, reason, word",
    [
        ("raise ValueError('dark')", reasons.FUNCTION_RAISED, "dark"),
        ("raise SystemExit(3)", reasons.FUNCTION_RAISED, "SystemExit"),
        ("raise KeyboardInterrupt", reasons.FUNCTION_RAISED, "KeyboardInterrupt"),
        ("return decide(request)", reasons.FUNCTION_RAISED, "RecursionError"),
        ("return 7", reasons.FUNCTION_NONSENSE, "7"),
        ("return 'shm9'", reasons.FUNCTION_NONSENSE, "no provider"),
        ("yield 'unix'", reasons.FUNCTION_NONSENSE, "generator"),
        ("request.role = 'x'", reasons.FUNCTION_RAISED, "cannot be changed"),
    ],
)
def test_bad_functions_mean_tcp_and_a_reason(tmp_path, body, reason, word):
    """P5, O1: an exception or nonsense is TCP with its reason; the log names function and fault."""
    (tmp_path / "site_policy.py").write_text(f"def decide(request):\n    {body}\n")
    lines: list[str] = []
    functions = Functions(table(tmp_path, "decide"), FACTS, lines.append)
    assert decide(functions) == (ACTION_TCP, OTHERWISE_INHERIT, (), reason)
    assert len(lines) == 1
    assert "python:site_policy:decide" in lines[0] and word in lines[0]


@pytest.mark.parametrize("change", ["gone", "syntax", "raises", "no-name", "not-callable"])
def test_missing_functions(tmp_path, change):
    """P5, O1: what was there when the policy was compiled and is not now is a reason of its own, said once."""
    source = tmp_path / "site_policy.py"
    source.write_text("def decide(request):\n    return 'unix'\n")
    compiled = table(tmp_path, "decide")
    if change == "gone":
        source.unlink()
    else:
        source.write_text({"syntax": "def", "raises": "1/0", "no-name": "", "not-callable": "decide = 3"}[change])
    lines: list[str] = []
    functions = Functions(compiled, FACTS, lines.append)
    assert decide(functions)[3] == reasons.FUNCTION_MISSING
    assert decide(functions)[3] == reasons.FUNCTION_MISSING
    assert len(lines) == 1 and "python:site_policy:decide" in lines[0]


def test_two_directories_may_have_the_same_module(tmp_path):
    """P5: a module is looked up in the directory of the policy file that names it."""
    results = []
    for name, answer in (("one", "unix"), ("two", "tcp")):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "site_policy.py").write_text("import near\ndef decide(request):\n    return near.ANSWER\n")
        (directory / "near.py").write_text(f"ANSWER = {answer!r}\n")
        sys.modules.pop("near", None)
        results.append(decide(Functions(table(directory, "decide"), FACTS, print))[0])
    assert results == [ACTION_SAN, ACTION_TCP]


def test_changed_module_is_imported_anew(tmp_path):
    """P6: with a new table comes the new text of its functions."""
    source = tmp_path / "site_policy.py"
    source.write_text("def decide(request):\n    return 'unix'\n")
    assert decide(Functions(table(tmp_path, "decide"), FACTS, print))[0] == ACTION_SAN
    source.write_text("def decide(request):\n    return 'tcp'  # longer\n")
    forget_modules()
    assert decide(Functions(table(tmp_path, "decide"), FACTS, print))[0] == ACTION_TCP


def test_importing_leaves_the_search_path_in_order(tmp_path):
    """P5: a policy's directory never comes before the standard library for others' imports."""
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'unix'\n")
    before = list(sys.path)
    decide(Functions(table(tmp_path, "decide"), FACTS, print))
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize(
    "text",
    [
        "::",
        "::1",
        "1::",
        "fe80::1",
        "2001:db8::1:0:0:1",
        "2001:db8:0:1:1:1:1:1",
        "1:2:3:4:5:6:7:8",
        "0:1::",
        "1:0:0:2::3",
        "127.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
    ],
)
def test_addresses_are_written_as_usual(text):
    """P5: functions see addresses as people write them."""
    address = ipaddress.ip_address(text)
    packed = V4 + address.packed if address.version == 4 else address.packed
    assert address_text(packed) == str(address)


def test_request_is_plain():
    """P5: a request without a remote address is a listen."""
    request = Request("listen", "v4", ("127.0.0.1", 80), None, Process(FACTS), "defaults")
    assert request.remote is None
    with pytest.raises(AttributeError):
        del request.role
