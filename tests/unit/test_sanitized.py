"""The native code linked into a program, under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from puppet import HOSTS, ROOT, switched_environment

NATIVE = ROOT / "interposer" / "native"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
}


@cache
def host(sanitizer: str) -> Path:
    """switch_host.c and all native sources, compiled again only when one has changed."""
    sources = [HOSTS / "switch_host.c", ROOT / "shim.c"]
    sources += [path for path in sorted(NATIVE.glob("*.c")) if path.name != "provider_unix.c"]
    newest = max(path.stat().st_mtime_ns for path in [*sources, *NATIVE.iterdir()])
    place = ROOT / ".build" / "hosts" / sanitizer
    place.mkdir(parents=True, exist_ok=True)
    output = place / "switch_host"
    if output.exists() and output.stat().st_mtime_ns > newest:
        return output
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer"]
    flags += [f"-fsanitize={SANITIZERS[sanitizer]}", f"-I{ROOT}", f"-I{NATIVE}"]

    def compile_one(source: Path) -> Path:
        target = place / f"{source.stem}.{os.getpid()}.o"
        run = subprocess.run(["gcc", *flags, "-c", "-o", target, source], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    fresh = output.with_suffix(f".{os.getpid()}")
    link = ["gcc", f"-fsanitize={SANITIZERS[sanitizer]}", "-rdynamic", "-pthread", "-o", fresh, *objects]
    run = subprocess.run(link, capture_output=True, text=True, timeout=120)
    for path in objects:
        path.unlink()
    assert run.returncode == 0, run.stderr
    fresh.rename(output)
    return output


def passes(sanitizer: str, what: str) -> None:
    environment = {name: value for name, value in switched_environment().items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        [host(sanitizer), what], env={**environment, **OPTIONS}, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr[-6000:]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_pool(sanitizer: str) -> None:
    """T13: four threads take and give items: each has one owner, and all are used again."""
    passes(sanitizer, "pool")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_handles(sanitizer: str) -> None:
    """S10: stale and foreign handles are errors, never crashes, under threads too."""
    passes(sanitizer, "handles")


def test_names() -> None:
    """X2, X4: names in the kernel, ours and hostile ones: what is taken is what we would have written."""
    passes("address", "names")


def test_endpoints() -> None:
    """S26: addresses as text and as socket addresses, cut and whole."""
    passes("address", "endpoints")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_stress(sanitizer: str) -> None:
    """T9, T13: threads connect, accept, duplicate, use and close the same descriptors under each other's hands."""
    passes(sanitizer, "stress")


def test_forks() -> None:
    """T4, T13: a threaded program forks, and its children connect."""
    passes("address", "forks")
