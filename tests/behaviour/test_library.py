"""The preloaded library as a file and as a mapping."""

from __future__ import annotations

import re
import subprocess

from puppet import ROOT, Actor
from world import World

from interposer import build

LIBRARY = ROOT / "interposer" / "libinterposer.so"


def test_links_libc_only() -> None:
    """X3: the library needs libc and nothing else, and binds everything when it is loaded."""
    text = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True, timeout=20).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert set(needed) <= {"libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert "BIND_NOW" in text
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    assert "TEXTREL" not in text


def test_exports() -> None:
    """T6: what it exports is hooks.def and vfork."""
    names = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=just-symbols", LIBRARY],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout.split()
    assert {name.partition("@")[0] for name in names} == build.hook_names()


def proportional(actor: Actor) -> int:
    """KiB of the process's own share of the library, and of its anonymous pages beyond."""
    total, ours = 0, False
    with open(f"/proc/{actor.pid}/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = line.rstrip().endswith("libinterposer.so")
            elif ours and line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def whole(actor: Actor) -> int:
    with open(f"/proc/{actor.pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:"))


def test_memory(san: World) -> None:
    """P1: in a process that starts no Python the library costs less than 1 MiB, its tables and pools included."""
    san.stage.environments = {**san.stage.environments, "plain": {"PATH": "/bin"}}
    plain = san.stage.start("plain", "plain")
    listener, address = san.listener(backlog=64)
    for actor in (san.client, plain):
        for _ in range(30):
            fd = actor.socket()
            assert actor.connect(fd, address) == 0
    for _ in range(60):
        san.server.accept(listener)
    for actor in (san.client, san.server):
        assert 0 < proportional(actor) < 1024
        assert whole(actor) - whole(plain) + proportional(actor) < 1024
