"""Users' functions in a strange process: called, timed, refused, forgotten."""

from __future__ import annotations

import os
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
def pauses(request):
    time.sleep(0.001)
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


BAD = {
    # name: (module, reason, a word of the log)
    "raises in __del__": (
        """
class Thing:
    def __del__(self):
        raise ValueError("from the grave")
def decide(request):
    Thing()
    return "unix"
""",
        0,
        "from the grave",
    ),
    "returns what raises in __del__": (
        """
class Thing:
    def __del__(self):
        raise ValueError("from the grave")
def decide(request):
    return Thing()
""",
        reasons.FUNCTION_NONSENSE,
        "from the grave",
    ),
    "returns what loops in __del__": (
        """
class Thing:
    def __del__(self):
        while True:
            pass
def decide(request):
    return Thing()
""",
        reasons.FUNCTION_TIMEOUT,
        "FunctionTimeout",
    ),
    "raises in a cycle's __del__": (
        """
import gc
class Thing:
    def __init__(self):
        self.me = self
    def __del__(self):
        raise SystemExit(3)
def decide(request):
    Thing()
    gc.collect()
    return "unix"
""",
        0,
        "SystemExit",
    ),
    "raises what has no text": (
        """
class Error(Exception):
    def __repr__(self):
        raise self
    __str__ = __repr__
def decide(request):
    raise Error
""",
        reasons.FUNCTION_RAISED,
        "raised",
    ),
    "raises no exception": ("def decide(request):\n    raise 7\n", reasons.FUNCTION_RAISED, "TypeError"),
    "raises out of a finally": (
        "def decide(request):\n    try:\n        return 'unix'\n    finally:\n        raise GeneratorExit\n",
        reasons.FUNCTION_RAISED,
        "GeneratorExit",
    ),
    "returns text that hides": (
        """
class Text(str):
    def __hash__(self):
        raise OSError("hidden")
    __eq__ = __repr__ = __str__ = __hash__
def decide(request):
    return Text("unix")
""",
        reasons.FUNCTION_NONSENSE,
        "decide",
    ),
    "returns a list that lies": (
        """
class List(list):
    def __iter__(self):
        while True:
            yield "unix"
    def __len__(self):
        return 1
def decide(request):
    return List(["unix"])
""",
        reasons.FUNCTION_TIMEOUT,
        "cannot be read",
    ),
    "returns a decision that raises": (
        """
from interposer.policy import Decision
class Mine(Decision):
    @property
    def providers(self):
        raise BaseException("mine")
    def __init__(self):
        pass
def decide(request):
    return Mine()
""",
        reasons.FUNCTION_NONSENSE,
        "decide",
    ),
    "returns a coroutine": ("async def decide(request):\n    return 'unix'\n", reasons.FUNCTION_NONSENSE, "coroutine"),
    "returns itself": ("def decide(request):\n    return decide\n", reasons.FUNCTION_NONSENSE, "function"),
    "returns too much": ("def decide(request):\n    return ['unix'] * 10**5\n", reasons.FUNCTION_NONSENSE, "too many"),
    "takes no argument": ("def decide():\n    return 'unix'\n", reasons.FUNCTION_RAISED, "TypeError"),
    "exits": ("import sys\ndef decide(request):\n    sys.exit('now')\n", reasons.FUNCTION_RAISED, "SystemExit"),
    "exits at its import": ("raise SystemExit(3)\n", reasons.FUNCTION_MISSING, "SystemExit"),
    "recurses": ("def decide(request):\n    return decide(request)\n", reasons.FUNCTION_RAISED, "RecursionError"),
    "recurses in C": (
        """
class Thing:
    def __getattr__(self, name):
        return getattr(self, name + "x")
def decide(request):
    return Thing().x
""",
        reasons.FUNCTION_RAISED,
        "RecursionError",
    ),
    "shows what is nested deeply": (
        """
def decide(request):
    nest = []
    for _ in range(100000):
        nest = [nest]
    return repr(nest)
""",
        reasons.FUNCTION_RAISED,
        "RecursionError",
    ),
    "lifts the limit of recursion": (
        "import sys\ndef decide(request):\n    sys.setrecursionlimit(10**9)\n",
        reasons.FUNCTION_RAISED,
        "RuntimeError",
    ),
    "wants all memory": ("def decide(request):\n    return 'x' * 2**62\n", reasons.FUNCTION_RAISED, "MemoryError"),
    "forks and comes back": (
        """
import os
def decide(request):
    if child := os.fork():
        os.waitpid(child, 0)
    return "unix"
""",
        0,
        "",
    ),
    "forks and raises": (
        """
import os
def decide(request):
    if child := os.fork():
        os.waitpid(child, 0)
        return "unix"
    raise ValueError("in the child")
""",
        0,
        "",
    ),
}


def table_with(directory, text: str, timeout_ms: int = 100) -> str:
    """The module was sound when the policy was compiled, else that would have been refused."""
    defaults = f"timeout_ms = {timeout_ms}\n"
    table = table_of(directory, "decide", defaults=defaults, functions="def decide(request):\n    return 'unix'\n")
    (directory / "site_policy.py").write_text(text)
    return table


