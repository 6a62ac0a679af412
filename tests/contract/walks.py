"""Programs that go through many calls by themselves and print a line for each answer, and at last how many of their
connections were not TCP's: run on TCP and on the SAN, once each."""

from __future__ import annotations

import subprocess
from functools import cache

from puppet import build, plain_environment, switched_environment


@cache
def walk(name: str, *arguments: str, switched: bool) -> tuple[list[str], int]:
    """The lines of tests/hosts/NAME.c, and the number of companions."""
    environment = switched_environment("--provider", "unix") if switched else plain_environment()
    done = subprocess.run(
        [build(name, "-pthread"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]} after {done.stdout[-500:]}"
    *lines, last = done.stdout.splitlines()
    return lines, int(last.removeprefix("companions "))
