"""Interpreters of this machine, a copy of the tree, and installations in virtual environments of their own."""

from __future__ import annotations

import atexit
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "/usr/bin/python3"
RUNTIME = tempfile.mkdtemp(prefix="interposer-run-")
atexit.register(shutil.rmtree, RUNTIME, ignore_errors=True)
KNOWN = ((3, 11), (3, 12), (3, 13), (3, 14))
"""Versions that are looked for; newer ones count when they are found."""
FACTS = "import json, sys; print(json.dumps([sys.version_info[:3], sys.base_prefix]))"
with (ROOT / "pyproject.toml").open("rb") as _file:
    _PROJECT = tomllib.load(_file)
BUILD_REQUIREMENTS: list[str] = _PROJECT["build-system"]["requires"]
DEPENDENCIES: list[str] = _PROJECT["project"]["dependencies"]


def environment() -> dict[str, str]:
    """Of the caller, without what would steer Python or the switch."""
    steers = ("INTERPOSER", "PYTHON", "VIRTUAL_ENV", "LD_PRELOAD", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steers)}
    return kept | {"XDG_RUNTIME_DIR": RUNTIME, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LC_ALL": "C.UTF-8"}


def run(
    words: Sequence[str | Path], *, status: int = 0, variables: Mapping[str, str] | None = None, cwd: str | Path = "/"
) -> str:
    """What the command printed, stderr too."""
    result = subprocess.run(
        [str(word) for word in words], env={**environment(), **(variables or {})}, cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == status, f"{words}: status {result.returncode}\n{result.stdout[-6000:]}"
    return result.stdout


@dataclass(frozen=True)
class Interpreter:
    version: tuple[int, int, int]
    path: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))} {self.path}"


def _candidates() -> list[str]:
    homes = {os.environ.get("PYENV_ROOT", ""), os.path.expanduser("~/.pyenv")} - {""}
    places = [*(f"{home}/versions/*/bin" for home in sorted(homes)), "/usr/local/bin", "/opt/*/bin",
              *os.environ.get("PATH", "").split(":")]
    names = [f"{place}/python3.[0-9]*" for place in places if place]
    found = [path for name in names for path in sorted(glob.glob(name)) if path.rpartition(".")[2].isdigit()]
    return [DEBIAN, *found]


def interpreters() -> list[Interpreter]:
    """Debian's, and each other one of 3.11 or newer, once for each version and prefix."""
    found: dict[tuple[str, str], Interpreter] = {}
    for path in dict.fromkeys(_candidates()):
        try:
            said = subprocess.run([path, "-c", FACTS], capture_output=True, text=True, timeout=30, check=True).stdout
            version, prefix = json.loads(said)
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        if version >= [3, 11] and f"{sys.prefix}/" not in f"{path}/":
            found.setdefault((str(version), prefix), Interpreter((version[0], version[1], version[2]), path))
    return list(found.values())


def copy_of_the_tree(to: Path) -> Path:
    """The files of the working tree that git knows or would take."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    python: str
    place: Path

    def __post_init__(self) -> None:
        run([self.python, "-m", "venv", self.place])

    def command(self, name: str) -> Path:
        return self.place / "bin" / name

    def pip(self, *words: str | Path, status: int = 0, **variables: str) -> str:
        return run([self.command("python3"), "-m", "pip", *words], status=status, variables=variables)

    def files(self) -> set[str]:
        """All files, but not what Python compiled while it ran."""
        return {str(path.relative_to(self.place)) for path in self.place.rglob("*")
                if "__pycache__" not in path.parts}

    @cached_property
    def libpython(self) -> str:
        """What the launcher would find."""
        code = "from interposer.launch import libpython; print(libpython.find())"
        return run([self.command("python3"), "-c", code]).strip()


    def package(self) -> Path:
        (found,) = self.place.glob("lib/python3*/site-packages/interposer")
        return found


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def needed(library: Path) -> set[str]:
    """The libraries that it links."""
    lines = run(["readelf", "-dW", library]).splitlines()
    return {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}


def needed_python(library: Path) -> set[str]:
    return {name for name in needed(library) if "python" in name}
