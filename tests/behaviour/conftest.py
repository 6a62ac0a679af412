"""What the tests of the switch's behaviour share: a world of puppets in which both sides have the switch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from world import PAIRINGS, World


@pytest.fixture(params=[pairing for pairing in PAIRINGS if pairing.san], ids=lambda pairing: pairing.name)
def san(request: pytest.FixtureRequest) -> Iterator[World]:
    """Both sides on the SAN; at the end nothing was written to standard descriptors and no name is left."""
    world = World(request.param)
    yield world
    world.close()
