"""Compiles libinterposer.so, which is preloaded, and the engine that it loads when it first needs Python.

`python -m interposer.build` builds in place and only what changed; setuptools comes in through `BuildExt`. Both files
get plain names inside the package, because paths to them stand in compiled tables and in environments.
"""

from __future__ import annotations

import compileall
import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "interposer" / "native"
LIBRARY = "libinterposer.so"
ENGINE = "libinterposer-engine.so"
LAUNCHER = ROOT / "interposer" / "launch" / "sanrun.c"

COMPILE_FLAGS = (
    *("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-fno-semantic-interposition"),
    *("-ftls-model=initial-exec", "-Wall", "-Wextra", "-Werror"),
)
LINK_FLAGS = ("-shared", "-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,nodelete", "-Wl,--no-undefined")


# Variadic, or returning twice: shim.c defines them beside the list.
UNLISTED = {"vfork", "execl", "execlp", "execle"}

# Of no use where interposer is installed.
BUILD_MODULES = {("interposer", "build"), ("interposer.policy", "build_engine")}
NEEDED = "interposer is compiled when it is installed: it needs gcc, binutils, and the headers of libc and of Python"
REMEDY = "(Debian: apt install gcc libc6-dev python3-dev)"


class BuildError(BaseError):
    """A compiler or linker is missing or failed, or the exports are not those of hooks.def."""


def native_sources() -> list[Path]:
    return [ROOT / "shim.c", *sorted(NATIVE.glob("*.c"))]


def hook_names() -> set[str]:
    """The only symbols that the library may export: what hooks.def lists, and what cannot be called through a table."""
    text = re.sub(r"/\*.*?\*/", "", (NATIVE / "hooks.def").read_text(), flags=re.DOTALL)
    listed = {match.group(1) for match in re.finditer(r"^HOOK\([^,]*,\s*(\w+)\s*,", text, re.MULTILINE)}
    return listed | UNLISTED


def build_all(package: Path, scratch: Path, *, verbose: bool = True) -> list[Path]:
    """Brings both files in `package` up to date and returns those that exist. Raises BuildError."""
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise BuildError(f"{headers}/Python.h does not exist; {NEEDED} {REMEDY}\n")
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = [_build_library(package / LIBRARY, scratch, verbose)]
        if (ROOT / "interposer" / "policy" / "build_engine.py").exists():
            built.append(_build_engine(package / ENGINE, verbose))
    return built


def _build_library(output: Path, scratch: Path, verbose: bool) -> Path:
    sources = native_sources()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda source: _compile(source, scratch), sources))
    errors = "".join(result.error for result in results)
    if errors:
        raise BuildError(errors)
    objects = [result.output for result in results]
    if not _stale(output, [*objects, NATIVE / "hooks.def", Path(__file__)]):
        return output
    hooks = hook_names()
    exports = scratch / "exports.map"
    exports.write_text("{ global: " + " ".join(f"{name};" for name in sorted(hooks)) + " local: *; };\n")
    fresh = output.with_suffix(f".{os.getpid()}.new")
    try:
        _run(["gcc", *LINK_FLAGS, f"-Wl,--version-script={exports}", "-o", str(fresh), *map(str, objects)])
        _check_exports(fresh, hooks)
        os.replace(fresh, output)  # running programs keep the file that they have mapped
    finally:
        fresh.unlink(missing_ok=True)
    if verbose:
        print(f"built {output}")
    return output


class _Compiled:
    def __init__(self, output: Path, error: str = "") -> None:
        self.output = output
        self.error = error


def _compile(source: Path, scratch: Path) -> _Compiled:
    output = scratch / f"{source.stem}.o"
    listing = output.with_suffix(".d")
    depends = _listed(listing)
    if depends and not _stale(output, [*depends, Path(__file__)]):
        return _Compiled(output)
    command = ["gcc", *COMPILE_FLAGS, f"-I{NATIVE}", "-MMD", "-MF", str(listing), "-c", "-o", str(output), str(source)]
    result = _tool(command)
    if result.returncode:
        output.unlink(missing_ok=True)
    return _Compiled(output, result.stderr if result.returncode else "")


