"""What tools/build brings up to date."""

from __future__ import annotations

import os
from pathlib import Path

from interposer import build


def test_installed_launcher_follows_its_source(tmp_path: Path) -> None:
    """O4: made anew where it is older than sanrun.c, left alone where it is newer, and not made where none was."""
    build.refresh_launcher(tmp_path)
    assert list(tmp_path.iterdir()) == []
    installed = tmp_path / "bin" / "sanrun"
    installed.parent.mkdir()
    installed.touch()
    build.refresh_launcher(tmp_path)
    assert installed.read_bytes() == b""
    os.utime(installed, (1, 1))
    build.refresh_launcher(tmp_path)
    assert installed.read_bytes().startswith(b"\x7fELF")
    assert os.access(installed, os.X_OK)
    assert list(installed.parent.iterdir()) == [installed]
