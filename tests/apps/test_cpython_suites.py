"""Test suites that nobody here wrote: CPython's own network tests, with the switch and without it."""

from __future__ import annotations

import pytest
import suites
from interpreters import DEBIANS, VERSIONS, interpreters


def same(python: str, executable: str, names: tuple[str, ...]) -> None:
    found = suites.compare_all({python: executable}, names)
    print(suites.report(found))
    assert not {one.suite: one.differences for one in found if one.differences}
    assert set(suites.reasons(found)) <= set(suites.EXPLAINED), suites.reasons(found)
    carried = [one.switched.connections for one in found]
    unix, tcp = (sum(counts.get(name, 0) for counts in carried) for name in ("unix", "tcp"))
    assert unix > 500 and tcp < unix / 10, (unix, tcp)


def test_debians_python() -> None:
    """T1-T14, S16: the suites that are quick enough, with Debian's Python: each test ends as without the switch,
    and the connections are on the SAN."""
    same("3.11", DEBIANS, suites.QUICK)


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_every_python(version: str) -> None:
    """T1-T14, S16: all suites, with each version."""
    executable = interpreters().get(version)
    if not executable:
        pytest.skip(f"not run: no CPython {version} on this machine")
    same(version, executable, suites.LONG)