def _listed(listing: Path) -> list[Path]:
    """The files named by a dependency listing of gcc."""
    try:
        text = listing.read_text()
    except FileNotFoundError:
        return []
    return [Path(word) for word in text.partition(":")[2].replace("\\\n", " ").split()]


def _stale(output: Path, inputs: Iterable[Path]) -> bool:
    try:
        made = output.stat().st_mtime_ns
        return any(path.stat().st_mtime_ns >= made for path in inputs)
    except FileNotFoundError:
        return True


def _check_exports(library: Path, hooks: set[str]) -> None:
    listing = _run(["nm", "-D", "--defined-only", "--format=just-symbols", str(library)])
    exported = {line.partition("@")[0] for line in listing.split()}
    if missing := hooks - exported:
        raise BuildError(f"hooks.def lists functions that no file exports: {', '.join(sorted(missing))}\n")
    if extra := exported - hooks:
        raise BuildError(f"exported but not in hooks.def: {', '.join(sorted(extra))}\n")


def _build_engine(output: Path, verbose: bool) -> Path:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = import_module("interposer.policy.build_engine")
    if not _stale(output, [*module.sources(), Path(__file__)]):
        return output
    try:
        module.build(str(output))
    except subprocess.CalledProcessError as error:
        raise BuildError(f"the engine module does not compile:\n{error.stderr}") from None
    os.utime(output)
    if verbose:
        print(f"built {output}")
    return output


def build_launcher(output: Path) -> None:
    """Compiles the command sanrun. Raises BuildError."""
    fresh = output.with_suffix(f".{os.getpid()}.new")
    try:
        _run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(fresh), str(LAUNCHER)])
        os.replace(fresh, output)
    finally:
        fresh.unlink(missing_ok=True)


def refresh_launcher(prefix: Path) -> None:
    """Compiles the command sanrun anew where an editable install put one that is out of date. Raises BuildError."""
    installed = prefix / "bin" / "sanrun"
    if installed.exists() and _stale(installed, [LAUNCHER]):
        build_launcher(installed)
        print(f"built {installed}")


def _tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}; {NEEDED} {REMEDY}\n") from None


def _run(command: Sequence[str]) -> str:
    result = _tool(command)
    if result.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed:\n{result.stderr}")
    return result.stdout


class BuildPy(build_py):
    """Leaves out the modules that only a build needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)  # type: ignore[no-untyped-call]
        return [module for module in found if (package, module[1]) not in BUILD_MODULES]


class BuildExt(build_ext):
    """What setuptools runs for wheels, and for editable installs in place."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "interposer" if in_place else Path(self.build_lib).resolve() / "interposer"
        package.mkdir(parents=True, exist_ok=True)
        build_all(package, ROOT / ".build")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "interposer" / name) for name in (LIBRARY, ENGINE)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        """For the source distribution."""
        files = [*native_sources(), *NATIVE.glob("*.h"), *NATIVE.glob("*.def"), ROOT / "interposer/policy/embed.c"]
        modules = [ROOT / package.replace(".", "/") / f"{name}.py" for package, name in sorted(BUILD_MODULES)]
        return [str(path.relative_to(ROOT)) for path in (*files, *modules, ROOT / "CHANGELOG.md")]


class BuildScripts(Command):
    """Compiles the command sanrun where setuptools expects scripts."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.build_dir = ""
        self.scripts: list[str] = []

    def finalize_options(self) -> None:
        self.build_dir = self.get_finalized_command("build").build_scripts

    def run(self) -> None:
        Path(self.build_dir).mkdir(parents=True, exist_ok=True)
        build_launcher(Path(self.build_dir) / "sanrun")

    def get_source_files(self) -> list[str]:
        return [str(LAUNCHER.relative_to(ROOT))]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_dir) / "sanrun")]


def main() -> int:
    try:
        build_all(ROOT / "interposer", ROOT / ".build")
        if sys.prefix != sys.base_prefix:
            refresh_launcher(Path(sys.prefix))
    except BuildError as error:
        sys.stderr.write(str(error))
        return 1
    # Where PYTHONDONTWRITEBYTECODE is set nothing else would, and every sanrun would compile its modules anew.
    compileall.compile_dir(ROOT / "interposer", quiet=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
