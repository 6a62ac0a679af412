"""What users' functions may import and do inside a strange process."""

from __future__ import annotations

import subprocess
import sys

import engine_support as support
import pytest
from engine_support import EMBEDDED, REACTIVE, SAN, TCP, run, verdicts, write_table

from interposer.policy import guard, reasons

RULE = support.DEFAULTS + "timeout_ms = 10000\n" + support.FIRST.format(port=80, name="decide")
REFUSED = sorted(name for name in sys.stdlib_module_names if name[0] != "_" and name not in guard.ALLOWED)


def log_of(tmp_path, text: str, *scenario: object, engine: int = EMBEDDED) -> tuple[str, str]:
    """What the host printed and what was logged, with `text` as the function's module."""
    table = write_table(tmp_path, RULE, text)
    return run(table, engine, *(scenario or ("asks", 0, 80)), timeout=100), support.log(table)


def test_what_is_allowed_leaves_the_program_alone(tmp_path):
    """P5: all allowed modules that this Python has, imported in one program: its descriptors, signals, locale,
    environment, threads and stacks are as before."""
    check = "import importlib, sys\nfor name in sys.argv[1:]:\n    try: importlib.import_module(name)\n"
    check += "    except ImportError: continue\n    print(name)\n"
    command = [sys.executable, "-c", check, *sorted(guard.ALLOWED)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(there) > 120
    text = "import importlib\ndef decide(request):\n"
    text += f"    for name in {there!r}:\n        importlib.import_module(name)\n    return 'unix'\n"
    output, log = log_of(tmp_path, text, "untouched", 0)
    assert verdicts(output) == [(SAN, 0)], log
    assert "same=1" in output, output


def test_what_is_not_allowed_cannot_be_imported(tmp_path):
    """P5: ImportError, whatever the name, the form of the import, and however deep; the function may live with it."""
    text = "import importlib\ndef decide(request):\n"
    text += f"    for name in {REFUSED!r} + ['_ctypes', '_tkinter', '_multiprocessing', '_xxsubinterpreters']:\n"
    text += "        try:\n            importlib.import_module(name)\n        except ImportError as error:\n"
    text += "            assert error.name == name, error\n        else:\n            raise AssertionError(name)\n"
    text += "    try:\n        import concurrent.futures.process\n    except ImportError:\n        return 'unix'\n"
    output, log = log_of(tmp_path, text)
    assert verdicts(output) == [(SAN, 0)], log
    assert {"ctypes", "faulthandler", "multiprocessing", "readline", "resource", "tkinter"} <= set(REFUSED)


@pytest.mark.parametrize("engine", [EMBEDDED, REACTIVE])
@pytest.mark.parametrize(
    "text, reason",
    [
        ("import multiprocessing\ndef decide(request):\n    return 'unix'\n", reasons.FUNCTION_MISSING),
        ("def decide(request):\n    import ctypes\n    return 'unix'\n", reasons.FUNCTION_RAISED),
    ],
)
def test_forbidden_imports_are_a_reason(tmp_path, engine, text, reason):
    """P5, O1: a module that imports what it may not cannot be had, a function that does has raised; the log says so."""
    output, log = log_of(tmp_path, text, "asks", "-" if engine == REACTIVE else 0, 80, 2, engine=engine)
    assert verdicts(output) == [(TCP, reason)] * 2
    assert "is not for policy functions" in log and "ModuleNotFoundError" in log


BODIES = {
    "import threading; threading.Thread(target=print).start()": "RuntimeError",
    "import _thread; _thread.start_new_thread(print, ())": "RuntimeError",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)": "ValueError",
    "import signal; signal.setitimer(signal.ITIMER_REAL, 0.01)": "ValueError",
    "import signal; signal.alarm(1)": "ValueError",
    "import signal; signal.pthread_sigmask(signal.SIG_SETMASK, [])": "ValueError",
    "import locale; locale.setlocale(locale.LC_ALL, 'C')": "Error",
    "import os; os.chdir('/')": "PermissionError",
    "import os; os.environ['HOME'] = '/nowhere'": "PermissionError",
    "import os; os._exit(3)": "PermissionError",
    "import os; os.abort()": "PermissionError",
    "import os; os.execv('/bin/true', ['true'])": "PermissionError",
    "import os; os.umask(0)": "PermissionError",
    "import os; os.setuid(1)": "PermissionError",
    "import sys; sys.exit(3)": "SystemExit",
}


@pytest.mark.parametrize("handler", [[], ["handler"]])
def test_the_program_is_not_the_functions(tmp_path, handler):
    """P5: threads, signals, locale, directory, environment, user and end of the program are not the function's."""
    text = f"def decide(request):\n    for body, wanted in {BODIES!r}.items():\n"
    text += "        try:\n            exec(body, {})\n        except BaseException as error:\n"
    text += "            assert type(error).__name__ == wanted, (body, error)\n"
    text += "        else:\n            raise AssertionError(body)\n    return 'unix'\n"
    output, log = log_of(tmp_path, text, "untouched", 0, *handler)
    assert verdicts(output) == [(SAN, 0)], log
    assert "same=1" in output, output


def test_what_functions_commonly_do_works(tmp_path):
    """P5: an event loop, a child process, the locale's name and a name lookup, without a trace in the program."""
    text = """
import asyncio, locale, logging, os, random, socket, subprocess
os.register_at_fork(before=lambda: print("before fork"))
def decide(request):
    assert asyncio.run(asyncio.sleep(0, 7)) == 7
    assert subprocess.run(["echo", "word"], capture_output=True).stdout == b"word\\n"
    assert subprocess.run(["true"], cwd="/", preexec_fn=lambda: os.umask(7)).returncode == 0
    assert locale.setlocale(locale.LC_ALL)
    assert socket.getaddrinfo("127.0.0.1", 80)
    logging.getLogger().warning("a word %s", random.random())
    return "unix"
"""
    output, log = log_of(tmp_path, text, "untouched", 0)
    assert verdicts(output) == [(SAN, 0)], log
    assert "same=1" in output, output
    assert "a word" in log and "before fork" not in log
