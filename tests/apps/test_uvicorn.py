from __future__ import annotations

import os
import signal
from pathlib import Path

import looks
import programs
import pytest
import servers
from app_policies import few_policies
from clients import answering, curl, keeper, kept, requests, same, wrk
from programs import PYTHON, Policy, Programs

LISTEN = """\
import errno, socket, sys
try:
    socket.socket(fileno=int(sys.argv[1])).listen()
    print("listens")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
BIND = f"""\
import socket, subprocess, sys
bound = socket.socket()
bound.bind(("127.0.0.1", int(sys.argv[1])))
bound.setsockopt(socket.SOL_SOCKET, 60, int(sys.argv[2]))   # SO_ZEROCOPY
subprocess.run([sys.executable, "-c", {LISTEN!r}, str(bound.fileno())], pass_fds=[bound.fileno()], check=True)
"""


def test_on_the_san(apps: Programs, site: Path, policy: Policy) -> None:
    """P1, P5, P8, S17, S21, T2, O2: curl and uvicorn's event loop are on the SAN."""
    port = apps.port()
    server = servers.uvicorn(apps, policy, port, site, 1)
    client = curl(apps, policy, port)
    looks.on_san(port, client, server)
    looks.engine(client, policy)
    looks.engine(server, policy, python=True)
    assert same(client, site)


@few_policies
@pytest.mark.parametrize("plain_side", ["client", "server"])
def test_mixed(apps: Programs, site: Path, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: with a plain client or a plain uvicorn the connection is on TCP, and the other one says why."""
    port = apps.port()
    server = servers.uvicorn(apps, None if plain_side == "server" else policy, port, site, 1)
    client = keeper(apps, "python", None if plain_side == "client" else policy, port, "large")
    looks.on_tcp(port, client, server)
    assert kept(client, site / "large") == 1


def test_kept_connection(apps: Programs, site: Path, plain: Policy) -> None:
    """S22, S26, T1: a client keeps its connection, and uvicorn sees its address."""
    port = apps.port()
    server = servers.uvicorn(apps, plain, port, site, 1)
    client = keeper(apps, "python", plain, port)
    looks.on_san(port, client, server)
    assert kept(client, site / "small") == 1


@pytest.mark.parametrize(
    "plain_side", ["neither", *(pytest.param(side, marks=pytest.mark.long) for side in ("client", "server"))]
)
def test_workers(apps: Programs, site: Path, plain: Policy, plain_side: str) -> None:
    """T4, T5, S7, S23: workers that listen on a socket which their parent bound, and which came to them by exec, are on
    the SAN; with a plain client or plain workers all is on TCP. Each worker gets its share."""
    port = apps.port()
    server = servers.uvicorn(apps, None if plain_side == "server" else plain, port, site, 2)
    policy = None if plain_side == "client" else plain
    client = keeper(apps, "python", policy, port, "large")
    if plain_side == "neither":
        looks.on_san(port, client, server)
    else:
        looks.on_tcp(port, client, server)
    assert kept(client, site / "large") == 1
    assert requests(wrk(apps, policy, port)) > 0
    workers = answering(apps, policy, port)
    assert len(workers) == servers.WORKERS and workers <= server.pids, workers


@pytest.mark.parametrize("fit", [True, False])
def test_strict_worker(apps: Programs, fit: bool) -> None:
    """X7, X9: where the policy says no SAN, no connection, such a worker gets to listen unless an option its parent
    set keeps the socket on TCP."""
    policy = apps.policy("strict", 'version = 1\n[defaults]\nproviders = ["unix"]\notherwise = "error"\n')
    said = apps.run([PYTHON, "-c", BIND, str(apps.port()), str(int(not fit))], policy).decode()
    assert said.strip() == ("EADDRNOTAVAIL" if looks.SWITCH and not fit else "listens"), said


def test_killed_worker(apps: Programs, site: Path, plain: Policy) -> None:
    """X4, X5: the parent replaces a worker that was killed; the new one serves as the other does, also clients on the
    SAN's side."""
    port = apps.port()
    server = servers.uvicorn(apps, plain, port, site, 2)
    old = answering(apps, plain, port)
    os.kill(min(old), signal.SIGKILL)
    programs.wait_for(lambda: len(answering(apps, plain, port) - old) == 1, "a new worker answers")
    assert answering(apps, plain, port) <= server.pids
