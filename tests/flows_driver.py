"""Builds and drives tests/hosts/flows_host.c, the decision in C alone, and makes tables for it."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from interposer.config.compile import compile_policy
from interposer.config.model import Policy
from interposer.policy import reasons, table
from interposer.policy.engine import Engine, Facts

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "interposer" / "native"
HOST = ROOT / "tests" / "hosts" / "flows_host.c"
SOURCES = ("flows.c", "policy_table.c", "rule_index.c", "predicates.c", "endpoint.c", "real.c")
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
}

ZERO = bytes(16)
NO_TABLE = f"1 1 0,0,0,0 {reasons.BAD_TABLE} {table.RULE_DEFAULT} {table.FUNCTION_NONE}"
BAD = f"-{reasons.BAD_TABLE}"

Request = tuple[int, int, bytes, int, bytes, int]
"""Role, family, local address and port, remote address and port."""


@cache
def build(sanitizers: str = "") -> Path:
    """The host program under these sanitizers, built again only when a source has changed."""
    place = ROOT / ".build" / "hosts"
    place.mkdir(parents=True, exist_ok=True)
    output = place / ("flows_host" + ("-" + sanitizers.replace(",", "-") if sanitizers else ""))
    newest = max(path.stat().st_mtime_ns for path in (HOST, Path(__file__), *NATIVE.iterdir()))
    if output.exists() and output.stat().st_mtime_ns > newest:
        return output
    flags = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]
    flags += ["-Wl,--wrap=mmap,--wrap=clock_gettime"]
    # GCC's thread sanitizer does not model fences, and warns of each; the flows' sequence lock has two.
    flags += ["-O1", f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-Wno-tsan"] if sanitizers else ["-O2"]
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run(
        ["gcc", *flags, "-o", fresh, HOST, *(NATIVE / name for name in SOURCES)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    fresh.replace(output)
    return output


class Host:
    """A running flows_host."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            env={**os.environ, **SANITIZERS},
        )

    def start(self, command: str) -> None:
        """Sends a command; finish() reads its answer."""
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def finish(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the host died: {self.process.wait(timeout=10)}"
        return line.rstrip("\n")

    def tell(self, *commands: str) -> list[str]:
        assert self.process.stdin and self.process.stdout
        answers = []
        # In portions that fit the pipes, so that neither side waits for the other.
        for start in range(0, len(commands), 50):
            portion = commands[start : start + 50]
            self.process.stdin.write("".join(command + "\n" for command in portion))
            self.process.stdin.flush()
            for command in portion:
                line = self.process.stdout.readline()
                assert line, f"the host died at {command!r}: {self.process.wait(timeout=10)}"
                answers.append(line.rstrip("\n"))
        return answers

    def ask(self, command: str) -> str:
        return self.tell(command)[0]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(timeout=10) == 0


@contextmanager
def running(program: Path) -> Iterator[Host]:
    """A host that must end well."""
    host = Host(program)
    try:
        yield host
        host.close()
    finally:
        host.process.kill()
        host.process.wait(timeout=10)


def table_of(policy: Policy, providers_override: Sequence[str] | None = None, require: bool = False) -> bytes:
    return compile_policy(
        policy,
        libpython="/usr/lib/libpython3.11.so.1.0",
        python_home="/usr",
        search_path=["/usr/lib/python3.11"],
        engine_module="/opt/engine.so",
        helper="",
        key="key",
        providers_override=providers_override,
        require=require,
    )


def with_checksum(data: bytes) -> bytes:
    """The table with the checksum that belongs to its bytes."""
    return data[:16] + struct.pack("=I", zlib.crc32(data[table.HEADER.size :])) + data[20:]


def facts_command(facts: Facts) -> str:
    def text(value: bytes) -> str:
        return value.hex() or "-"

    def many(values: tuple[bytes, ...]) -> str:
        return text(b"".join(value + b"\0" for value in values))

    return (
        f"facts {facts.user} {text(facts.exe)} {text(facts.name)} {many(facts.arguments)} "
        f"{many(facts.environment)} {many(facts.cgroups)}"
    )


def decide_command(request: Request, scopes: tuple[int, int] = (0, 0)) -> str:
    role, family, local, local_port, remote, remote_port = request
    return f"decide {role} {family} {local.hex()} {local_port} {remote.hex()} {remote_port} {scopes[0]} {scopes[1]}"


def foretold(engine: Engine, request: Request) -> str:
    """What the host prints for a request, by the Python engine. Its stub has to leave `otherwise` open and to answer
    TCP for reasons.STARTING, which nobody remembers."""
    if engine.engine == table.ENGINE_REACTIVE:
        asked = f"asked {request[0]} {table.FUNCTION_NONE} {table.RULE_DEFAULT}"
        return f"1 {engine.otherwise} 0,0,0,0 {reasons.STARTING} {table.RULE_DEFAULT} {table.FUNCTION_NONE} {asked}"
    action, otherwise, providers, reason, rule, function = engine.decide(*request)
    asked = ""
    if action == table.ACTION_ASK:
        asked = f" asked {request[0]} {function} {rule}"
        action, reason, function = table.ACTION_TCP, reasons.STARTING, table.FUNCTION_NONE
    numbers = ",".join(str(number) for number in (*providers, 0, 0, 0, 0)[:4])
    return f"{action} {otherwise} {numbers} {reason} {rule} {function}{asked}"


STUB = f"answer 1 0 0 {reasons.STARTING} {table.RULE_DEFAULT}"


def put(path: Path, data: bytes) -> Path:
    """As the launcher does: a temporary name, then a rename."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.chmod(0o644)
    os.replace(fresh, path)
    return path
