"""Builds tests/hosts/engine_host.c and tables for it."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

from interposer import config
from interposer.build import build_all
from interposer.config.compile import compile_policy
from interposer.launch import libpython

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "interposer" / "native"
ENGINE_MODULE = ROOT / "interposer" / "libinterposer-engine.so"
HOST = ROOT / ".build" / "hosts" / "engine_host"
EMBEDDED, STARTUP, HELPER, REACTIVE, OFF = 1, 2, 3, 4, 5
TCP, SAN = 1, 2

DEFAULTS = "version = 1\n[defaults]\n"
FIRST = '[[rule]]\nrole = "connect"\nremote = "127.0.0.1:{port}"\nuse = "python:site_policy:{name}"\n'


@cache
def host(*flags: str) -> str:
    """The path of the host program, newly built, with more flags for the compiler if given."""
    HOST.parent.mkdir(parents=True, exist_ok=True)
    build_all(ROOT / "interposer", ROOT / ".build", verbose=False)  # the engine's Python modules are compiled in
    sources = [
        ROOT / "tests/hosts/engine_host.c",
        *(NATIVE / f"{name}.c" for name in ("engine", "helper", "real", "trace")),
    ]
    place = HOST.with_name("-".join([HOST.name, *flags]))
    fixed = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-ftls-model=initial-exec"]
    fresh = place.with_suffix(f".{os.getpid()}")
    subprocess.run(["gcc", *fixed, *flags, f"-I{NATIVE}", "-o", fresh, *sources, "-pthread"], check=True, timeout=120)
    fresh.replace(place)
    return str(place)


def write_table(
    directory: Path,
    policy: str = 'version = 1\n[defaults]\nproviders = ["unix"]\n',
    functions: str = "",
    *,
    helper: str = "",
    library: str | None = None,
    home: str | None = None,
    search_path: list[str] | None = None,
    engine_module: Path = ENGINE_MODULE,
) -> str:
    """A compiled table in `directory`, with `functions` as its site_policy.py; returns its path."""
    (directory / "site_policy.py").write_text(functions)
    source = directory / "policy.toml"
    source.write_text(policy)
    loaded = config.load_files([str(source)])
    data = compile_policy(
        loaded.policy,
        libpython=libpython.find() if library is None else library,
        python_home=libpython.python_home() if home is None else home,
        search_path=libpython.search_path() if search_path is None else search_path,
        engine_module=str(engine_module),
        helper=helper,
        key="",
    )
    place = directory / "table"
    place.write_bytes(data)
    return str(place)


def run(table: str, engine: int, *scenario: object, timeout: float = 60, program: str = "", **options: object) -> str:
    """What the host (or another `program`) printed. A host that fails or hangs fails the test."""
    environment = {**os.environ, "HOST_LOG": f"{table}.log"}
    command = [program or host(), table, str(engine), *map(str, scenario)]
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,  # type: ignore
    )
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr, log(table))
    assert result.stderr == "", result.stderr
    return result.stdout


def log(table: str) -> str:
    try:
        return Path(f"{table}.log").read_text()
    except FileNotFoundError:
        return ""


def fields(output: str, label: str) -> list[dict[str, str]]:
    """The name=value pairs of each line that begins with, or holds, the word `label`."""
    found = []
    for line in output.splitlines():
        if re.search(rf"(^|\s){re.escape(label)}(\s|=|$)", line):
            found.append(dict(re.findall(r"(\w+)=(\S+)", line)))
    return found


def verdicts(output: str, label: str = "verdict") -> list[tuple[int, int]]:
    """(action, reason) of each line of that label."""
    return [(int(line["action"]), int(line["reason"])) for line in fields(output, label)]