@pytest.mark.parametrize("what", BAD)
def test_bad_functions(tmp_path, what):
    """P5, O1: TCP and the reason, within the function's time; the program lives on, and so does the engine."""
    text, reason, word = BAD[what]
    late = reason == reasons.FUNCTION_TIMEOUT
    timeout_ms = 100 if late else 2000  # the machine may be busy
    table = table_with(tmp_path, text, timeout_ms)
    output = run(table, EMBEDDED, "quiet", 0, 81, 3, 200 if late else 0, 0)  # until it is interrupted
    expected = (TCP, reason) if reason else (SAN, 0)
    assert verdicts(output) == [expected] * 3, support.log(table)
    times = [float(line["ms"]) for line in support.fields(output, "verdict")]
    assert max(times[1:]) < timeout_ms + 1000, "the first one starts Python"
    assert verdicts(output, "after") == [(SAN, 0)]
    assert output.count("after ") == 1, "two processes came back"
    assert word in support.log(table)


def test_a_function_that_takes_python_apart(tmp_path):
    """P5: what is left of Python cannot decide, and says so; the program does not notice."""
    text = """
import builtins, sys
def decide(request):
    sys.stdout = sys.stderr = sys.excepthook = sys.unraisablehook = None
    sys.meta_path.clear()
    sys.path.clear()
    for name in ("len", "print", "isinstance", "__import__"):
        delattr(builtins, name)
    return "unix"
"""
    output = run(table_with(tmp_path, text), EMBEDDED, "quiet", 0, 81, 2, 0, 0)
    assert verdicts(output) == [(SAN, 0), (TCP, reasons.FUNCTION_RAISED)]
    assert verdicts(output, "after") == [(TCP, reasons.ENGINE_FAILED)]


def test_a_module_that_never_ends(tmp_path):
    """P5, O1: an import is waited for, but only once, and only for a second."""
    table = table_with(tmp_path, "import time\ntime.sleep(30)\n")
    output = run(table, EMBEDDED, "asks", 0, 81, 5)
    reason = [verdict[1] for verdict in verdicts(output)]
    assert reason == [reasons.FUNCTION_TIMEOUT] * 3 + [reasons.FUNCTION_REFUSED] * 2
    times = [float(line["ms"]) for line in support.fields(output, "verdict")]
    assert 950 < times[0] < 3000
    assert max(times[1:]) < 500, times


def test_a_module_that_loops(tmp_path):
    """P5, O1: it is interrupted, and then it cannot be had."""
    table = table_with(tmp_path, "while True:\n    pass\n")
    output = run(table, EMBEDDED, "quiet", 0, 81, 2, 100, 300)
    assert [verdict[1] for verdict in verdicts(output)] == [reasons.FUNCTION_TIMEOUT, reasons.FUNCTION_MISSING]
    assert float(support.fields(output, "burnt_ms")[0]["burnt_ms"]) < 100


@pytest.mark.parametrize("engine, function", [(EMBEDDED, "0"), (REACTIVE, "-")])
def test_a_function_that_loops_is_interrupted(tmp_path, engine, function):
    """P5: after its time it burns no CPU, and Python answers other questions."""
    table = table_of(tmp_path, "spins")
    output = run(table, engine, "quiet", function, 81, 1, 200, 300)
    assert verdicts(output) == [(TCP, reasons.FUNCTION_TIMEOUT)]
    assert float(support.fields(output, "burnt_ms")[0]["burnt_ms"]) < 100
    assert verdicts(output, "after") == [(SAN, 0)]
    assert "FunctionTimeout" in support.log(table)


@pytest.mark.parametrize("cpus", [1, 2])
def test_who_sleeps_is_woken(tmp_path, cpus):
    """P5: an answer is there when the function is done, not when its time is over; by sleeping as by spinning."""
    table = table_of(tmp_path, "fine", "pauses", defaults="timeout_ms = 10000\n")
    allowed = sorted(os.sched_getaffinity(0))[:cpus]
    for function in 0, 1:
        arguments = ("asks", function, 81 + function, 100)
        output = run(table, EMBEDDED, *arguments, preexec_fn=lambda: os.sched_setaffinity(0, allowed))
        assert verdicts(output) == [(SAN, 0)] * 100
        assert max(float(line["ms"]) for line in support.fields(output, "verdict")) < 5000


def test_spinning_ends_soon(tmp_path):
    """P5: who waits for a question spins for a moment only, and not at all with one CPU: spins of 1 s would show."""
    table = table_of(tmp_path, "fine")
    long_spins = support.host("-DSPIN_NS=1000000000")
    one_cpu = {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})}
    burnt = [
        float(support.fields(run(table, EMBEDDED, "quiet", 0, 81, 3, 0, 300, **options), "burnt_ms")[0]["burnt_ms"])
        for options in ({}, {"program": long_spins, **one_cpu}, {"program": long_spins})
    ]
    assert max(burnt[:2]) < 30
    if len(os.sched_getaffinity(0)) > 1:
        assert burnt[2] > 40, "nothing was shown"


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
    assert "guard=0" in output, "the thread's calls would go by the switch for ever"
    assert verdicts(output, "after") == [(SAN, 0)] * 2


def test_program_ends_with_its_own_last_thread(tmp_path):
    """P5, X8: a program whose main thread leaves by pthread_exit still ends: the function thread goes when idle."""
    output = run(table_of(tmp_path, "fine"), EMBEDDED, "leave-main", timeout=15)
    assert verdicts(output) == [(SAN, 0)]
