"""What the tests of the switch's behaviour share: a world of puppets in which both sides have the switch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import policy_world
import pytest
from awkward import Lab
from world import PAIRINGS, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[policy_world.World]:
    """Python programs under a policy file."""
    made = policy_world.World(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=[pairing for pairing in PAIRINGS if pairing.san], ids=lambda pairing: pairing.name)
def san(request: pytest.FixtureRequest) -> Iterator[World]:
    """Both sides on the SAN; at the end nothing was written to standard descriptors and no name is left."""
    world = World(request.param)
    yield world
    world.close()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Where awkward programs run, with a server for them."""
    made = Lab()
    yield made
    made.close()
