"""The helper process: asked where no Python may be embedded, gone when nobody needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import engine_support as support
import psutil
import pytest
from engine_support import EMBEDDED, HELPER, REACTIVE, SAN, TCP, run, verdicts, write_table

from interposer.launch import libpython
from interposer.policy import reasons
from interposer.policy.helper import QUESTION, REPLY

FUNCTIONS = """
import time
def fine(request):
    return "unix"
def bad(request):
    raise ValueError("no")
def slow(request):
    time.sleep(0.5)
    return "unix"
def facts(request):
    process = request.process
    assert (process.exe, process.name) == ("/usr/bin/host", "host"), process
    assert process.arguments == ("host", "--flag"), process.arguments
    assert process.environment == {"HOME": "/root", "WORD": "yes"}
    assert process.cgroups == ("0::/",)
    return "unix"
def big(request):
    assert len(request.process.environment["BIG"]) == 20 * 32768
    return "unix"
def stuck(request):
    time.sleep(60)
def forbidden(request):
    import faulthandler
    return "unix"
"""
NAMES = ("fine", "bad", "slow", "facts", "stuck", "big", "forbidden")
LOCALHOST = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1])
LAUNCH = """
import os, sys
from interposer.launch import helper
helper.spawn(sys.argv[1], sys.argv[2], sys.argv[1] + ".log")
os.execvp(sys.argv[3], sys.argv[3:])
"""


def address_of(directory: Path) -> str:
    return f"interposer-test{directory}"[:90]


def table_of(directory: Path, *names: str, defaults: str = "") -> str:
    rules = "".join(support.FIRST.format(port=81 + i, name=name) for i, name in enumerate(names or NAMES))
    return write_table(directory, support.DEFAULTS + defaults + rules, FUNCTIONS, helper=address_of(directory))


@contextlib.contextmanager
def launched(directory: Path, table: str, *command: str):
    """A program that runs under a helper, as sanrun starts it."""
    words = command or ("sleep", "60")
    environment = {**os.environ, "PYTHONPATH": str(support.ROOT), "INTERPOSER_TABLE": table}
    program = subprocess.Popen([sys.executable, "-c", LAUNCH, table, address_of(directory), *words], env=environment)
    try:
        wait_until(lambda: not psutil.Process(program.pid).name().startswith("python"))
        yield program
    finally:
        program.kill()
        program.wait(10)
        wait_until(lambda: helpers(table) == [])


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def helpers(table: str) -> list[psutil.Process]:
    """The living helpers of a table. Their command line is still the launcher's."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "sanrun-helper" and table in process.cmdline():
                found.append(process)
    return found


@pytest.mark.parametrize(
    "scenario, label",
    [(("python", libpython.find()), "verdict"), (("sandbox",), "verdict"), (("asks",), "verdict")],
)
@pytest.mark.parametrize(
    "name, expected",
    [
        ("fine", (SAN, 0)),
        ("bad", (TCP, reasons.FUNCTION_RAISED)),
        ("forbidden", (TCP, reasons.FUNCTION_RAISED)),
        ("slow", (TCP, reasons.FUNCTION_TIMEOUT)),
        ("facts", (SAN, 0)),
    ],
)
def test_hosts_that_must_not_embed_ask_the_helper(tmp_path, scenario, label, name, expected):
    """P5, P8: Python hosts, sandboxed programs and `engine = "helper"` have their functions called by the helper."""
    table = table_of(tmp_path)
    index = NAMES.index(name)
    with launched(tmp_path, table):
        engine = HELPER if scenario[0] == "asks" else EMBEDDED
        output = run(table, engine, *scenario, index, 81 + index)
        assert verdicts(output, label) == [expected], support.log(table)
        assert "engine=2" in output
        reactive = HELPER if scenario[0] == "asks" else REACTIVE
        output = run(table, reactive, *scenario, "-", 81 + index)
        assert verdicts(output, label) == [expected], support.log(table)
        assert support.fields(output, label)[0]["rule"] == str(index)


def test_small_stack_asks_the_helper(tmp_path):
    """P8: a thread with a small stack asks the helper; its siblings use the embedded engine."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        output = run(table, REACTIVE, "small-stack")
    assert verdicts(output, "small") == verdicts(output, "large") == [(SAN, 0)]


def test_without_a_helper(tmp_path):
    """P8, O1: nobody at the address is a reason, at once."""
    table = table_of(tmp_path)
    output = run(table, HELPER, "asks", 0, 81)
    assert verdicts(output) == [(TCP, reasons.ENGINE_NO_HELPER)]
    assert float(support.fields(output, "verdict")[0]["ms"]) < 50
    output = run(table, EMBEDDED, "python", libpython.find(), 0, 81)
    assert verdicts(output) == [(TCP, reasons.ENGINE_PYTHON_HOST)]


def test_forks_with_a_helper(tmp_path):
    """T4, P8: forked children ask on connections of their own."""
    table = table_of(tmp_path, defaults="timeout_ms = 5000\n")
    with launched(tmp_path, table):
        assert "good=100 refused=0 bad=0" in run(table, HELPER, "forks", 4, 25, 2, "both", timeout=120)


def test_connections_are_a_processs_own(tmp_path):
    """T4, T11: a child shares no connection, and a number that the program closed and used again is not written to."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        output = run(table, HELPER, "connections")
    assert verdicts(output, "first") == verdicts(output, "child") == verdicts(output, "closed") == [(SAN, 0)]
    assert "inherited=0" in output and "leaked=0" in output


