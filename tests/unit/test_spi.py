"""The provider interface: the cases of tests/hosts/spi_*.c, each with the providers of tests/hosts/provider_test.c.

The switch is linked into the host, so a case drives both sides of the interface from one process. A TWIN runs again
with a policy that says TCP, and has to observe the same.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_c import HOSTS, SANITIZER_OPTIONS, SANITIZERS, switch_host
from puppet import plain_environment

from interposer import providers
from interposer.config.compile import compile_policy
from interposer.config.parse import read_policy

SOURCES = tuple(sorted(path.name for path in HOSTS.glob("spi_*.c")))
NUMBERS = {"test-a": 5, "test-b": 6}
POLICIES = {
    "tcp": '[[rule]]\nuse = "tcp"\n',
    "a": '[[rule]]\nuse = ["test-a"]\n',
    "ab": '[[rule]]\nuse = ["test-a", "test-b"]\n',
    "ba": '[[rule]]\nuse = ["test-b", "test-a"]\n',
    "strict": '[[rule]]\nuse = ["test-a", "test-b"]\notherwise = "error"\n',
    "connects": '[[rule]]\nrole = "connect"\nuse = ["test-a"]\n[[rule]]\nrole = "listen"\nuse = "tcp"\n',
    "addresses": (
        '[[rule]]\nrole = "connect"\nremote = "127.0.0.2"\nuse = ["test-b"]\n'
        '[[rule]]\nrole = "connect"\nremote = "127.0.0.3"\nuse = "tcp"\n'
        '[[rule]]\nuse = ["test-a", "test-b"]\n'
    ),
    "unix": '[[rule]]\nuse = ["unix"]\n',
}


@dataclass(frozen=True)
class Case:
    """One CASE or TWIN of the sources."""

    source: str
    name: str
    policy: str
    promises: str
    twin: bool


def find_cases() -> list[Case]:
    pattern = re.compile(r'^(CASE|TWIN)\((\w+), "(\w+)",\s+"([^"]+)"\)$', re.MULTILINE)
    cases = []
    for source in SOURCES:
        text = (HOSTS / source).read_text()
        found = [Case(source, match[2], match[3], match[4], match[1] == "TWIN") for match in pattern.finditer(text)]
        assert len(found) == len(re.findall(r"^(?:CASE|TWIN)\(", text, re.MULTILINE)), source
        cases += found
    return cases


CASES = find_cases()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The policies, compiled with the test providers' names."""
    directory = tmp_path_factory.mktemp("policies")
    compiled = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, number in NUMBERS.items():
            patch.setitem(providers.NAMES, name, number)
        for name, text in POLICIES.items():
            source = directory / f"{name}.toml"
            source.write_text("version = 1\n" + text)
            policy, problems, _ = read_policy([str(source)])
            assert not problems, problems
            compiled[name] = directory / name
            compiled[name].write_bytes(
                compile_policy(
                    policy, libpython="", python_home="", search_path=[], engine_module="", helper="", key="key"
                )
            )
            compiled[name].chmod(0o644)
    return compiled


def host(sanitizer: str) -> Path:
    return switch_host("spi_host", sanitizer, ("provider_test.c", *SOURCES))


def run(sanitizer: str, table: Path, *arguments: str) -> str:
    """What the case observed."""
    environment = {**plain_environment(), **SANITIZER_OPTIONS, "INTERPOSER_TABLE": str(table)}
    done = subprocess.run([host(sanitizer), *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}\n{done.stderr[-4000:]}\n{done.stdout[-3000:]}"
    return done.stdout


def holds(case: Case, sanitizer: str, tables: Mapping[str, Path]) -> None:
    observed = run(sanitizer, tables[case.policy], case.name)
    if case.twin:
        assert observed == run(sanitizer, tables["tcp"], case.name, "tcp")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tables: Mapping[str, Path]) -> None:
    """S1-S30: the calls both ways, in order and with their arguments, and what the program sees of them."""
    holds(case, "plain", tables)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "spi_host.c"])
@pytest.mark.parametrize("sanitizer", [name for name in SANITIZERS if name != "plain"])
def test_sanitized(sanitizer: str, source: str, tables: Mapping[str, Path]) -> None:
    """S10, S14, T13: the same cases, with a look at every access to memory, and at every race."""
    host(sanitizer)
    chosen = [case for case in CASES if case.source == source]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: run(sanitizer, tables[case.policy], case.name), chosen))
