"""`sanctl`, run as a command against processes that write stats pages."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stats_driver
from stats_driver import ROOT, WAIT, Host

from interposer.policy import reasons

NO_COMPANION = reasons.BY_SYMBOL["NO_COMPANION"]
COMMAND = [sys.executable, "-m", "interposer.cli.sanctl"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats_driver.build(tmp_path_factory.mktemp("sanctl"))


@pytest.fixture
def host(program: Path) -> Iterator[Host]:
    started = Host(program)
    yield started
    started.close()


def sanctl(*arguments: str, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "INTERPOSER_POLICY")}
    options = {"cwd": ROOT, "env": environment, **options}
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=WAIT, **options)
    assert run.returncode == status, run
    assert "Traceback" not in run.stderr
    return run


def rows(host: Host) -> list[dict[str, Any]]:
    answer = json.loads(sanctl("ss", "--json", "--pid", str(host.pid)).stdout)
    assert answer["schema"] == 1
    return list(answer["sockets"])


def test_stats_json(host: Host) -> None:
    """O2: the counters have exactly the keys that scripts rely on."""
    host.do("connection 1", "connection 0", "listener 0", f"reason {NO_COMPANION.number}", "upcall", "engine 1 0")
    answer = json.loads(sanctl("stats", "--json").stdout)
    assert answer["schema"] == 1
    (mine,) = [process for process in answer["processes"] if process["pid"] == host.pid]
    assert mine == {
        "pid": host.pid,
        "exe": os.readlink(f"/proc/{host.pid}/exe"),
        "connections": {"unix": 1, "tcp": 1},
        "listeners": {"unix": 0, "tcp": 1},
        "reasons": {"NO_COMPANION": 1},
        "upcalls": 1,
        "engine": "ready",
    }
    assert json.loads(sanctl("stats", "--json", "--pid", str(host.pid)).stdout) == {"schema": 1, "processes": [mine]}


def test_stats_text(host: Host) -> None:
    """O1, O2: the text has the counters, and the sentence and the hint for each reason."""
    host.do("connection 1", "connection 0", f"reason {NO_COMPANION.number}", f"engine 3 {NO_COMPANION.number}")
    lines = sanctl("stats", "--pid", str(host.pid)).stdout.splitlines()
    assert lines[0].split() == ["PID", "PROGRAM", "CONNECTIONS", "LISTENERS", "UP-CALLS", "ENGINE"]
    assert "unix 1, tcp 1" in lines[1] and lines[1].endswith("refused: NO_COMPANION")
    assert lines[0].index("PROGRAM") == lines[1].index(os.readlink(f"/proc/{host.pid}/exe"))
    assert lines[2] == ""
    assert lines[4].split()[:3] == [str(host.pid), "1", "NO_COMPANION"]
    assert NO_COMPANION.sentence in lines[4] and lines[4].endswith(NO_COMPANION.hint)


def test_ss_shows_tcp_with_the_kernels_addresses(host: Host) -> None:
    """O1, O2: a socket on TCP is shown with its reason, and with addresses that the process did not write down."""
    listener, inode, port = host.ask("listen").split()
    host.do(f"row {listener} 1 4 1 0 - 0 - 0 {inode} /etc/p.toml:3")
    client, inode, local = host.ask("connect").split()
    host.do(f"row {client} 2 4 0 {NO_COMPANION.number} - 0 - 0 {inode} defaults")
    server, inode, _ = host.ask("accept").split()
    host.do(f"row {server} 3 4 0 21 - 0 - 0 {inode} x")
    here, there = f"127.0.0.1:{port}", f"127.0.0.1:{local}"
    common = {"pid": host.pid, "provider": "tcp"}
    assert rows(host) == [
        {**common, "fd": int(listener), "role": "listen", "local": here, "peer": None, "provider": "unix",
         "rule": "/etc/p.toml:3", "reason": None},
        {**common, "fd": int(client), "role": "connect", "local": there, "peer": here, "rule": "defaults",
         "reason": "NO_COMPANION"},
        {**common, "fd": int(server), "role": "accept", "local": here, "peer": there, "rule": "x",
         "reason": "PEER_TCP"},
    ]
    text = sanctl("ss", "--pid", str(host.pid)).stdout.splitlines()
    assert text[0].split()[:7] == ["PID", "FD", "ROLE", "LOCAL", "PEER", "PROVIDER", "RULE"]
    assert text[2].endswith(NO_COMPANION.sentence)
    assert [line[text[0].index("LOCAL") :].split()[0] for line in text[1:]] == [here, there, here]


@pytest.mark.parametrize(
    ("name", "local", "peer"),
    [
        ("127.0.0.1:5000/127.0.0.1:80", "127.0.0.1:5000", "127.0.0.1:80"),
        (f"{'0' * 31}1:5000/{'0' * 31}1:80", "[::1]:5000", "[::1]:80"),
        (f"fe80{'0' * 27}1%2:5000/fe80{'0' * 27}2%2:80", "[fe80::1%2]:5000", "[fe80::2%2]:80"),
    ],
)
def test_ss_reads_addresses_from_companion_names(host: Host, name: str, local: str, peer: str) -> None:
    """O2: a connection that a program inherited is shown with the addresses in the kernel's names, on both ends."""
    client = host.ask(f"pair san1/C/{name}").split()[0]
    host.do(f"row {client} 2 4 1 0 - 0 - 0 0 r")
    (shown,) = rows(host)
    assert (shown["local"], shown["peer"], shown["provider"]) == (local, peer, "unix")
    listener = host.ask(f"unix san1/L/{name.partition('/')[2]}/0")
    accepted = host.ask(f"meet san1/C/{name.replace('5000', '5001')} {listener}").split()[1]
    host.do(f"clear {client}", f"row {accepted} 3 4 1 0 - 0 - 0 0 r")
    (shown,) = rows(host)
    assert (shown["local"], shown["peer"]) == (peer, local.replace("5000", "5001"))