def test_a_function_that_hangs_delays_only_its_askers(tmp_path):
    """P5: others are answered meanwhile; after three time-outs the functions are refused."""
    table = table_of(tmp_path)
    stuck, fine = NAMES.index("stuck"), NAMES.index("fine")
    with launched(tmp_path, table):
        assert verdicts(run(table, HELPER, "asks", stuck, 85)) == [(TCP, reasons.FUNCTION_TIMEOUT)]
        assert verdicts(run(table, HELPER, "asks", fine, 81)) == [(SAN, 0)]
        output = run(table, HELPER, "asks", stuck, 85, 3)
        assert [reason for _, reason in verdicts(output)] == [
            reasons.FUNCTION_TIMEOUT,
            reasons.FUNCTION_TIMEOUT,
            reasons.FUNCTION_REFUSED,
        ]
        assert verdicts(run(table, HELPER, "asks", "-", 80)) == [(SAN, 0)]


def test_helper_holds_nothing_of_the_program(tmp_path):
    """T11, X5: no terminal, no descriptor, no directory, no preload of the program's, and not its child."""
    table = table_of(tmp_path)
    with launched(tmp_path, table) as program:
        (process,) = helpers(table)
        assert process.ppid() != program.pid
        assert os.getsid(process.pid) == process.pid or os.getsid(process.pid) != os.getsid(program.pid)
        assert process.cwd() == "/"
        links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)]
        assert links == ["/dev/null", f"{table}.log", f"{table}.log"]
        assert process.num_fds() <= 10
        assert psutil.Process(program.pid).children() == []


def test_kill_leaves_no_helper(tmp_path):
    """X5: kill -9 of the program ends its helper."""
    table = table_of(tmp_path)
    with launched(tmp_path, table) as program:
        assert len(helpers(table)) == 1
        os.kill(program.pid, signal.SIGKILL)
        program.wait(10)
        wait_until(lambda: helpers(table) == [], 3)


def test_programs_share_a_helper(tmp_path):
    """P8, X5: a second program of the same policy uses the helper that runs; it stays until the last one ends."""
    table = table_of(tmp_path)
    with launched(tmp_path, table) as first, launched(tmp_path, table) as second:
        (process,) = helpers(table)
        first.kill()
        first.wait(10)
        time.sleep(0.2)
        assert [other.pid for other in helpers(table)] == [process.pid]
        assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]
        second.kill()
        second.wait(10)
        wait_until(lambda: helpers(table) == [], 3)


def test_helper_stays_for_its_clients(tmp_path):
    """P8: a daemon that outlives the program that was launched keeps its helper."""
    table = table_of(tmp_path)
    with launched(tmp_path, table) as program:
        command = [support.host(), table, str(HELPER), "pause", "0", "81"]
        daemon = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert daemon.stdin and daemon.stdout
        try:
            for _ in range(2):
                print(file=daemon.stdin, flush=True)
                assert verdicts(daemon.stdout.readline()) == [(SAN, 0)]
                program.kill()
                program.wait(10)
                time.sleep(0.2)
            assert len(helpers(table)) == 1
        finally:
            daemon.stdin.close()
            daemon.wait(10)
        wait_until(lambda: helpers(table) == [], 3)


