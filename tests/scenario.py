"""Scenarios: test functions that take `world`. Each runs once with both sides plain, which is the oracle, and then in
each pairing; what its actors saw must be the same but for the permitted differences. A directory's conftest.py imports
the two names below."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from differences import compare
from puppet import Record
from world import ORACLE, PAIRINGS, Pairing, World

_oracles: dict[str, Record] = {}


@pytest.fixture(params=PAIRINGS, ids=lambda pairing: pairing.name)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    pairing: Pairing = request.param
    return World(pairing)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    world = pyfuncitem.funcargs.get("world")
    if not isinstance(world, World):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames if name != "world"}
    key = f"{pyfuncitem.module.__name__}.{pyfuncitem.originalname} {sorted(arguments.items())}"
    if key not in _oracles:
        _oracles[key] = _run(pyfuncitem, World(ORACLE), arguments)
    _run(pyfuncitem, world, arguments, _oracles[key])
    return True


def _run(item: pytest.Function, world: World, arguments: dict[str, object], oracle: Record | None = None) -> Record:
    failure: BaseException | None = None
    try:
        item.obj(world=world, **arguments)
    except Exception as raised:
        failure = raised
    entries = world.stage.record.entries
    problems: list[str] = []
    if oracle is not None:
        problems, _ = compare(oracle.entries[: len(entries)] if failure else oracle.entries, entries, world.pairing.san)
    try:
        world.close()
    except AssertionError as raised:
        failure = failure or raised
    if failure is not None or problems:
        lines = [f"what {item.originalname} saw ({world.pairing.name}):", *(f"  {entry}" for entry in entries[-25:])]
        lines += ["differences from TCP:", *(f"  {problem}" for problem in problems)] if problems else []
        message = "\n".join(lines)
        if failure is None:
            pytest.fail(message, pytrace=False)
        failure.add_note(message)
        raise failure
    if world.pairing.san and not world.proven:
        pytest.fail("the scenario proves nothing about the SAN: world.proves() was not called", pytrace=False)
    return world.stage.record