def test_ss_drops_rows_that_are_out_of_date(host: Host) -> None:
    """O2, T10: a descriptor that is gone, or is another socket by now, is not shown."""
    listener, inode, _ = host.ask("listen").split()
    companion = host.ask("pair san1/C/127.0.0.1:5000/127.0.0.1:80").split()[0]
    stranger = host.ask("pair something/else").split()[0]
    reused, _, port = host.ask("listen").split()
    host.do(
        f"row {listener} 1 4 1 0 - 0 - 0 {int(inode) + 1} other-inode",
        f"row {reused} 1 4 1 0 127.0.0.1 {int(port) ^ 1} - 0 0 other-port",
        f"row {companion} 2 4 1 0 - 0 - 0 0 good",
        f"row {stranger} 2 4 1 0 - 0 - 0 0 not-a-companion",
        f"row {int(stranger) + 1} 2 4 0 1 - 0 - 0 0 not-tcp",
        "row 0 2 4 1 0 - 0 - 0 0 not-a-socket",
        "row 400 2 4 1 0 - 0 - 0 0 gone",
    )
    assert [shown["rule"] for shown in rows(host)] == ["good"]


def test_lines_are_cut_on_a_terminal_only(host: Host) -> None:
    """O2: a pipe gets everything, a terminal what fits on a line."""
    host.do("connection 1", f"reason {NO_COMPANION.number}")
    whole = sanctl("stats", "--pid", str(host.pid)).stdout.splitlines()
    assert max(map(len, whole)) > 60
    outer, inner = pty.openpty()
    try:
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("=HHHH", 24, 60, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        subprocess.run([*COMMAND, "stats", "--pid", str(host.pid)], stdin=inner, stdout=inner, cwd=ROOT,
                       env=environment, timeout=WAIT, check=True)
        shown = os.read(outer, 65536).decode().splitlines()
    finally:
        os.close(outer)
        os.close(inner)
    assert shown == [line[:60].rstrip() if len(line) <= 60 else line[:60] for line in whole]


def test_pid_that_cannot_be_shown() -> None:
    """O2: --pid says what is wrong with the process."""
    assert "is not interposed" in sanctl("stats", "--pid", str(os.getpid()), status=1).stderr
    assert "is not interposed" in sanctl("ss", "--pid", str(os.getpid()), status=1).stderr
    gone = subprocess.Popen(["true"])
    gone.wait(WAIT)
    assert f"there is no process {gone.pid}" in sanctl("ss", "--json", "--pid", str(gone.pid), status=1).stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_processes_of_other_users(host: Host) -> None:
    """O2: without privilege a user sees no other user's processes, and is told so with --pid."""
    host.do("connection 1")
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        shutil.copytree(ROOT / "interposer", Path(place, "interposer"), ignore=shutil.ignore_patterns("*.so", "*.c"))
        os.chmod(place, 0o755)
        nobody = {"cwd": place, "user": 65534, "group": 65534, "extra_groups": []}
        command = ["/usr/bin/python3", *COMMAND[1:]]
        listed = subprocess.run([*command, "stats", "--json"], capture_output=True, text=True, timeout=WAIT, **nobody)  # type: ignore[call-overload]
        nothing = {"schema": 1, "processes": [], "bypassed": []}
        assert (listed.returncode, json.loads(listed.stdout), listed.stderr) == (0, nothing, "")
        named = subprocess.run([*command, "ss", "--pid", str(host.pid)], capture_output=True, text=True, timeout=WAIT,
                               **nobody)  # type: ignore[call-overload]
        assert (named.returncode, named.stdout) == (1, "")
        assert named.stderr.startswith(f"sanctl: process {host.pid} may not be inspected by this user")


def test_damaged_page_is_named(host: Host, program: Path) -> None:
    """X4, O2: a process with a damaged page is a message and status 1, the rest is listed."""
    other = Host(program)
    try:
        host.do("connection 1")
        other.do("connection 1")
        with open(f"/proc/{other.pid}/fd/500", "r+b", buffering=0) as file:
            file.write(b"nonsense")
        run = sanctl("stats", "--json", status=1)
        assert host.pid in [process["pid"] for process in json.loads(run.stdout)["processes"]]
        assert f"sanctl: process {other.pid}: its stats page has no valid head\n" in run.stderr
        assert sanctl("ss", "--pid", str(other.pid), status=1).stdout == ""
    finally:
        other.close()


def test_text_of_others_cannot_steer_the_terminal(program: Path, tmp_path: Path) -> None:
    """O2: control characters and broken UTF-8 in names are spelled out."""
    name = os.fsencode(tmp_path) + b"/\x1b[31m\xff\n"
    shutil.copy(program, name)
    host = Host(Path(os.fsdecode(name)))
    try:
        host.do("connection 1", "row 0 1 4 1 0 - 0 - 0 0 \x1b]0;x\x07")
        text = sanctl("stats", "--pid", str(host.pid)).stdout
        assert "\x1b" not in text and "\\x1b[31m\\udcff\\n" in text
        (process,) = json.loads(sanctl("stats", "--json", "--pid", str(host.pid)).stdout)["processes"]
        assert os.fsencode(process["exe"]) == name
    finally:
        host.close()


def test_broken_pipe_is_quiet(host: Host) -> None:
    """O2: `sanctl ss | head` prints no error."""
    host.do("connection 1")
    inner, outer = os.pipe()
    os.close(inner)
    try:
        run = subprocess.run([*COMMAND, "stats", "--pid", str(host.pid)], stdout=outer, stderr=subprocess.PIPE,
                             cwd=ROOT, timeout=WAIT)
    finally:
        os.close(outer)
    assert (run.returncode, run.stderr) == (-signal.SIGPIPE, b"")


def test_output_that_cannot_be_written_is_a_problem(host: Host) -> None:
    """O2: a full disk is a message, not a traceback."""
    host.do("connection 1")
    with open("/dev/full", "w") as full:
        run = subprocess.run([*COMMAND, "stats", "--pid", str(host.pid)], stdout=full, stderr=subprocess.PIPE, cwd=ROOT,
                             timeout=WAIT, text=True)
    assert run.returncode == 1
    assert run.stderr == "sanctl: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("stats", "--pid", "x"), ("ss", "--pid", "0"), ("ss", "extra"), ("check", "a", "b")],
)
def test_wrong_command_line(arguments: tuple[str, ...]) -> None:
    """O2: a wrong command line is status 2 and says how it should be."""
    assert "usage: sanctl" in sanctl(*arguments, status=2).stderr