def test_helper_that_is_killed(tmp_path):
    """P5, X5, O1: the program goes on over TCP, and is served again by the next helper."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        command = [support.host(), table, str(HELPER), "pause", "0", "81"]
        program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert program.stdin and program.stdout
        answers = []
        for step in ("serve", "kill", "again"):
            if step == "kill":
                helpers(table)[0].kill()
                wait_until(lambda: helpers(table) == [])
            with launched(tmp_path, table) if step == "again" else contextlib.nullcontext():
                print(file=program.stdin, flush=True)
                answers += verdicts(program.stdout.readline())
                if step == "again":
                    program.stdin.close()
                    program.wait(10)
        assert answers == [(SAN, 0), (TCP, reasons.ENGINE_NO_HELPER), (SAN, 0)]


def test_helper_that_is_stopped(tmp_path):
    """P5, O1: a helper that does not answer costs timeout_ms and a little, then TCP."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        (process,) = helpers(table)
        process.suspend()
        try:
            output = run(table, HELPER, "asks", 0, 81)
        finally:
            process.resume()
    assert verdicts(output) == [(TCP, reasons.FUNCTION_TIMEOUT)]
    assert float(support.fields(output, "verdict")[0]["ms"]) < 700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_squatter_is_not_asked(tmp_path):
    """X1, X3, O1: whoever holds the address must be root or this user; the launcher says who it is."""
    table = table_of(tmp_path)
    squatter = os.fork()
    if squatter == 0:
        os.setgid(65534)
        os.setuid(65534)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(b"\0" + address_of(tmp_path).encode())
        listener.listen()
        signal.alarm(60)
        while True:
            listener.accept()
    try:
        wait_until(lambda: f"@{address_of(tmp_path)}" in Path("/proc/net/unix").read_text(errors="replace"))
        output = run(table, HELPER, "asks", 0, 81)
        assert verdicts(output) == [(TCP, reasons.ENGINE_NO_HELPER)]
        assert "held by user 65534" in support.log(table)
        environment = {**os.environ, "PYTHONPATH": str(support.ROOT)}
        command = [sys.executable, "-c", LAUNCH, table, address_of(tmp_path), "true"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert "of user 65534" in result.stderr
    finally:
        os.kill(squatter, signal.SIGKILL)
        os.waitpid(squatter, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_strangers_are_not_answered(tmp_path):
    """X3: the helper answers its own user and root, nobody else."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        stranger = os.fork()
        if stranger == 0:
            os.setgid(65534)
            os.setuid(65534)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(5)
            connection.connect(b"\0" + address_of(tmp_path).encode())
            try:
                os._exit(0 if connection.recv(10) == b"" else 1)
            except ConnectionError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(stranger, 0)[1]) == 0
        assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]


@pytest.mark.parametrize("message", [b"", b"x", b"\1\0\0\0", b"\2\0\0\0" * 2, b"\4\0\0\0\0\0\0\0", os.urandom(80)])
def test_nonsense_from_a_client(tmp_path, message):
    """X4: a client that lies loses its own connection only."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(5)
        connection.connect(b"\0" + address_of(tmp_path).encode())
        connection.send(message)
        assert verdicts(run(table, HELPER, "asks", 0, 81)) == [(SAN, 0)]
        connection.close()


def test_new_policy(tmp_path):
    """P6: the helper follows the table on disk, whichever the program has."""
    table = table_of(tmp_path)
    with launched(tmp_path, table):
        assert verdicts(run(table, HELPER, "asks", "-", 80)) == [(SAN, 0)]
        fresh = write_table(
            tmp_path, support.DEFAULTS + '[[rule]]\nrole = "connect"\nuse = "tcp"\n', helper=address_of(tmp_path)
        )
        assert fresh == table
        assert verdicts(run(table, HELPER, "asks", "-", 80)) == [(TCP, reasons.POLICY_TCP)]


def test_large_environment(tmp_path):
    """P3, P8: facts of any size reach the helper, in pieces."""
    table = table_of(tmp_path)
    request = QUESTION.pack(2, 7, 0, 2, 2, 0, 0xFFFFFFFF, 0xFFFFFFFF, bytes(16), 0, 0, 0, LOCALHOST, 0, 86, 0)
    with launched(tmp_path, table), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(b"\0" + address_of(tmp_path).encode())
        connection.send(b"\1\0\0\0\4\0\0\0BIG=")
        for _ in range(20):
            connection.send(b"\1\0\0\0\4\0\0\0" + b"A" * 32768)
        connection.send(b"\1\0\0\0\4\0\0\0\0")
        connection.send(request)
        answer = REPLY.unpack(connection.recv(100))
    assert (answer[0], answer[1], answer[3]) == (3, 7, SAN), support.log(table)


@pytest.mark.parametrize("newer, remember", [(0, 5), (1, 0xFFFFFFFF)])
def test_answer_by_another_policy_is_not_remembered(tmp_path, newer, remember):
    """P6: the helper has read the new policy and the program has not: its answer holds for this one question."""
    table = table_of(tmp_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(b"\0" + address_of(tmp_path).encode())
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        while (message := connection.recv(65536))[:4] != b"\2\0\0\0":
            assert message
        _, number, generation = QUESTION.unpack_from(message)[:3]
        connection.send(REPLY.pack(3, number, generation + newer, SAN, 1, b"\1", 0, 0, 0xFFFFFFFF, 0, 0, 5))
        connection.close()

    helper = threading.Thread(target=answer, daemon=True)
    helper.start()
    output = run(table, HELPER, "asks", 0, 81)
    helper.join(10)
    listener.close()
    assert verdicts(output) == [(SAN, 0)]
    assert support.fields(output, "verdict")[0]["remember"] == str(remember)
