"""Programs that change where and who they are: root directory, user, name space, descriptors, environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from awkward import KINDS, Lab, build_host

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CHANGES = (
    "close-rest",
    "nothing close-rest nothing",
    "close-range",
    "nothing close-range nothing",
    "wipe",
    "nothing wipe",
    "clearenv",
    "no-environ",
    "umask",
    "nothing exec nothing",
    pytest.param("chroot", marks=AS_ROOT),
    pytest.param("nothing chroot", marks=AS_ROOT),
    pytest.param("nobody", marks=AS_ROOT),
    pytest.param("nothing nobody nothing", marks=AS_ROOT),
    pytest.param("unmount", marks=AS_ROOT),
    pytest.param("nothing unmount", marks=AS_ROOT),
    pytest.param("chroot nobody close-range wipe", marks=AS_ROOT),
    pytest.param("nobody exec nothing", marks=AS_ROOT),
)


def places() -> Path:
    return build_host("awkward_places")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", CHANGES)
def test_changed_place(lab: Lab, changes: str, kind: str) -> None:
    """P8, T11, X8: before the first connection or after it a program closes all descriptors, wipes its environment and
    arguments, goes into an empty root directory, drops root or loses /proc: its connections and listeners stay on the
    SAN, the policy's function being asked inside where it can be, and in the helper where it cannot."""
    outcome = lab.run(kind, places(), lab.port, *changes.split())
    steps = [step for step in changes.split() if step != "exec"]
    assert (outcome.letter, outcome.said) == ("status 0", "".join(f"{step} UUU\n" for step in steps)), outcome
    assert outcome.carried == ["unix"] * 3 * len(steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", ["raw-close-range nothing", "nothing raw-close-range nothing"])
def test_descriptors_closed_behind_our_back(lab: Lab, changes: str, kind: str) -> None:
    """T11: all descriptors are closed by a system call that no hook sees: connections work, by TCP at worst, and the
    log is not written to what has its number now."""
    outcome = lab.run(kind, places(), lab.port, *changes.split())
    assert outcome.letter == "status 0", outcome
    assert [line.split()[0] for line in outcome.said.splitlines()] == changes.split()
    assert {letter for line in outcome.said.splitlines() for letter in line.split()[1]} <= {"U", "T"}, outcome


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["exec-empty nothing", "clearenv exec nothing", "no-environ exec nothing"])
def test_empty_environment(lab: Lab, how: str, kind: str) -> None:
    """X8, T4: what a program starts with an empty environment is not under the switch, and works."""
    outcome = lab.run(kind, places(), lab.port, *how.split())
    first, last = how.split()[0], outcome.said.splitlines()[-1]
    assert (outcome.letter, last) == ("status 0", "nothing TTT"), outcome
    assert outcome.carried == ([] if first == "exec-empty" else ["unix"] * 3)


@AS_ROOT
@pytest.mark.parametrize("engine, letter", [("", "T"), ("startup", "U")])
def test_dropped_root_and_a_private_policy(lab: Lab, tmp_path: Path, engine: str, letter: str) -> None:
    """P5, P8, O1: a program that drops root before its first decision cannot read a module that is root's alone, which
    is a reason; with `engine = "startup"` it was read before."""
    policy = tmp_path / "policy"  # below a directory that is root's alone
    policy.mkdir(0o700)
    shutil.copy(lab.directory / "quiet_policy.py", policy)
    private = policy / "policy.toml"
    private.write_text(Path(lab.policy("function", engine)).read_text())
    log = lab.new_log()
    words = lab.command("function", log, places(), lab.port, "nobody", engine=engine)
    words[words.index("--policy") + 1] = str(private)
    outcome = lab.run_words(words, log)
    assert (outcome.letter, outcome.said) == ("status 0", f"nobody {letter * 3}\n"), outcome
    assert set(outcome.carried) == {"unix" if letter == "U" else "FUNCTION_MISSING"}


@pytest.mark.parametrize("kind", [*KINDS, "loud"])
def test_sockets_on_standard_descriptors(lab: Lab, kind: str) -> None:
    """O3, T11: started without descriptors 0, 1 and 2, a program's sockets get these numbers, and a policy's function
    that prints writes nothing to them."""
    command = f"exec {build_host('awkward_standard')} {lab.port} <&- >&- 2>&-"
    outcome = lab.run(kind, "sh", "-c", command)
    assert outcome.letter == "status 0", outcome
    assert set(outcome.carried) == {"unix"}
