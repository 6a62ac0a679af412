"""The calls that move data, as tests/hosts/messages_walk.c makes them: on TCP and on the SAN the same."""

from __future__ import annotations

from functools import cache

import pytest
from walks import walk

PARTS = [
    "sending",
    "receiving",
    "told",
    "urgency",
    "fast open",
    "files",
    "pointers",
    "resets",
    "cancelled",
]


@cache
def part(name: str, switched: bool) -> list[str]:
    lines = walk("messages_walk", switched=switched)[0]
    first = lines.index(f"-- {name}") + 1
    return lines[first : next((i for i in range(first, len(lines)) if lines[i].startswith("-- ")), len(lines))]


@pytest.mark.parametrize("name", PARTS)
def test_every_call_is_tcps(name: str) -> None:
    """T7, T9, T12: results, errno (on success untouched), headers and signals. Addresses, lengths, vectors and control
    messages of any kind; what TCP tells its readers; urgent data, SIGURG; MSG_FASTOPEN; sendfile, splice, tee, preadv2;
    pointers to no memory in every call; resets, by every way to notice them; threads that are cancelled in a call."""
    tcp, san = part(name, False), part(name, True)
    assert len(tcp) > 5
    found = [
        f"{i}: {got}, by TCP {wanted}" for i, (wanted, got) in enumerate(zip(tcp, san, strict=False)) if wanted != got
    ]
    assert not found and len(tcp) == len(san), "\n".join([f"{len(tcp)} and {len(san)} lines", *found[:40]])


def test_the_walk_was_on_the_san() -> None:
    """T7: all of its connections, and none of TCP's."""
    assert walk("messages_walk", switched=False)[1] == 0
    assert walk("messages_walk", switched=True)[1] > 40
