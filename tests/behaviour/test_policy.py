"""Policies in running programs: which section a process gets, and what a changed policy changes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANRUN = ROOT / ".venv/bin/sanrun"
SANCTL = ROOT / ".venv/bin/sanctl"
PYTHON = "/usr/bin/python3"

SERVER = """\
import socket, sys, threading
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def echo(connection):
    while data := connection.recv(100):
        connection.sendall(data)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""
# Each line on standard input makes a connection, which stays; the answer is its descriptor. "echo FD" uses one.
CLIENT = """\
import os, socket, sys
port, connections = int(sys.argv[1]), {}
print(os.getpid(), flush=True)
for line in sys.stdin:
    if line.startswith("echo"):
        connection = connections[int(line.split()[1])]
        connection.sendall(b"hello")
        print(connection.recv(100).decode(), flush=True)
    else:
        connection = socket.create_connection(("127.0.0.1", port))
        connections[connection.fileno()] = connection
        print(connection.fileno(), flush=True)
"""


@dataclass
class Program:
    """A started program that answers line by line."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        assert answer, f"the program ended: {self.process.wait(timeout=10)}"
        return answer.strip()

    def ask(self, text: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.line()


class World:
    """A server under sanrun, clients of it, and one policy file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = folder / "policy.toml"
        (folder / "server.py").write_text(SERVER)
        (folder / "client.py").write_text(CLIENT)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "run")}
        (folder / "run").mkdir()
        self.programs: list[subprocess.Popen[str]] = []
        self.write("")
        self.port = self.start(PYTHON, str(folder / "server.py")).line()

    def write(self, body: str) -> None:
        self.policy.write_text("version = 1\n" + body)
        self.policy.chmod(0o644)

    def start(self, *command: str, **environment: str) -> Program:
        process = subprocess.Popen(
            [str(SANRUN), "--policy", str(self.policy), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )
        self.programs.append(process)
        return Program(process)

    def client(self, *arguments: str, shell: str = "", **environment: str) -> tuple[Program, int]:
        """A client and its pid. `shell` is a script that starts it as "$@"."""
        command = [PYTHON, str(self.folder / "client.py"), self.port, *arguments]
        if shell:
            command = ["/bin/sh", "-c", shell, "sh", *command]
        program = self.start(*command, **environment)
        return program, int(program.line())

    def row(self, pid: int, descriptor: int) -> dict[str, Any]:
        """What sanctl ss says of a connection."""
        done = subprocess.run([str(SANCTL), "ss", "--json"], capture_output=True, text=True, timeout=20, check=True)
        rows = [row for row in json.loads(done.stdout)["sockets"] if (row["pid"], row["fd"]) == (pid, descriptor)]
        assert len(rows) == 1, done.stdout
        return dict(rows[0])

    def connect(self, client: tuple[Program, int]) -> tuple[str, str]:
        """Provider and rule of a new connection; the rule without the file's directory."""
        program, pid = client
        row = self.row(pid, int(program.ask("connect")))
        return row["provider"], str(row["rule"]).removeprefix(f"{self.folder}/")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        for process in made.programs:
            process.kill()
            process.wait(timeout=10)


ON_SAN = ("unix", "defaults")
TCP_RULE = '[[process.rule]]\nrole = "connect"\nuse = "tcp"\n'


def test_sections_by_predicate(world: World) -> None:
    """P3, O1: A section applies by argument, environment, user, executable, name and cgroup, all together."""
    cgroup = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
    name = Path(os.path.realpath(PYTHON)).name
    world.write(
        f'[[process]]\nexe = "{name}"\nname = "python3*"\nuser = {os.geteuid()}\ncgroup = "{cgroup}"\narg = "--t?p"\n'
        f'env = "REGION=north*"\n{TCP_RULE}'
    )
    assert world.connect(world.client("--tcp", REGION="northwest")) == ("tcp", "policy.toml:9")
    assert world.connect(world.client("--tcp", REGION="south")) == ON_SAN
    assert world.connect(world.client("--tccp", REGION="northwest")) == ON_SAN
    for line in (f"user = {os.geteuid() + 1}", 'exe = "/opt/*"', 'name = "nginx"', 'cgroup = "/none"', 'env = "UNSET"'):
        world.write(f'[[process]]\narg = "--tcp"\n{line}\n{TCP_RULE}')
        assert world.connect(world.client("--tcp")) == ON_SAN, line


def test_children_get_the_policy_of_their_program(world: World) -> None:
    """P3: What a shell starts is judged as itself, whether it is forked or takes the shell's place."""
    world.write(f'[[process]]\nname = "sh"\n{TCP_RULE}')
    assert world.connect(world.client(shell='"$@"; exit')) == ON_SAN
    assert world.connect(world.client(shell='exec "$@"')) == ON_SAN
    world.write(f'[[process]]\nname = "python3*"\n{TCP_RULE}')
    assert world.connect(world.client(shell='exec "$@"')) == ("tcp", "policy.toml:4")


def test_changed_policy_reaches_running_programs(world: World) -> None:
    """P6: After a reload new connections follow the new policy within a second; those made stay and work."""
    client, pid = made = world.client()
    first = int(client.ask("connect"))
    assert world.row(pid, first)["provider"] == "unix"
    world.write('[[rule]]\nrole = "connect"\nuse = "tcp"\n')
    # Starting anything by the changed policy compiles it anew.
    assert world.start("/bin/true").process.wait(timeout=20) == 0
    reloaded = time.monotonic()
    while (verdict := world.connect(made)) != ("tcp", "policy.toml:2"):
        assert verdict == ON_SAN
        assert time.monotonic() - reloaded < 5
    # One look of sanctl is part of the time.
    assert time.monotonic() - reloaded < 1.5
    assert client.ask(f"echo {first}") == "hello"
    assert world.row(pid, first)["provider"] == "unix"


def test_bad_policy_stops_the_launcher(world: World) -> None:
    """P4: A bad policy stops the launcher before the program starts, and running programs keep the old one."""
    client = world.client()
    world.write('[[rule]]\nrole = "connect"\nuse = "tpc"\n')
    marker = world.folder / "started"
    words = [str(SANRUN), "--policy", str(world.policy), "touch", str(marker)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, env=world.environment)
    assert done.returncode == 125
    assert f'{world.policy}:4: unknown provider "tpc"' in done.stderr
    assert 'did you mean "tcp"?' in done.stderr
    assert not marker.exists()
    time.sleep(1.1)
    assert world.connect(client) == ON_SAN
