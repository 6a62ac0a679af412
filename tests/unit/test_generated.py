"""The documentation that comes from declarations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import generate  # noqa: E402


def test_readme_is_current() -> None:
    """O1: every reason code, hook and socket option stands in the README as it is declared."""
    done = subprocess.run([ROOT / "tools" / "generate", "--check"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_stale_part_is_noticed() -> None:
    """O1: a part that somebody edited by hand is made anew."""
    stale = "a\n<!-- generated: hooks -->\nold\n<!-- end -->\nb\n"
    fresh = generate.generate(stale)
    assert "`connect`" in fresh
    assert "old" not in fresh
    assert generate.generate(fresh) == fresh
