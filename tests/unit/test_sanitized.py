"""The native code linked into a program, under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import subprocess

import pytest
from build_c import SANITIZER_OPTIONS, switch_host
from puppet import switched_environment

SANITIZERS = ("address", "thread")


def passes(sanitizer: str, what: str) -> None:
    # provider_unix.c is included by the host
    program = switch_host("switch_host", sanitizer, ("switch_host.c",), without=("provider_unix.c",))
    environment = {name: value for name, value in switched_environment().items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        [program, what], env={**environment, **SANITIZER_OPTIONS}, capture_output=True, text=True, timeout=60
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
