"""Python programs under one policy file: a server, clients that connect when told, and what sanctl says of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SANRUN = ROOT / ".venv/bin/sanrun"
SANCTL = ROOT / ".venv/bin/sanctl"
PYTHON = "/usr/bin/python3"
ON_SAN = ("unix", "defaults")
NO_PROCESSES = ("unshare", "--pid", "--fork", "--mount-proc") if os.geteuid() == 0 else ()

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


SECOND = 1.1                           # and what the coarse clock adds


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
        """A program under sanrun and the policy."""
        return self.run(str(SANRUN), "--policy", str(self.policy), *command, **environment)

    def run(self, *command: str, **environment: str) -> Program:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )
        self.programs.append(process)
        return Program(process)

    def close(self) -> None:
        """Ends all that it started."""
        for process in self.programs:
            process.kill()
            process.wait(timeout=10)

    def client(self, *arguments: str, shell: str = "", **environment: str) -> tuple[Program, int]:
        """A client and its pid. `shell` is a script that starts it as "$@"."""
        command = [*self.client_command(), *arguments]
        if shell:
            command = ["/bin/sh", "-c", shell, "sh", *command]
        program = self.start(*command, **environment)
        return program, int(program.line())

    def client_command(self) -> list[str]:
        return [PYTHON, str(self.folder / "client.py"), self.port]

    def started(self, *command: str) -> tuple[Program, int]:
        """A client started by this very command, and its pid."""
        program = self.run(*command)
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

    def follows(self, client: tuple[Program, int], expected: tuple[str, str], old: tuple[str, str] = ON_SAN) -> None:
        """Connects until the verdict is the expected one. Until then it is the old one, and never where the connect
        began more than a second after this call."""
        begin = time.monotonic()
        late = False
        while (verdict := self.connect(client)) != expected:
            assert (verdict, late) == (old, False)
            late = time.monotonic() - begin > SECOND

    def sanctl(self, *words: str, status: int = 0, prefix: Sequence[str] = ()) -> str:
        """What sanctl printed on both channels."""
        done = self._sanctl(*words, prefix=prefix)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def reload(self, status: int = 0, alone: bool = False) -> str:
        """`sanctl reload`. Other programs of this user may run too: only what it says of this world counts. `alone`: it
        sees no process at all, so that whatever runs elsewhere holds no table."""
        done = self._sanctl("reload", prefix=NO_PROCESSES if alone else ())
        lines = [line for line in (done.stdout + done.stderr).splitlines() if str(self.folder) in line]
        others = len(lines) < len((done.stdout + done.stderr).splitlines())
        assert done.returncode == status or (others and status == 0), done.stdout + done.stderr
        return "".join(f"{line}\n" for line in lines)

    def reload_json(self, failed: bool = False) -> dict[str, Any]:
        """What `sanctl reload --json` says of the only table of this world."""
        done = self._sanctl("reload", "--json")
        answer = json.loads(done.stdout)
        assert answer["schema"] == 1
        (table,) = (table for table in answer["tables"] if table["table"].startswith(str(self.folder)))
        assert done.returncode == any(each["result"] == "failed" for each in answer["tables"])
        assert (table["result"] == "failed") == failed, table
        return dict(table)

    def _sanctl(self, *words: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        command = [*prefix, str(SANCTL), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, env=self.environment)
