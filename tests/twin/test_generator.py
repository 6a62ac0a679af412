"""The generator's own tests, and a run of it. tools/test runs it for a minute, from the same seed each time, so that
a change is judged by what it changed; `--long` looks for new programs for ten. The seed stands in the output, and
`--twin-seed N` runs that seed's programs again. `--twin-seconds S` sets the time. `--twin-program FILE` runs a program
as failures print it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import lockstep
import machine
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from lockstep import Difference, Twin, parse, replay

SEED = 1
"""The first one of short runs."""
BATCH = 40
"""Programs of one seed."""
SHORTEST = 200
"""Programs that a minute must be good for, or the run proves nothing."""


def run(seed: int, programs: int, kind: type[machine.Programs] = machine.Programs) -> None:
    kind._hypothesis_internal_use_seed = seed  # type: ignore[attr-defined]
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=programs,
            deadline=None,
            database=None,
            print_blob=False,
            stateful_step_count=40,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def programs() -> Iterator[type[machine.Programs]]:
    """A generator with its own worlds and counts."""

    class Fresh(machine.Programs):
        pass

    Fresh.__name__ = "Programs"
    yield Fresh
    if Fresh.worlds is not None:
        Fresh.worlds.kill()


def test_random_programs(programs: type[machine.Programs], request: pytest.FixtureRequest) -> None:
    """T1, T2, T3, T4, T6, T7, T9, T12, S16, S22, S26, S27, S28: random programs see the same in all four worlds."""
    chosen = request.config.getoption("--twin-seed")
    long = request.config.getoption("--long")
    seconds = request.config.getoption("--twin-seconds") or (600 if long else 60)
    seed = chosen if chosen is not None else int.from_bytes(os.urandom(4)) if long else SEED
    end = time.monotonic() + seconds
    while True:
        print(f"seed {seed}")
        try:
            run(seed, BATCH, programs)
        except BaseException as error:
            error.add_note(programs.failure)
            error.add_note(f"run it again: pytest tests/twin/test_generator.py --twin-seed {seed}")
            raise
        if chosen is not None or time.monotonic() > end:
            break
        seed += 1
    assert programs.worlds is not None
    print(
        f"{programs.programs} programs, {programs.steps} steps, {programs.carried} connections on the SAN, "
        f"permitted differences met: {programs.worlds.met}"
    )
    assert programs.carried > programs.programs / 4, "too few connections were on the SAN"


def test_program_in_a_file(request: pytest.FixtureRequest) -> None:
    """S16: the program of --twin-program sees the same in all worlds; else one that touches most of the harness."""
    file = request.config.getoption("--twin-program")
    text = Path(file).read_text() if file else EXAMPLE
    worlds = replay(parse(text))
    assert file or worlds.twins[1].carried == 1


EXAMPLE = """
    server.socket(2, 1, 0)
    server.bind(3, ('127.0.0.1', 0))
    server.listen(3, 8)
    server.learn(3, 'p1')
    client.socket(2, 1, 0)
    client.connect(3, ('127.0.0.1', 'p1'))
    client.queued(3, 'server', 3)
    server.accept(3)
    server.epoll_create()
    server.epoll_ctl(5, 1, 4, 1)
    client.fork('client1')
    client1.send(3, fill(30, 0), 0)
    server.arrives(4, 30, 0)
    server.epoll_wait(5, 0)
    server.recv(4, 100)
    client.exec()
    client.ends('client1')
    client.getpeername(3)
"""


def test_steps_have_a_text() -> None:
    """What a failure prints is what a file may hold."""
    steps = parse(EXAMPLE)
    assert parse("\n".join(map(str, steps))) == steps
    assert str(steps[11]) == "client1.send(3, fill(30, 0), 0)"


@pytest.mark.parametrize("call", ["getsockname", "recv", "epoll_wait", "ioctl"])
def test_planted_difference(call: str, programs: type[machine.Programs], monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which one call answers otherwise is found, and the program is shrunk to what it needs."""

    def begin(twin: Twin, step: lockstep.Step) -> object:
        begun = _begin(twin, step)
        if step.call == call and twin.pairing.client and hasattr(begun, "_finish"):
            finish = begun._finish

            def lies(answer: lockstep.puppet.Answer) -> object:
                finish(answer)
                entries = twin.entries
                entries[-1] = lockstep.puppet.Entry(*(getattr(entries[-1], word) for word in WORDS), "planted")
                return None

            begun._finish = lies
        return begun

    _begin = Twin.begin
    monkeypatch.setattr(Twin, "begin", begin)
    with pytest.raises(Difference, match="planted") as caught:
        run(1, 200, programs)
    steps = parse("\n".join(line for line in str(caught.value).splitlines() if line.startswith("    ")))
    assert steps[-1].call == call
    assert len(steps) <= 16, str(caught.value)


WORDS = ("actor", "call", "given")
