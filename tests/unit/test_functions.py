"""Users' policy functions without a process around them: interposer.policy.functions and request."""

from __future__ import annotations

import ipaddress
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from interposer import config
from interposer.config.compile import compile_policy
from interposer.policy import reasons
from interposer.policy.engine import Facts
from interposer.policy.functions import Functions, forget_modules, judge
from interposer.policy.options import NAMES, NUMBERS
from interposer.policy.request import Decision, Option, Process, Request, address_text
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


def decide(functions: Functions, index: int = 0, options: bytes = b"") -> tuple[int, int, tuple[int, ...], int]:
    """Action, otherwise, providers and reason."""
    return functions.decide(index, index, ROLE_CONNECT, 2, bytes(16), 0, LOCALHOST, 81, options)[:4]


def packed(level: int, number: int, value: bytes) -> bytes:
    """A struct sock_option of native/engine.h."""
    return struct.pack("=hhB16sx", level, number, len(value), value)


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
    assert judge(result) == (*expected, 0, 0, 0)


@pytest.mark.parametrize(
    "decision, send_buffer, receive_buffer, remember_ms",
    [
        (Decision("unix", send_buffer=1, receive_buffer=1 << 30), 1, 1 << 30, 0),
        (Decision("unix", remember=0), 0, 0, 0xFFFFFFFF),
        (Decision("unix", remember=0.0), 0, 0, 0xFFFFFFFF),
        (Decision("unix", remember=1e-9), 0, 0, 1),
        (Decision("unix", remember=2), 0, 0, 2000),
        (Decision("unix", remember=0.25), 0, 0, 250),
        (Decision("unix", remember=4_000_000), 0, 0, 4_000_000_000),
        (Decision("tcp", remember=3, send_buffer=5), 0, 0, 3000),
        (Decision(remember=0), 0, 0, 0xFFFFFFFF),
    ],
)
def test_judges_buffers_and_how_long_to_remember(decision, send_buffer, receive_buffer, remember_ms):
    """P5: buffers are bytes of a companion, 0 where nothing is said; how long is milliseconds, 0 for ever."""
    assert judge(decision)[4:] == (send_buffer, receive_buffer, remember_ms)


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
        *(
            Decision("unix", **{name: value})
            for name in ("send_buffer", "receive_buffer")
            for value in (0, -1, (1 << 30) + 1, 1.0, True, "4096", b"1", Nasty())
        ),
        *(
            Decision("unix", remember=value)
            for value in (-1, -0.1, 4_000_001, 1e300, math.nan, math.inf, True, "1", Nasty())
        ),
        Decision("tcp", send_buffer=-1),
        Decision("tcp", remember=-1),
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
    assert isinstance(connect, Request)
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


@pytest.mark.parametrize(
    "frozen",
    [
        Request("listen", "v4", ("127.0.0.1", 80), None, Process(FACTS), "defaults"),
        Process(FACTS),
        Decision("unix"),
        Option(6, 1, b"\1\0\0\0"),
    ],
    ids=lambda frozen: type(frozen).__name__,
)
def test_nothing_of_it_can_be_changed(frozen):
    """P5: what a function is given, and what it returns, is frozen, comparable and says what it is."""
    for name in frozen.FIELDS:
        with pytest.raises(AttributeError, match="cannot be changed"):
            setattr(frozen, name, "x")
        with pytest.raises(AttributeError, match="cannot be changed"):
            delattr(frozen, name)
    with pytest.raises(AttributeError):
        frozen.another = 1
    assert repr(frozen).startswith(type(frozen).__name__ + "(" + frozen.FIELDS[0] + "=")
    assert frozen == frozen and frozen != 1 and hash(frozen) == hash(frozen)


def test_function_sees_the_options(tmp_path):
    """P5: the options that the program has set, by name and by number, in their order."""
    (tmp_path / "site_policy.py").write_text(
        "def decide(request):\n"
        "    nodelay = request.option('TCP_NODELAY')\n"
        "    return 'unix' if nodelay is not None and int(nodelay) else 'tcp'\n"
        "def keep(request):\n"
        "    keep.options = request.options, request.option(1, 9), request.option('SO_RCVBUF'), request\n"
        "    return 'unix'\n"
    )
    functions = Functions(table(tmp_path, "decide", "keep"), FACTS, print)
    one, none = struct.pack("=i", 1), struct.pack("=i", 0)
    assert decide(functions, options=packed(6, 1, one))[0] == ACTION_SAN
    assert decide(functions, options=packed(6, 1, none))[0] == ACTION_TCP
    assert decide(functions)[0] == ACTION_TCP
    decide(functions, 1, packed(1, 9, one) + packed(6, 13, b"reno") + packed(-3, 200, b""))
    options, keepalive, missing, request = sys.modules["site_policy"].keep.options
    assert options == (Option(1, 9, one), Option(6, 13, b"reno"), Option(-3, 200, b""))
    assert [option.name for option in options] == ["SO_KEEPALIVE", "TCP_CONGESTION", ""]
    assert keepalive == options[0] and missing is None
    assert "TCP_CONGESTION" in repr(request)
    with pytest.raises(ValueError, match="no integer"):
        int(options[2])


