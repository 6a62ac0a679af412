"""The run-time directory and the files in it."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from interposer.launch import runtime

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def environment(place: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(place)}


def test_made_on_first_use(tmp_path: Path) -> None:
    """X3: readable by all, because a child may run as another user, writable by its owner only."""
    path = Path(runtime.directory(environment(tmp_path)))
    assert path == tmp_path / "interposer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert runtime.directory(environment(tmp_path)) == str(path)


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    """X3: nobody chooses for us where files go."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "interposer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(runtime.Refused, match="symbolic link; remove it"):
        runtime.directory(environment(tmp_path))


def test_file_in_its_place_is_refused(tmp_path: Path) -> None:
    """X3: with a remedy, not a traceback."""
    (tmp_path / "interposer").touch()
    with pytest.raises(runtime.Refused, match="not a directory; remove it"):
        runtime.directory(environment(tmp_path))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_writable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    """X3: others could replace a table."""
    (tmp_path / "interposer").mkdir()
    (tmp_path / "interposer").chmod(mode)
    with pytest.raises(runtime.Refused, match="chmod go-w"):
        runtime.directory(environment(tmp_path))


@ROOT_ONLY
def test_owned_by_another_user_is_refused(tmp_path: Path) -> None:
    """X3: its owner could replace a table."""
    (tmp_path / "interposer").mkdir()
    os.chown(tmp_path / "interposer", 1, 1)
    with pytest.raises(runtime.Refused, match="belongs to user 1"):
        runtime.directory(environment(tmp_path))


@ROOT_ONLY
def test_another_users_base_is_passed_by(tmp_path: Path) -> None:
    """X3: after su, XDG_RUNTIME_DIR may still be the other user's."""
    os.chown(tmp_path, 1, 1)
    assert not runtime.directory(environment(tmp_path)).startswith(str(tmp_path))


def test_missing_base_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """X3: the message names the variable."""
    with pytest.raises(runtime.Refused, match="XDG_RUNTIME_DIR"):
        runtime.directory(environment(tmp_path / "absent"))


def test_relative_base_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X3: nothing is read by a relative path."""
    monkeypatch.chdir(tmp_path)
    assert runtime.directory({"XDG_RUNTIME_DIR": "here"}).startswith("/")
    assert list(tmp_path.iterdir()) == []


def test_write_replaces_at_once_and_read_gives_it_back(tmp_path: Path) -> None:
    """X3: the file is for all to read and for us to write, whatever the umask."""
    path = str(tmp_path / "table-1")
    before = os.umask(0o077)
    try:
        runtime.write(path, b"old")
        inode = os.stat(path).st_ino
        runtime.write(path, b"new")
    finally:
        os.umask(before)
    assert runtime.read(path) == b"new"
    assert os.stat(path).st_ino != inode
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert os.listdir(tmp_path) == ["table-1"]


def test_hostile_files_are_not_read(tmp_path: Path) -> None:
    """X3: a link, or a file that others can write, counts as missing."""
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert runtime.read(str(tmp_path / "link")) is None
    assert runtime.read(str(tmp_path / "absent")) is None
    (tmp_path / "real").chmod(0o666)
    assert runtime.read(str(tmp_path / "real")) is None


def test_what_a_killed_writer_left_is_reclaimed(tmp_path: Path) -> None:
    """X5: the next write removes it, and leaves a living writer's alone."""
    child = subprocess.Popen(["true"])
    child.wait(timeout=10)
    dead, alive = tmp_path / f"table-1.{child.pid}.new", tmp_path / "table-1.1.new"
    ours = tmp_path / f"table-2.{os.getpid()}.new"
    strange = [tmp_path / f"x.{word}.new" for word in ("²", "٣", "9" * 40, "")]
    for path in (dead, alive, ours, *strange):
        path.touch()
    runtime.write(str(tmp_path / "table-2"), b"x")
    assert not dead.exists()
    assert not ours.exists()
    assert alive.exists()
    assert all(path.exists() for path in strange)


def test_full_disk_is_told_with_a_remedy(tmp_path: Path) -> None:
    """X6: no traceback where the table cannot be written."""
    with pytest.raises(runtime.Refused, match="XDG_RUNTIME_DIR"):
        runtime.write(str(tmp_path / "absent" / "table"), b"x")
