"""The embedded engine: what its start costs, what it leaves alone, and where it must not start."""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path

import engine_support as support
import pytest
from engine_support import EMBEDDED, HELPER, OFF, REACTIVE, SAN, STARTUP, TCP, run, verdicts, write_table

from interposer.launch import libpython
from interposer.policy import reasons

FINE = "def fine(request):\n    return 'unix'\n"
LOUD = """
import sys
print("to stdout at import")
def fine(request):
    import asyncio, signal, subprocess
    print("to stdout")
    sys.stderr.write("to stderr\\n")
    return "unix"
"""
RULE = support.DEFAULTS + "timeout_ms = 5000\n" + support.FIRST.format(port=80, name="fine")


def test_start_is_cheap_and_leaves_no_thread(tmp_path):
    """P1, P8: started when first asked, once: 10 ms and 8 MiB on a quiet machine; no thread stays."""
    table = write_table(tmp_path)
    starts, sizes = [], []
    for _ in range(7):
        (facts,) = support.fields(run(table, REACTIVE, "cost"), "start_ms")
        starts.append(float(facts["cpu_ms"]))
        sizes.append(int(facts["rss_kib"]))
        assert facts["threads"] == "1"
    print(f"engine start: {min(starts):.1f} ms of CPU best of 7, {statistics.median(sizes)} KiB RSS")
    # Of CPU, because the machine may be busy; it takes at most the double there.
    assert min(starts) < 25
    assert statistics.median(sizes) < 10 * 1024


@pytest.mark.parametrize("function", ["-", "0"])
@pytest.mark.parametrize("handler", [[], ["handler"]])
def test_host_is_left_alone(tmp_path, function, handler):
    """P5, O3: descriptors 0-2, locale, environment, directory, signal mask and handlers, threads: all as before."""
    table = write_table(tmp_path, RULE, LOUD)
    environment = {"LC_ALL": "C.UTF-8", "PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere", "HOST_LOG": f"{table}.log"}
    command = [support.host(), table, str(EMBEDDED), "untouched", function, *handler]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert verdicts(result.stdout) == [(SAN, 0)]
    assert "same=1" in result.stdout, result.stdout
    assert "to std" not in result.stdout and result.stderr == ""
    if function == "0":
        for line in ("to stdout at import", "to stdout", "to stderr"):
            assert line in support.log(table)


def test_closed_descriptors_stay_closed(tmp_path):
    """O3, T11: a host without descriptors 0-2 gets none from the engine, and no Python output lands in its files."""
    table = write_table(tmp_path, RULE, LOUD)
    output = tmp_path / "out"
    script = f'exec <&- 2>&- >"{output}"; exec {support.host()} {table} {EMBEDDED} untouched 0'
    subprocess.run(["sh", "-c", script], timeout=60, check=True)
    assert "same=1" in output.read_text()
    assert "to std" not in output.read_text()


def test_small_stack(tmp_path):
    """P8, O1: with little stack left Python is not entered; the next thread with more is served."""
    output = run(write_table(tmp_path), REACTIVE, "small-stack")
    assert verdicts(output, "small") == [(TCP, reasons.ENGINE_STACK)]
    assert verdicts(output, "large") == [(SAN, 0)]


def test_sandbox(tmp_path):
    """P8, O1: under a seccomp filter nothing is started; started before it, the engine serves on, later too, and lives
    with a function that takes too long."""
    table = write_table(tmp_path, RULE, FINE)
    assert verdicts(run(table, EMBEDDED, "sandbox", 0, 80)) == [(TCP, reasons.ENGINE_SANDBOX)]
    assert verdicts(run(table, STARTUP, "startup", 0, 80, 3, 1100)) == [(SAN, 0)] * 3
    assert verdicts(run(table, STARTUP, "startup", "-", 80)) == [(SAN, 0)]
    pauses = FINE.replace("return", "import time; time.sleep(0.1); return")
    slow = write_table(tmp_path, RULE.replace("5000", "20"), pauses)
    assert verdicts(run(slow, STARTUP, "startup", 0, 80)) == [(TCP, reasons.FUNCTION_TIMEOUT)]


