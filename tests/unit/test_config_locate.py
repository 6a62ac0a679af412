"""Where policy files are looked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interposer import config
from interposer.config import locate as locate_module
from interposer.config.locate import at, find, locate, stamp


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locate_module, "SYSTEM_FILE", str(tmp_path / "etc" / "interposer" / "policy.toml"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def put(path: Path, text: str = "version = 1\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)
    return str(path)


def test_order(home: Path) -> None:
    """P4: --policy, then $INTERPOSER_POLICY, $XDG_CONFIG_HOME, ~/.config, /etc; the first wins."""
    environ = {"HOME": str(home / "me")}
    assert locate(None, environ) == []
    system = put(home / "etc" / "interposer" / "policy.toml")
    assert locate(None, environ) == [system]
    dot_config = put(home / "me" / ".config" / "interposer" / "policy.toml")
    assert locate(None, environ) == [dot_config]
    xdg = put(home / "xdg" / "interposer" / "policy.toml")
    environ["XDG_CONFIG_HOME"] = str(home / "xdg")
    assert locate(None, environ) == [xdg]
    named = put(home / "named.toml")
    environ["INTERPOSER_POLICY"] = named
    assert locate(None, environ) == [named]
    option = put(home / "option.toml")
    assert locate(option, environ) == [option]
    # An empty variable is as good as none.
    assert locate(None, {**environ, "INTERPOSER_POLICY": ""}) == [xdg]


def test_working_directory_is_never_searched(home: Path) -> None:
    """P4, X3: A policy.toml in the working directory is not found, not through relative variables either."""
    put(home / "work" / "policy.toml")
    put(home / "work" / "interposer" / "policy.toml")
    put(home / "work" / ".config" / "interposer" / "policy.toml")
    for environ in ({}, {"HOME": ""}, {"HOME": "."}, {"XDG_CONFIG_HOME": "."}, {"XDG_CONFIG_HOME": ""}):
        assert locate(None, {"HOME": str(home / "nobody"), **environ}) == []
    with pytest.raises(config.PolicyError, match="not an absolute path"):
        locate(None, {"INTERPOSER_POLICY": "policy.toml"})
    # What the user typed is his own word.
    assert locate("policy.toml", {}) == [str(home / "work" / "policy.toml")]


def test_drop_ins(home: Path) -> None:
    """P4: policy.d/*.toml beside the file follow it, sorted; without the file they stand alone."""
    base = home / "xdg" / "interposer"
    environ = {"XDG_CONFIG_HOME": str(home / "xdg")}
    late, early = put(base / "policy.d" / "20-b.toml"), put(base / "policy.d" / "10-a.toml")
    put(base / "policy.d" / "README")
    put(base / "policy.d" / ".30-hidden.toml")
    (base / "policy.d" / "40-folder.toml").mkdir()
    assert locate(None, environ) == [early, late]
    main = put(base / "policy.toml")
    assert locate(None, environ) == [main, early, late]
    assert locate(main, {}) == [main, early, late]
    other = put(base / "other.toml")
    assert locate(other, environ) == [other, early, late]


@pytest.mark.parametrize("name", ["missing.toml", "work", ""])
def test_named_file_must_exist(home: Path, name: str) -> None:
    """P4: A file that was asked for and is not there is an error that names it."""
    with pytest.raises(config.PolicyError) as caught:
        locate(name, {})
    assert "the policy file " in str(caught.value)
    if name:
        assert str(home) in str(caught.value)
        with pytest.raises(config.PolicyError, match="INTERPOSER_POLICY"):
            locate(None, {"INTERPOSER_POLICY": str(home / name)})


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_policy_of_another_user_is_not_taken_by_itself(home: Path) -> None:
    """X3: Root with another user's HOME does not run by that user's policy, unless it says so."""
    path = put(home / "xdg" / "interposer" / "policy.toml")
    drop_in = put(home / "xdg" / "interposer" / "policy.d" / "a.toml")
    environ = {"XDG_CONFIG_HOME": str(home / "xdg")}
    assert locate(None, environ) == [path, drop_in]
    for stranger in (path, drop_in):
        os.chown(stranger, 1234, 1234)
        with pytest.raises(config.PolicyError, match=r"belongs to user 1234; use it with --policy"):
            locate(None, environ)
        assert locate(path, environ) == [path, drop_in]
        os.chown(stranger, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_place_out_of_reach_is_not_there_unless_it_was_named(home: Path) -> None:
    """P4, X3: A user with root's HOME has no policy there; a policy.d of one's own that cannot be read is an error."""
    (home / "root").mkdir(mode=0o700)
    mine = home / "mine" / "interposer"
    (mine / "policy.d").mkdir(parents=True, mode=0o700)
    for folder in (home, *list(home.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    os.seteuid(1234)
    try:
        assert locate(None, {"HOME": str(home / "root")}) == []
        with pytest.raises(config.PolicyError, match=r"policy\.d: the directory cannot be read: Permission denied"):
            locate(None, {"XDG_CONFIG_HOME": str(home / "mine")})
    finally:
        os.seteuid(0)


def test_drop_ins_that_cannot_be_listed(home: Path) -> None:
    """P4: A problem of the policy, no traceback."""
    interposer = home / "xdg" / "interposer"
    interposer.mkdir(parents=True)
    (interposer / "policy.d").symlink_to("policy.d")
    with pytest.raises(config.PolicyError, match=r"policy\.d: the directory cannot be read: Too many"):
        locate(None, {"XDG_CONFIG_HOME": str(home / "xdg")})


def test_where_a_policy_was_is_looked_at_again(home: Path) -> None:
    """P6: A reload finds the policy where it was: with new drop-ins, without its main file, gone, or no longer ours."""
    base = home / "xdg" / "interposer"
    main = put(base / "policy.toml")
    location = find(None, {"XDG_CONFIG_HOME": str(home / "xdg")})
    assert (location.path, location.named, location.files) == (main, False, [main])
    drop_in = put(base / "policy.d" / "a.toml")
    found = at(main, named=False)
    assert found and (found.path, found.named, found.files) == (main, False, [main, drop_in])
    named = find(main, {})
    assert (named.path, named.named, named.files) == (main, True, [main, drop_in])
    assert find(None, {"INTERPOSER_POLICY": main}).named
    Path(main).unlink()
    found = at(main, named=False)
    assert found and (found.path, found.files) == (main, [drop_in])
    assert find(None, {"XDG_CONFIG_HOME": str(home / "xdg")}).path == main
    assert at(main, named=True) is None
    Path(drop_in).unlink()
    assert at(main, named=False) is None
    built_in = find(None, {"XDG_CONFIG_HOME": str(home / "xdg")})
    assert (built_in.path, built_in.named, built_in.files) == ("", False, [])
    Path(main).mkdir()
    with pytest.raises(config.PolicyError, match="is not a file"):
        at(main, named=True)


def test_stamp_changes_with_the_files(home: Path) -> None:
    """P6: The cache key changes with a file's contents, and when one comes or goes."""
    path = put(home / "policy.toml")
    first = stamp([path])
    assert stamp([path]) == first
    put(home / "policy.toml", "version = 1\n# more\n")
    second = stamp([path])
    assert second != first
    os.utime(path, ns=(1, 1))
    third = stamp([path])
    assert third != second
    (home / "policy.toml").unlink()
    assert stamp([path]) not in (first, second, third)


def test_locating_is_cheap() -> None:
    """P4: With a cached table the launcher loads no TOML, no dataclasses and no difflib."""
    code = "import sys, interposer.config.locate as l; l.locate(None, {}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=20,
                          cwd=Path(__file__).parents[2], check=True)  # fmt: skip
    assert not {"tomllib", "dataclasses", "difflib", "re", "typing", "struct"} & set(done.stdout.split())
