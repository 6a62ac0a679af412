from __future__ import annotations

from pathlib import Path

import looks
import pytest
import servers
from clients import curl, same
from programs import Policy, Programs

RULE = """\
version = 1

[[rule]]
role = "both"
use = "python:site_policy:decide"
"""
SERVERS = {"http.server": servers.http_server, "nginx": servers.nginx}


@pytest.mark.parametrize("server", SERVERS)
def test_curl_is_on_the_san(apps: Programs, site: Path, policy: Policy, server: str) -> None:
    """P1, P5, P8, S2, S15, S21, O2: curl and an HTTP server use the SAN under each kind of policy, and the engine runs
    where the policy asks for it."""
    port = apps.port()
    serving = SERVERS[server](apps, policy, port, site)
    client = curl(apps, policy, port)
    looks.on_san(port, client, serving)
    looks.engine(client, policy)
    looks.engine(serving, policy, python=server == "http.server")
    assert same(client, site)


@pytest.mark.parametrize("server", SERVERS)
def test_plain_curl_to_interposed_server(apps: Programs, site: Path, policy: Policy, server: str) -> None:
    """S21, S22, O1: a client that comes by TCP is served by TCP, and the server says why."""
    port = apps.port()
    serving = SERVERS[server](apps, policy, port, site)
    client = curl(apps, None, port)
    looks.on_tcp(port, client, serving)
    assert same(client, site)


@pytest.mark.parametrize("server", SERVERS)
def test_interposed_curl_to_plain_server(apps: Programs, site: Path, policy: Policy, server: str) -> None:
    """S7, S18, O1: a server that is not interposed is reached by TCP, and the client says why."""
    port = apps.port()
    serving = SERVERS[server](apps, None, port, site)
    client = curl(apps, policy, port)
    looks.on_tcp(port, client, serving)
    assert same(client, site)


def test_function_says_tcp(apps: Programs, site: Path) -> None:
    """P3, P5, O1: a function that wants TCP for curl, and the SAN for all others, gets that."""
    decide = 'def decide(request):\n    return "tcp" if request.process.name == "curl" else "unix"\n'
    policy = apps.policy("no-curl", RULE, decide)
    port = apps.port()
    serving = servers.nginx(apps, policy, port, site)
    client = curl(apps, policy, port)
    looks.on_tcp(port, client, serving, "FUNCTION_TCP")
    assert same(client, site)


def test_function_raises(apps: Programs, site: Path, plain: Policy) -> None:
    """P5, O1: an exception in the function means TCP and its reason, and the program goes on."""
    policy = apps.policy("raises", RULE, "def decide(request):\n    raise KeyError(request.role)\n")
    port = apps.port()
    serving = servers.nginx(apps, plain, port, site)
    client = curl(apps, policy, port)
    looks.on_tcp(port, client, serving, "FUNCTION_RAISED")
    assert same(client, site)


def test_both_kinds_of_client_at_once(apps: Programs, site: Path, plain: Policy) -> None:
    """S5, S21: one listening descriptor serves a TCP client and a SAN client at the same time."""
    port = apps.port()
    servers.nginx(apps, plain, port, site)
    clients = [curl(apps, None, port), curl(apps, plain, port)]
    assert [same(client, site) for client in clients] == [True, True]


def test_nobody_listens(apps: Programs, plain: Policy) -> None:
    """S18, T12: curl's own exit status for a refused connection is the same as on TCP."""
    port = apps.port()
    for policy in (plain, None):
        client = curl(apps, policy, port)
        client.popen.wait(10)
        assert client.popen.returncode == 7, client.said()
