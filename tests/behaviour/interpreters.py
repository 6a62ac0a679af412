"""The CPythons of this machine: Debian's, and those on PATH, in a pyenv, in /usr/local and in /opt."""

from __future__ import annotations

import glob
import os
import subprocess
from functools import cache

from interposer.launch import libpython

DEBIANS = "/usr/bin/python3"
VERSIONS = ("2.7", *(f"3.{minor}" for minor in range(6, 16)))
"""Those that are looked for."""
ASK = """\
import sys, platform
print(' '.join([platform.python_implementation(), '%d.%d' % sys.version_info[:2], sys.executable]))
"""


def _candidates() -> list[str]:
    home = os.environ.get("HOME", "/")
    pyenv = os.environ.get("PYENV_ROOT", f"{home}/.pyenv")
    places = [DEBIANS, f"{pyenv}/versions/*/bin/python", f"{home}/.pyenv/versions/*/bin/python"]
    directories = [*os.environ.get("PATH", "").split(":"), "/usr/local/bin", "/opt/*/bin", "/usr/local/*/bin"]
    places += [f"{directory}/python{version}" for directory in directories for version in VERSIONS]
    return [path for place in places for path in sorted(glob.glob(place))]


@cache
def interpreters() -> dict[str, str]:
    """One interpreter for each version that there is; Debian's stands for its own."""
    found: dict[str, str] = {}
    seen = set()
    for path in _candidates():
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            answer = subprocess.run([path, "-c", ASK], capture_output=True, text=True, timeout=20, check=True)
            name, version, executable = answer.stdout.split()
        except (OSError, ValueError, subprocess.SubprocessError):
            continue  # a shim of a version that is not installed
        if name == "CPython" and version in VERSIONS:
            found.setdefault(version, executable)
    return found


@cache
def libpythons() -> list[str]:
    """The shared libraries: Debian's, and those beside the other interpreters."""
    found = [libpython.find()]
    for executable in interpreters().values():
        beside = f"{os.path.dirname(os.path.dirname(executable))}/lib/libpython3*.so.1.0"
        found += [path for path in sorted(glob.glob(beside)) if path not in found]
    return [path for path in found if path]
