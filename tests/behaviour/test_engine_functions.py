"""Users' functions in a strange process: called, timed, refused, forgotten."""

from __future__ import annotations

import subprocess
import time

import engine_support as support
import pytest
from engine_support import EMBEDDED, REACTIVE, SAN, TCP, run, verdicts, write_table

from interposer.policy import reasons

FUNCTIONS = """
import time, threading, os
def fine(request):
    return "unix"
def tcp(request):
    return "tcp"
def bad(request):
    raise ValueError("no")
def nonsense(request):
    return 7
def slow(request):
    time.sleep(0.15)
    return "unix"
def stuck(request):
    time.sleep(30)
def spins(request):
    while True:
        pass
def facts(request):
    process = request.process
    assert (process.exe, process.name) == ("/usr/bin/host", "host"), process
    assert process.arguments == ("host", "--flag"), process.arguments
    assert process.environment["WORD"] == "yes"
    assert request.remote == ("127.0.0.1", 86), request
    return "unix"
def forks(request):
    child = os.fork()
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    return "unix"
def connects(request):
    import socket
    listener = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(listener.getsockname()).close()
    return "unix"
def deep(request):
    def down(n):
        return n and down(n - 1)
    down(900)
    return "unix"
"""
NAMES = ("fine", "tcp", "bad", "nonsense", "slow", "facts", "stuck", "spins", "forks", "connects", "deep")


def table_of(directory, *names: str, defaults: str = "", functions: str = FUNCTIONS) -> str:
    """Rule and function i are for port 81 + i."""
    rules = "".join(support.FIRST.format(port=81 + i, name=name) for i, name in enumerate(names))
    return write_table(directory, support.DEFAULTS + defaults + rules, functions)


@pytest.mark.parametrize("engine", [EMBEDDED, REACTIVE])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("fine", (SAN, 0)),
        ("tcp", (TCP, reasons.FUNCTION_TCP)),
        ("bad", (TCP, reasons.FUNCTION_RAISED)),
        ("nonsense", (TCP, reasons.FUNCTION_NONSENSE)),
        ("slow", (TCP, reasons.FUNCTION_TIMEOUT)),
        ("facts", (SAN, 0)),
        ("forks", (SAN, 0)),
        ("connects", (SAN, 0)),
        ("deep", (SAN, 0)),
    ],
)
def test_decisions_of_functions(tmp_path, engine, name, expected):
    """P1, P5: the function decides, asked by the compiled rule or, in reactive mode, after Python found the rule."""
    table = table_of(tmp_path, *NAMES, defaults="timeout_ms = 2000\n" if name in ("connects", "forks") else "")
    index = NAMES.index(name)
    function = index if engine == EMBEDDED else "-"
    output = run(table, engine, "asks", function, 81 + index)
    assert verdicts(output) == [expected], support.log(table)
    assert support.fields(output, "verdict")[0]["rule"] == str(index)


def test_missing_module_at_run_time(tmp_path):
    """P5, O1: a module that vanished after the policy was compiled is a reason."""
    table = table_of(tmp_path, "fine")
    (tmp_path / "site_policy.py").unlink()
    assert verdicts(run(table, EMBEDDED, "asks", 0, 81, 2)) == [(TCP, reasons.FUNCTION_MISSING)] * 2
    assert "ModuleNotFoundError" in support.log(table)


@pytest.mark.parametrize("name", ["stuck", "spins"])
def test_a_function_that_does_not_return(tmp_path, name):
    """P5, O1: each call costs the program timeout_ms, the third is the last, and rules without code still serve."""
    table = table_of(tmp_path, name)
    output = run(table, EMBEDDED, "asks", 0, 81, 6)
    reason = [verdict[1] for verdict in verdicts(output)]
    assert reason == [reasons.FUNCTION_TIMEOUT] * 3 + [reasons.FUNCTION_REFUSED] * 3
    times = [float(line["ms"]) for line in support.fields(output, "verdict")]
    assert all(95 < ms < 400 for ms in times[1:3]), times
    assert all(ms < 50 for ms in times[3:]), times


def test_slow_answers_are_dropped(tmp_path):
    """P5: an answer that comes too late is nobody's: the next call gets its own."""
    table = table_of(tmp_path, "slow", "fine")
    output = run(table, EMBEDDED, "asks", 0, 81, 1)
    assert verdicts(output) == [(TCP, reasons.FUNCTION_TIMEOUT)]
    output = run(table, EMBEDDED, "asks", 0, 81, 2, 300)
    assert verdicts(output) == [(TCP, reasons.FUNCTION_TIMEOUT)] * 2


@pytest.mark.parametrize("engine, function", [(EMBEDDED, "0"), (REACTIVE, "-")])
def test_new_policy(tmp_path, engine, function):
    """P6: with a new table come its rules, and the new text of its functions' modules."""
    table = table_of(tmp_path, "fine")
    command = [support.host(), table, str(engine), "pause", function, "81"]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdin and program.stdout
    answers = []
    for text in (
        "return 'unix'",
        "raise ValueError",
        "time.sleep(0.15)",
        "time.sleep(0.15)",
        "time.sleep(0.15)",
        "return 'unix'",
    ):
        table_of(tmp_path, "fine", functions=f"import time\ndef fine(request):\n    {text}\n")
        print(file=program.stdin, flush=True)
        answers += verdicts(program.stdout.readline())
        time.sleep(0.1)  # until a late function has ended
    program.stdin.close()
    program.wait(20)
    assert answers[0] == answers[-1] == (SAN, 0)
    assert [reason for _, reason in answers[1:-1]] == [reasons.FUNCTION_RAISED] + [reasons.FUNCTION_TIMEOUT] * 3


def test_timeout_is_the_policys(tmp_path):
    """P5: timeout_ms can be set."""
    table = table_of(tmp_path, "slow", defaults="timeout_ms = 1000\n")
    assert verdicts(run(table, EMBEDDED, "asks", 0, 81)) == [(SAN, 0)]


def test_imports_are_not_timed(tmp_path):
    """P5: the time of a function is that of its run, not of its module's import."""
    table = table_of(
        tmp_path, "fine", functions="import time\ntime.sleep(0.3)\ndef fine(request):\n    return 'unix'\n"
    )
    assert verdicts(run(table, EMBEDDED, "asks", 0, 81)) == [(SAN, 0)]


def test_signal_handler_that_asks(tmp_path):
    """P5, T12, O1: a handler that asks while its thread waits is answered; one that jumps away breaks nothing."""
    table = table_of(tmp_path, "slow", "fine", defaults="timeout_ms = 1000\n")
    output = run(table, EMBEDDED, "reenter")
    assert verdicts(output, "handler") == [(TCP, reasons.ENGINE_BUSY)]
    assert verdicts(output, "outer") == [(SAN, 0)]
    assert verdicts(output, "never") == []
    assert verdicts(output, "after") == [(SAN, 0)]


def test_program_ends_with_its_own_last_thread(tmp_path):
    """P5, X8: a program whose main thread leaves by pthread_exit still ends: the function thread goes when idle."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "leave-main", timeout=15)
    assert verdicts(output) == [(SAN, 0)]
