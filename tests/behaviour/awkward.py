"""Runs the awkward programs of tests/hosts under sanrun, and reads what became of their connections."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from puppet import HOSTS, ROOT, SANRUN, plain_environment

from interposer.policy import reasons

KINDS = ("plain", "function", "reactive")
"""The policies: without code, with a function that decides everything, and one that asks for every decision."""
PLAIN = 'version = 1\n[defaults]\nproviders = ["unix"]\ntimeout_ms = 5000\n'  # the machine may be busy
RULE = '[[rule]]\nrole = "both"\nuse = "python:{module}:decide"\n'
QUIET = "def decide(request):\n    return 'unix'\n"
LOUD = """\
import asyncio
import signal
import sys

print("to stdout at import")

def decide(request):
    print("to stdout", flush=True)
    sys.stderr.write("to stderr\\n")
    return "unix"
"""
MODULES = {"function": "quiet_policy", "loud": "loud_policy"}
FILTERS = ROOT / "interposer/native/sandbox.c"  # which some of them include
PATIENCE = 60
"""Seconds after which a program counts as hanging."""


def carried(log: str) -> list[str]:
    """For each connection and listener that was decided, in order, "unix" or why it stayed on TCP."""
    found = re.findall(r"(?:connect|listen) fd \d+: (?:provider (\w+)\n|TCP, reason (\d+)\n)", log)
    return [provider or reasons.BY_NUMBER[int(number)].symbol for provider, number in found]


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it said on its standard descriptors."""

    status: int
    said: str
    complaints: str
    log: str

    @property
    def carried(self) -> list[str]:
        return carried(self.log)

    @property
    def letter(self) -> str:
        """The exit status of a program that ends with a letter, or in words."""
        if self.status < 0:
            return signal.Signals(-self.status).name
        return chr(self.status) if 32 < self.status < 127 else f"status {self.status}"


class Lab:
    """A directory with policies that every user can read, and a server under the switch that tells each client by one
    letter what carries its connection: U or T, for AF_UNIX or TCP."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="awkward-"))
        self.directory.chmod(0o755)
        for module, text in (("quiet_policy", QUIET), ("loud_policy", LOUD)):
            (self.directory / f"{module}.py").write_text(text)
        self._logs = 0
        command = [SANRUN, "--policy", self.policy("plain"), "--", build_host("awkward_server")]
        self._server = subprocess.Popen(command, env=plain_environment(), stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self.port = int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.wait(10)
        shutil.rmtree(self.directory)

    def policy(self, kind: str, engine: str = "") -> str:
        """The path of a policy of that kind: one of KINDS, or loud, whose function writes and imports."""
        path = self.directory / f"{kind}-{engine or 'default'}.toml"
        if not path.exists():
            engine = engine or ("reactive" if kind == "reactive" else "")
            rule = RULE.format(module=MODULES[kind]) if kind in MODULES else ""
            path.write_text(PLAIN + (f'engine = "{engine}"\n' if engine else "") + rule)
        return str(path)

    def new_log(self) -> Path:
        """A file that every user can write."""
        self._logs += 1
        path = self.directory / f"log{self._logs}"
        path.touch()
        path.chmod(0o666)
        return path

    def command(self, kind: str, log: Path, *words: object, engine: str = "") -> list[str]:
        return [str(SANRUN), "--policy", self.policy(kind, engine), "--log", str(log), "--", *map(str, words)]

    def run(
        self,
        kind: str,
        *words: object,
        engine: str = "",
        environment: Mapping[str, str] | None = None,
        given: str = "",
        quiet: bool = True,
        timeout: float = PATIENCE,
    ) -> Outcome:
        """Runs a program under a policy. One that hangs fails the test; so does, if `quiet`, a word on stderr."""
        log = self.new_log()
        command = self.command(kind, log, *words, engine=engine)
        outcome = self.run_words(command, log, environment, given, timeout)
        assert not (quiet and outcome.complaints), outcome
        return outcome

    def run_words(
        self,
        words: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        given: str = "",
        timeout: float = PATIENCE,
    ) -> Outcome:
        result = subprocess.run(
            words,
            env={**plain_environment(), **(environment or {})},
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(result.returncode, result.stdout, result.stderr, log.read_text())

    @contextmanager
    def serving(self, kind: str, *words: object, engine: str = "") -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
        """A program that prints a port first: itself, that port and its log."""
        log = self.new_log()
        command = self.command(kind, log, *words, engine=engine)
        process = subprocess.Popen(command, env=plain_environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline()), log
        finally:
            process.kill()
            process.wait(10)


@cache
def build_host(name: str, *options: str, as_name: str = "", compiler: str = "gcc") -> Path:
    """Compiles tests/hosts/NAME.c, or .cpp, where it or what it includes has changed."""
    (source,) = HOSTS.glob(f"{name}.c*")
    output = ROOT / ".build" / "hosts" / (as_name or name)
    output.parent.mkdir(parents=True, exist_ok=True)
    newest = max(file.stat().st_mtime_ns for file in (source, HOSTS / "awkward.h", FILTERS, Path(__file__)))
    if not output.exists() or output.stat().st_mtime_ns < newest:
        fresh = output.with_suffix(f".{os.getpid()}")
        language = [compiler, "-std=gnu11"]
        if source.suffix == ".cpp":
            language = [shutil.which("g++") or "clang++", "-std=c++17"]
        flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([*language, *flags, "-o", fresh, source, *options, "-lm"], check=True, timeout=120)
        fresh.rename(output)
    return output


@cache
def build_go(cgo: bool) -> Path:
    """Compiles awkward_go.go where it has changed: static, or with cgo, one that libc's loader starts."""
    source = HOSTS / "awkward_go.go"
    output = ROOT / ".build" / "hosts" / f"awkward_go-{int(cgo)}"
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists() or output.stat().st_mtime_ns < source.stat().st_mtime_ns:
        fresh = output.with_suffix(f".{os.getpid()}")
        settings = {"CGO_ENABLED": str(int(cgo)), "GOCACHE": str(output.parent / "go"), "GO111MODULE": "off"}
        command = ["/usr/bin/go", "build", "-o", fresh, source]
        subprocess.run(command, env={**os.environ, **settings}, check=True, timeout=120)
        fresh.rename(output)
    return output
