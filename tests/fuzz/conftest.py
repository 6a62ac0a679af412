"""Says at the end how much was fuzzed."""

from __future__ import annotations

import pytest

EXECUTIONS = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXECUTIONS] = {}


@pytest.fixture
def executions(pytestconfig: pytest.Config) -> dict[str, int]:
    return pytestconfig.stash[EXECUTIONS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(EXECUTIONS, {})
    if done:
        each = ", ".join(f"{name} {count:,}" for name, count in done.items())
        terminalreporter.write_line(f"fuzzed {sum(done.values()):,} times: {each}")
