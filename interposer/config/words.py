"""The nearest valid word, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word that a misspelt one probably meant, None where none is near."""
    words = list(valid)
    found = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return found[0] if found else None


def quoted(words: Iterable[str]) -> str:
    """`"a", "b" or "c"`."""
    listed = [f'"{word}"' for word in words]
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " or " + listed[-1]
