"""HTTP clients: curl, wrk, Node and Python."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from pathlib import Path

import programs
from programs import LOOPBACK, PYTHON, Policy, Program, Programs

APPS = Path(__file__).parent
CONNECTIONS = 16
CLOSE = ["--header", "Connection: close"]
COUNT = 5
"""How often `keeper` fetches its file."""
KEEPERS = {"node": ["node", str(APPS / "node_client.js")], "python": [PYTHON, str(APPS / "web_client.py")]}


def curl(apps: Programs, policy: Policy | None, port: int) -> Program:
    """Fetches `large` into a pipe. As long as nobody reads the pipe, the connection stays."""
    url = f"http://{LOOPBACK}:{port}/large"
    return apps.start(["curl", "--silent", "--show-error", "--fail", url], policy, pipes=True)


def same(client: Program, site: Path) -> bool:
    return hashlib.sha256(client.finish()).hexdigest() == programs.sha256(site / "large")


LOAD = 60
"""Seconds of a load that lasts until it is told to end."""


def wrk(apps: Programs, policy: Policy | None, port: int, *options: str, seconds: int = 1) -> Program:
    argv = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{seconds}s", "--timeout", "5s"]
    return apps.start([*argv, *options, f"http://{LOOPBACK}:{port}/small"], policy, pipes=True)


def requests(client: Program, *, stop: bool = False) -> int:
    """How many requests a wrk made, which is told to end when it is `stop`; fails when one of them failed."""
    if stop:
        client.popen.send_signal(signal.SIGINT)
    report = client.finish().decode()
    assert "Socket errors" not in report, report
    assert "Non-2xx" not in report, report
    found = re.search(r"(\d+) requests in", report)
    assert found, report
    return int(found[1])


def keeper(apps: Programs, kind: str, policy: Policy | None, port: int, file: str = "small", other: int = 0) -> Program:
    """Connected, and waiting for `kept` to go on over the same connection where the server keeps it. `other`: a worker
    that must not be its."""
    for _ in range(10):
        client = apps.start([*KEEPERS[kind], f"http://{LOOPBACK}:{port}/{file}", str(COUNT)], policy, pipes=True)
        said = client.line()
        assert said.startswith("connected "), client.said()
        if int(said.split()[1]) != other:
            return client
    raise AssertionError(f"the worker {other} serves everybody")


def kept(client: Program, file: Path) -> int:
    """How many connections a `keeper` made; fails when an answer was not `file`."""
    client.send("go on")
    report = json.loads(client.finish())
    assert report["hashes"] == [programs.sha256(file)] * COUNT, report
    return int(report["connections"])


def answering(apps: Programs, policy: Policy | None, port: int, count: int = 40) -> set[int]:
    """The processes that answer `count` connections, many of them at a time."""
    argv = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", "8", "--parallel-immediate", *CLOSE]
    said = apps.run([*argv, f"http://{LOOPBACK}:{port}/pid?[1-{count}]"], policy).decode()
    answers = said.split()
    assert len(answers) == count, said
    return {int(pid) for pid in answers}
