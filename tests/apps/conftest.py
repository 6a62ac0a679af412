"""Fixtures: programs to start, files to serve, and the check that nothing is left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "tools")]

import looks  # noqa: E402
import programs  # noqa: E402
from app_policies import POLICIES  # noqa: E402
from programs import Policy, Programs  # noqa: E402


@pytest.fixture(scope="session")
def everything() -> Iterator[Programs]:
    started = Programs(looks.SWITCH)
    yield started
    started.close()
    started.remove()


@pytest.fixture
def apps(everything: Programs) -> Iterator[Programs]:
    """X5: after each test nothing that it started is alive, nor any abstract name of its ports."""
    yield everything
    assert everything.close() == []


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest, everything: Programs) -> Policy:
    return everything.policy(request.param, *POLICIES[request.param])


@pytest.fixture(scope="session")
def plain(everything: Programs) -> Policy:
    """The policy without code."""
    return everything.policy("plain", *POLICIES["plain"])


@pytest.fixture(scope="session")
def site(everything: Programs) -> Path:
    """A directory to serve: `small`, `megabyte`, and `large`, which no socket buffers hold."""
    directory = everything.directory / "site"
    directory.mkdir()
    (directory / "small").write_bytes(b"small\n" * 100)
    (directory / "megabyte").write_bytes(os.urandom(1 << 20))
    (directory / "large").write_bytes(os.urandom(programs.HOLD_SIZE))
    return directory