def test_python_host(tmp_path):
    """P8, O1: beside another Python none is started."""
    output = run(write_table(tmp_path, RULE, FINE), EMBEDDED, "python", libpython.find(), 0, 80)
    assert verdicts(output) == [(TCP, reasons.ENGINE_PYTHON_HOST)]
    assert "engine=3" in output


def test_host_that_ends_python(tmp_path):
    """P8: a host that loads the engine's libpython later, and uses it as one that may be there already, lives on even
    when it ends it; then there is no engine. (Others need `engine = "helper"`.)"""
    output = run(write_table(tmp_path, RULE, FINE), EMBEDDED, "late", libpython.find())
    assert verdicts(output, "before") == [(SAN, 0)]
    assert "python=0 end=0" in output
    assert verdicts(output, "after") == [(TCP, reasons.ENGINE_FAILED)] * 2
    assert verdicts(output, "child") == [(TCP, reasons.ENGINE_FAILED)]


@pytest.mark.parametrize("engine, reason", [(OFF, reasons.ENGINE_OFF), (HELPER, reasons.ENGINE_NO_HELPER)])
def test_engine_settings(tmp_path, engine, reason):
    """P8, O1: `off` and `helper` start no Python in the program."""
    output = run(write_table(tmp_path, RULE, FINE), engine, "asks", 0, 80)
    assert verdicts(output) == [(TCP, reason)]
    assert "engine=0" in output


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"library": "/nowhere/libpython3.so"}, reasons.ENGINE_NO_LIBPYTHON),
        ({"library": ""}, reasons.ENGINE_NO_LIBPYTHON),
        ({"library": "libpython3.11.so.1.0"}, reasons.ENGINE_NO_LIBPYTHON),
        ({"search_path": ["/nowhere"]}, reasons.ENGINE_FAILED),
        ({"engine_module": Path("/nowhere/engine.so")}, reasons.ENGINE_FAILED),
        ({"search_path": libpython.search_path()[:1]}, reasons.ENGINE_FAILED),
    ],
)
def test_what_is_missing_is_a_reason(tmp_path, changes, reason):
    """P5, O1, O3, X3: without libpython, standard library, module or cffi the answer is TCP, and nothing is printed."""
    table = write_table(tmp_path, RULE, FINE, **changes)
    assert verdicts(run(table, EMBEDDED, "asks", 0, 80, 2)) == [(TCP, reason)] * 2
    assert "engine: " in support.log(table)


def test_many_first_asks_at_once(tmp_path):
    """T13: threads that ask at the same time start one engine, and all are answered."""
    assert "good=12" in run(write_table(tmp_path, RULE.replace(":80", ":79"), FINE), EMBEDDED, "at-once", 12)


def test_imports_of_the_engine(tmp_path):
    """P1: the engine in a program imports only cheap modules; the list is here to be kept short. None of its own, and
    none that Python needs to start, is read from a file."""
    spy = """
import sys
for name, module in sorted(sys.modules.items()):
    print("module", name, module.__spec__.origin if module.__spec__ else "made")
def fine(request):
    return "unix"
"""
    table = write_table(tmp_path, RULE, spy)
    assert verdicts(run(table, EMBEDDED, "asks", 0, 80)) == [(SAN, 0)]
    lines = [line.partition(" module ")[2].split(None, 1) for line in support.log(table).splitlines()]
    modules = {words[0]: words[1] for words in lines if words}
    needed = {"abc", "codecs", "encodings", "io", "marshal", "posix", "sys", "builtins", "time", "zipimport", "winreg"}
    theirs = {name for name in modules if name.startswith(("encodings.", "_"))} | needed
    ours = {name for name in modules if name.partition(".")[0] == "interposer"}
    assert modules.keys() - theirs - ours == {"struct", "site_policy"}, "what the interpreter does not need itself"
    read = {name for name, origin in modules.items() if origin not in ("frozen", "built-in", "made")}
    assert read - {"_struct", "_interposer"} == {"_cffi_backend", "site_policy"}
    assert {"interposer.policy.entry", "interposer.policy.functions", "encodings.utf_8"} <= modules.keys() - read
