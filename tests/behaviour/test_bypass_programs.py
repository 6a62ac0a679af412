"""Programs that the library cannot enter, or may not: Go, musl, setuid, file capabilities, sudo, su and ping. They work
as without the switch, alone and as children of a shell that has it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from awkward import Lab, Outcome, build_go, build_host
from puppet import SANRUN, plain_environment

GO = "it is a Go program, which makes its system calls without libc"
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
both_kinds = pytest.mark.parametrize("cgo", [False, True], ids=["static", "cgo"])


PARENT = """
import os, select, socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
if "waits" in sys.argv:
    select.select([listener], [], [], 0)
os.dup2(listener.fileno(), 3)
worker = subprocess.Popen([sys.argv[1], "worker"], pass_fds=[3])
print(listener.getsockname()[1], flush=True)
sys.exit(worker.wait())
"""
"""Hands its listener to a worker, after it has waited on it itself or not, but never accepts."""


def complaint(program: object, why: str, more: str = "") -> str:
    return f"sanrun: {program} cannot be interposed: {why}; it runs on plain TCP{more}\n"


def sanctl(*words: str) -> str:
    command = [SANRUN.with_name("sanctl"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


def from_shell(lab: Lab, *words: object) -> Outcome:
    """A program that a shell under sanrun starts, so that nobody has looked at it before."""
    return lab.run("plain", "sh", "-c", '"$@"; exit $?', "sh", *words)


# Go


@both_kinds
def test_go_client(lab: Lab, cgo: bool) -> None:
    """T14, O4, S7: a Go program reaches a server with companions by TCP, and sanrun says so before the start."""
    program = build_go(cgo)
    outcome = lab.run("plain", program, "say", lab.port, quiet=False)
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "T\n", [])
    assert outcome.complaints == complaint(program, GO, ", what it starts may still be interposed")
    outcome = from_shell(lab, program, "say", lab.port)
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "T\n", [])


@both_kinds
def test_go_server(lab: Lab, cgo: bool) -> None:
    """T14, S23, O1: a client of a Go server goes by TCP, and says why."""
    with lab.serving("plain", build_go(cgo), "serve") as (server, port, log):
        client = lab.run("plain", build_host("awkward_client"), port)
        assert (client.letter, client.carried, server.wait(10)) == ("T", ["NO_COMPANION"], 0)
        assert log.read_text() == ""


@both_kinds
def test_child_of_go(lab: Lab, cgo: bool) -> None:
    """T14: what a Go program starts is under the switch."""
    outcome = lab.run("plain", build_go(cgo), "run", build_host("awkward_client"), lab.port, quiet=False)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"])


def served_by_worker(lab: Lab, worker: Path, *options: str) -> None:
    with lab.serving("plain", "/usr/bin/python3", "-c", PARENT, worker, *options) as (parent, port, _):
        client = lab.run("plain", build_host("awkward_client"), port, timeout=20)
        assert (client.letter, client.carried) == ("T", ["NO_COMPANION"])
        assert parent.wait(10) in (0, ord("T"))


@both_kinds
@pytest.mark.parametrize("options", [(), ("waits",)], ids=["", "waits"])
def test_go_worker_of_an_interposed_parent(lab: Lab, options: tuple[str, ...], cgo: bool) -> None:
    """T14, S23: a Go worker that serves a listener which its parent made, and never accepted from, gets the clients."""
    served_by_worker(lab, build_go(cgo), *options)


def test_ring_worker_of_an_interposed_parent(lab: Lab) -> None:
    """T14, S23: the same of a worker with libc that accepts through an io_uring."""
    served_by_worker(lab, build_host("awkward_ring", as_name="awkward_ring-instruction"))


@pytest.mark.parametrize("kind", ["go", "static"])
def test_bypassed_processes_are_listed(lab: Lab, kind: str) -> None:
    """O2, O4, T14: sanctl stats names the processes that inherited the switch and cannot be entered, and why."""
    static = build_host("awkward_server", "-static", as_name="awkward_server-static")
    program, why = (build_go(True), GO) if kind == "go" else (static, "it is statically linked")
    with lab.serving("plain", "sh", "-c", 'exec "$@"', "sh", program, "serve") as (process, _, _):
        entry = {"pid": process.pid, "exe": str(program), "why": why}
        assert entry in json.loads(sanctl("stats", "--json"))["bypassed"]
        assert any(line.split(None, 2) == [*map(str, entry.values())] for line in sanctl("stats").splitlines())
        if kind == "static":
            assert f"process {process.pid} cannot be interposed: {why}" in sanctl("ss", "--pid", str(process.pid))


# musl


def test_musl(lab: Lab) -> None:
    """T14, O4: a musl program works on TCP both ways, alone and as a shell's child, and so does the plain child that it
    starts; the shell's preload is not in its way."""
    program = build_host("awkward_static", as_name="awkward_musl", compiler="musl-gcc")
    outcome = lab.run("plain", program, lab.port, build_host("awkward_client"), quiet=False)
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "T\nT\nT\n", [])
    assert outcome.complaints == complaint(program, "it uses the musl C library, not glibc")
    outcome = from_shell(lab, program, lab.port, build_host("awkward_client"))
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "T\nT\nT\n", ["NO_COMPANION"])