def test_help_and_version() -> None:
    """O2: every verb is in the help."""
    text = sanctl("--help").stdout
    assert all(f"    {verb} " in text for verb in ("ss", "stats", "check", "reload"))
    assert sanctl("--version").stdout.startswith("sanctl ")
    assert "--pid N" in sanctl("ss", "--help").stdout


def test_check(tmp_path: Path) -> None:
    """P4: a policy's errors come with file and line and status 1; a sound policy is status 0."""
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('version = 1\n[[rule]]\nrole = "connect"\nremote = "10.0.0.0/8:5432"\nuse = "tcp"\n')
    bad.write_text('version = 1\n[defaults]\nprovidrs = ["unix"]\n')
    assert sanctl("check", str(good)).stdout == f"{good}: 1 rule, no errors\n"
    text = sanctl("check", str(bad), status=1).stdout
    assert text.startswith(f"{bad}:3: ") and "providers" in text
    assert "nowhere.toml" in sanctl("check", str(tmp_path / "nowhere.toml"), status=1).stdout
    assert json.loads(sanctl("check", "--json", str(good)).stdout) == {
        "schema": 1, "files": [str(good)], "rules": 1, "problems": [], "warnings": [],
    }  # fmt: skip
    (problem,) = json.loads(sanctl("check", "--json", str(bad), status=1).stdout)["problems"]
    assert (problem["file"], problem["line"], problem["hint"]) == (str(bad), 3, 'did you mean "providers"?')


def test_check_without_a_file_reads_what_sanrun_would(tmp_path: Path) -> None:
    """P4: without FILE it is the policy that sanrun would find, or the built-in defaults."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("INTERPOSER_POLICY", None)
    if not os.path.exists("/etc/interposer/policy.toml"):
        assert "built-in" in sanctl("check", env=environment).stdout
    (tmp_path / "interposer").mkdir()
    (tmp_path / "interposer" / "policy.toml").write_text("version = 2\n")
    assert str(tmp_path) in sanctl("check", env=environment, status=1).stdout
