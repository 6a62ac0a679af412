"""Compiles small C programs against interposer/native for the tests of its parts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "interposer" / "native"
HOSTS = ROOT / "tests" / "hosts"
SANITIZERS = {"plain": "", "address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread -Wno-tsan"}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
}


def compile_c(output: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compiles and links `sources`, hosts/ and native/ being on the include path; fails the test with gcc's words."""
    command = ["gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", *flags]
    done = subprocess.run(
        [*command, "-o", str(output), *map(str, sources), "-lpthread"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return output


def _object(source: Path, place: Path, newest_header: int, flags: Sequence[str]) -> Path:
    """A source compiled, unless that was done since it or a header changed."""
    target = place / f"{source.stem}.o"
    if target.exists() and target.stat().st_mtime_ns > max(newest_header, source.stat().st_mtime_ns):
        return target
    fresh = place / f"{source.stem}.{os.getpid()}.o"
    run = subprocess.run(["gcc", *flags, "-c", "-o", fresh, source], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return fresh.rename(target)


@cache
def switch_host(
    name: str, sanitizer: str, hosts: tuple[str, ...], without: tuple[str, ...] = (), wrapped: tuple[str, ...] = ()
) -> Path:
    """The program `name` of sources in hosts/ and the whole switch but the sources `without`.

    Its own symbols are the hooks, so its socket calls go through the switch. Calls of the functions `wrapped` go to
    __wrap_ ones.
    """
    place = ROOT / ".build" / "hosts" / sanitizer
    place.mkdir(parents=True, exist_ok=True)
    sources = [*(HOSTS / host for host in hosts), ROOT / "shim.c"]
    sources += [path for path in sorted(NATIVE.glob("*.c")) if path.name not in without]
    headers = [*NATIVE.glob("*.h"), *NATIVE.glob("*.def"), *HOSTS.glob("*.h"), *(NATIVE / path for path in without)]
    newest = max(path.stat().st_mtime_ns for path in headers)
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"]
    flags += [f"-I{ROOT}", f"-I{NATIVE}", *SANITIZERS[sanitizer].split()]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, place, newest, flags), sources))
    output = place / name
    fresh = place / f"{name}.{os.getpid()}"
    link = ["gcc", *SANITIZERS[sanitizer].split(), "-rdynamic", "-pthread", "-o", fresh, *objects]
    link += [f"-Wl,--wrap={function}" for function in wrapped]
    run = subprocess.run(link, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return fresh.rename(output)
