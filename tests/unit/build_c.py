"""Compiles small C programs against interposer/native for the tests of its parts."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "interposer" / "native"
HOSTS = ROOT / "tests" / "hosts"


def compile_c(output: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compiles and links `sources`, hosts/ and native/ being on the include path; fails the test with gcc's words."""
    command = ["gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", *flags]
    done = subprocess.run(
        [*command, "-o", str(output), *map(str, sources), "-lpthread"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return output
