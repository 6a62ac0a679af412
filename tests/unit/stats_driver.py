"""Builds tests/hosts/stats_host.c and drives it line by line."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "interposer" / "native"
WAIT = 20.0


def build(directory: Path) -> Path:
    output = directory / "stats_host"
    sources = [ROOT / "tests/hosts/stats_host.c", NATIVE / "stats.c", NATIVE / "real.c"]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-Wl,-z,now", f"-I{NATIVE}"]
    subprocess.run(["gcc", *flags, "-o", str(output), *map(str, sources)], check=True, timeout=120)
    return output


class Host:
    """A process with the writer of the stats page in it."""

    def __init__(self, program: Path) -> None:
        self.popen = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self.popen.pid
        self.pending = b""

    def ask(self, command: str) -> str:
        """Sends a command, returns its line of answer."""
        assert self.popen.stdin and self.popen.stdout
        self.popen.stdin.write(command.encode() + b"\n")
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.popen.stdout], [], [], WAIT)
            piece = os.read(self.popen.stdout.fileno(), 65536) if ready else b""
            assert piece, f"no answer to {command!r}; status {self.popen.poll()}"
            self.pending += piece
        answer, _, self.pending = self.pending.partition(b"\n")
        return answer.decode()

    def do(self, *commands: str) -> None:
        """Commands that answer with errno, which the writer must not touch."""
        for command in commands:
            assert self.ask(command) == "ok 77", command

    def fork(self, how: str = "fork") -> int:
        """The pid of a child, which takes the commands from here on."""
        return int(self.ask(how))

    def join(self) -> None:
        """Ends the child."""
        assert self.ask("exit") == "parent"

    def close(self) -> None:
        assert self.popen.stdin and self.popen.stdout
        self.popen.stdin.close()
        try:
            self.popen.wait(2)
        except subprocess.TimeoutExpired:
            self.popen.kill()
        self.popen.wait(WAIT)
        self.popen.stdout.close()
