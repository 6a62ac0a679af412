"""Scenarios: test functions that take `world`. Each runs once with both sides plain, which is the oracle, and then in
each pairing; what its actors saw must be the same but for the permitted differences. A directory's conftest.py imports
the two names below."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from differences import compare
from puppet import Coincidence, Record
from world import ORACLE, PAIRINGS, Pairing, World

_oracles: dict[str, Record] = {}
ATTEMPTS = 3


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
    for attempt in range(ATTEMPTS):
        if key not in _oracles:
            _oracles[key] = _run(pyfuncitem, World(ORACLE), arguments)
        try:
            _run(pyfuncitem, World(world.pairing) if attempt else world, arguments, _oracles[key])
            return True
        except Coincidence as coincidence:
            del _oracles[key]
            last = coincidence
    pytest.fail(str(last), pytrace=False)


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
        if failure is None and oracle is not None and _is_coincidence(oracle, world):
            raise Coincidence(message)
        if failure is None:
            pytest.fail(message, pytrace=False)
        failure.add_note(message)
        raise failure
    if world.pairing.san and not world.proven:
        pytest.fail("the scenario proves nothing about the SAN: world.proves() was not called", pytrace=False)
    return world.stage.record


def _is_coincidence(oracle: Record, world: World) -> bool:
    record = world.stage.record
    by_tcp, now = ([entry.portless() for entry in each.entries] for each in (oracle, record))
    return len(record.ports) != len(oracle.ports) and not compare(by_tcp, now, world.pairing.san)[0]
