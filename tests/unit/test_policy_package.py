"""What interposer.policy loads into other people's processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Each of these costs milliseconds, or (signal) takes something over from the host.
HEAVY = {"re", "json", "dataclasses", "typing", "enum", "collections", "tomllib", "inspect", "signal", "ipaddress"}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True, text=True, timeout=20, cwd=ROOT, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_engine_imports_nothing_heavy() -> None:
    """P1, P5: Table, engine, reasons, Request and Decision stay with struct-like modules."""
    loaded = modules_after(
        "import interposer.policy.engine, interposer.policy.reasons\n"
        "from interposer.policy import Decision, Option, Process, Request\n"
        "request = Request('listen', 'v4', ('127.0.0.1', 80), None, Process(interposer.policy.engine.Facts()), 'x')\n"
        "Decision('unix', remember=1, send_buffer=1), Option(6, 1, bytes(4)), request.options, request.role"
    )
    assert not HEAVY & loaded
    assert {name for name in loaded if name.startswith("interposer")} <= {
        "interposer", "interposer.policy", "interposer.policy.engine", "interposer.policy.reasons",
        "interposer.policy.request", "interposer.policy.table",
    }  # fmt: skip


def test_the_package_alone_loads_nothing() -> None:
    """P1: Importing the package loads none of its modules."""
    assert not {name for name in modules_after("import interposer.policy") if name.startswith("interposer.policy.")}