# Privilege


def privileged(lab: Lab, how: str) -> Path:
    """A copy of awkward_static, dynamically linked, that every user can execute."""
    path = lab.directory / f"privileged-{how}"
    shutil.copy(build_host("awkward_static", as_name="awkward_dynamic"), path)
    path.chmod(0o4755 if how == "setuid" else 0o2755 if how == "setgid" else 0o755)
    if how == "capable":
        subprocess.run(["/sbin/setcap", "cap_net_bind_service+ep", path], check=True, timeout=10)
    return path


def shared_client(lab: Lab) -> Path:
    return Path(shutil.copy(build_host("awkward_client"), lab.directory / "client"))


@as_root
@pytest.mark.parametrize("user", ["root", "nobody"])
@pytest.mark.parametrize(
    ("how", "why"), [("setuid", "it is setuid"), ("setgid", "it is setgid"), ("capable", "it has file capabilities")]
)
def test_privileged_program(lab: Lab, how: str, why: str, user: str) -> None:
    """X3, O4, T14: a program with privilege of its own is not entered, started by root or by another user, and works on
    TCP both ways. The loader takes the preload out of the environment where a user gains privilege by the program; a
    child of root's gets it."""
    program, client = privileged(lab, how), shared_client(lab)
    outcome = lab.run("plain", program, lab.port, client, quiet=False)
    assert (outcome.letter, outcome.said, outcome.carried) == ("status 0", "T\nT\nT\n", [])
    assert outcome.complaints == complaint(program, why)
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if user == "nobody" else []
    outcome = from_shell(lab, *words, program, lab.port, client)
    assert (outcome.letter, outcome.said) == ("status 0", "T\nT\nT\n")
    assert outcome.carried == ([] if user == "nobody" else ["NO_COMPANION"])


@as_root
def test_sudo(lab: Lab) -> None:
    """X3, O4: sudo runs as without the switch, and cleans the environment of what it starts."""
    client = shared_client(lab)
    outcome = lab.run("plain", "sudo", "-n", client, lab.port, quiet=False)
    assert (outcome.letter, outcome.carried) == ("T", [])
    assert outcome.complaints == complaint(shutil.which("sudo"), "it is setuid")
    outcome = from_shell(lab, "sudo", "-n", "-u", "nobody", client, lab.port)
    assert (outcome.letter, outcome.carried) == ("T", [])


@as_root
def test_su(lab: Lab) -> None:
    """X3, X1: su works, and keeps the environment: what root starts as another user is under the switch, with root's
    policy. By sanrun it is plain."""
    client = shared_client(lab)
    words = ["su", "nobody", "-s", "/bin/sh", "-c", f"{client} {lab.port}"]
    outcome = lab.run("plain", *words, quiet=False)
    assert (outcome.letter, outcome.carried) == ("T", [])
    assert outcome.complaints == complaint(shutil.which("su"), "it is setuid")
    outcome = from_shell(lab, *words)
    assert (outcome.letter, outcome.carried) == ("U", ["unix"])


def test_ping(lab: Lab) -> None:
    """X3, S8: ping, which has file capabilities or is setuid, says what it says without the switch."""
    words = [shutil.which("ping") or "ping", "-c", "1", "-q", "127.0.0.1"]
    without = subprocess.run(words, env=plain_environment(), capture_output=True, text=True, timeout=20, check=False)
    with_it = from_shell(lab, *words)
    assert with_it.letter == f"status {without.returncode}" == "status 0"
    assert "1 packets transmitted, 1 received" in with_it.said
    is_setuid = os.stat(words[0]).st_mode & stat.S_ISUID
    outcome = lab.run("plain", *words, quiet=False)
    why = "it is setuid" if is_setuid else "it has file capabilities"
    assert (outcome.letter, outcome.complaints) == ("status 0", complaint(words[0], why))