@pytest.mark.parametrize("arguments, error", [
    (("TCP_NODLAY",), ValueError), ((6,), TypeError), (("TCP_NODELAY", 1), TypeError), ((None, 1), TypeError),
    ((6, "TCP_NODELAY"), TypeError),
])  # fmt: skip
def test_a_misspelt_option_is_an_error(arguments, error):
    """P5: an option that does not exist is no option that was not set."""
    request = Request("listen", "v4", ("127.0.0.1", 80), None, Process(FACTS), "defaults")
    with pytest.raises(error):
        request.option(*arguments)


def test_option_names_are_the_kernels(tmp_path):
    """P5: every name means what it means to C."""
    headers = ["sys/socket.h", "netinet/in.h", "linux/tcp.h", "asm/socket.h"]
    missing = {"IP_LOCAL_PORT_RANGE"}  # of a kernel newer than the headers may be
    lines = [f"#include <{header}>\n" for header in headers] + ["struct row { int level, number; } rows[] = {\n"]
    lines += [f"{{{level}, {name}}},\n" for name, (level, _) in NUMBERS.items() if name not in missing]
    lines += ["};\n", "int levels[] = {SOL_SOCKET, IPPROTO_IP, IPPROTO_TCP, IPPROTO_IPV6};\n"]
    lines += ["int main(void) { for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++)\n"]
    lines += ['__builtin_printf("%d %d\\n", rows[i].level, rows[i].number);\n']
    lines += ['__builtin_printf("%d %d %d %d\\n", levels[0], levels[1], levels[2], levels[3]); }\n']
    source = tmp_path / "options.c"
    source.write_text("".join(lines))
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-o", tmp_path / "options", source], check=True, timeout=60)
    output = subprocess.run([tmp_path / "options"], capture_output=True, text=True, check=True, timeout=10).stdout
    *rows, levels = output.splitlines()
    assert levels == "1 0 6 41"
    expected = [f"{level} {number}" for name, (level, number) in NUMBERS.items() if name not in missing]
    assert rows == expected
    assert len(NAMES) == len(NUMBERS) > 90


NASTY = """\
from interposer.policy import Decision
class Nasty(Exception):
    def __repr__(self):
        raise SystemExit
class Evil(Decision):
    def __getattribute__(self, name):
        raise SystemExit
class Words(list):
    def __iter__(self):
        raise KeyboardInterrupt
"""


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
        ("raise Nasty", reasons.FUNCTION_RAISED, "a Nasty"),
        ("return Decision('unix', send_buffer=0)", reasons.FUNCTION_NONSENSE, "send_buffer=0"),
        ("return Decision('unix', remember=-1)", reasons.FUNCTION_NONSENSE, "remember=-1"),
        ("return Evil('unix')", reasons.FUNCTION_NONSENSE, "Evil that cannot be read"),
        ("return Words(['unix'])", reasons.FUNCTION_NONSENSE, "Words that cannot be read"),
    ],
)
def test_bad_functions_mean_tcp_and_a_reason(tmp_path, body, reason, word):
    """P5, O1: an exception or nonsense is TCP with its reason; the log names function and fault."""
    (tmp_path / "site_policy.py").write_text(f"{NASTY}def decide(request):\n    {body}\n")
    lines: list[str] = []
    functions = Functions(table(tmp_path, "decide"), FACTS, lines.append)
    assert decide(functions) == (ACTION_TCP, OTHERWISE_INHERIT, (), reason)
    assert len(lines) == 1
    assert "python:site_policy:decide" in lines[0] and word in lines[0]


def test_a_child_that_a_function_forked_does_not_come_back(tmp_path):
    """P5, X5: the copy of the process that a careless fork makes ends where the function ends."""
    (tmp_path / "site_policy.py").write_text(
        "import os\ndef decide(request):\n    decide.child = os.fork()\n    return 'unix'\n"
    )
    functions = Functions(table(tmp_path, "decide"), FACTS, print)
    parent = os.getpid()
    answer = decide(functions)
    if os.getpid() != parent:
        os._exit(3)
    assert answer[0] == ACTION_SAN
    assert os.waitstatus_to_exitcode(os.waitpid(sys.modules["site_policy"].decide.child, 0)[1]) == 0
    child = os.fork()
    if child == 0:
        os._exit(decide(functions)[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ACTION_SAN, "a child that no function made decides"


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
