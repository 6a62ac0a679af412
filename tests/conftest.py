"""What all tests share: the option --long."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the slow tests too")
    parser.addoption("--twin-seed", type=int, help="run the generated programs of this seed again")
    parser.addoption("--twin-seconds", type=float, help="how long programs are generated")
    parser.addoption("--twin-program", help="a file with a program, as failures of the generator print it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: slow; runs only with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="slow; run with --long")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)
