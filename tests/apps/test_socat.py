from __future__ import annotations

import os
import signal
from pathlib import Path

import looks
import programs
import pytest
import servers
from app_policies import few_policies
from clients import CLOSE, CONNECTIONS, curl, requests, same, wrk
from programs import PYTHON, Policy, Program, Programs

PEER = str(Path(__file__).parent / "asyncio_peer.py")
SIZE = 8 << 20


def chain(apps: Programs, policies: list[Policy | None], site: Path) -> tuple[int, int, Program, Program]:
    """The ports of a proxy and of the nginx behind it, and both."""
    front, back = apps.port(), apps.port()
    server = servers.nginx(apps, policies[1], back, site)
    return front, back, servers.socat(apps, policies[0], front, back), server


def legs(front: int, back: int) -> list[str]:
    """Where the connections of both legs are."""
    return ["tcp" if programs.kernel(port).tcp else "san" for port in (front, back)]


def test_both_legs(apps: Programs, site: Path, policy: Policy) -> None:
    """P1, P5, S6, S21, T4, O2: a proxy that forks for each connection accepts it on the SAN and connects onward on the
    SAN, in a child that asks the policy by itself."""
    front, back, proxy, server = chain(apps, [policy, policy], site)
    client = curl(apps, policy, front)
    looks.on_san(front, client, proxy)
    looks.on_san(back, proxy, server)
    looks.engine(proxy, policy)
    assert looks.worker(front, proxy) != proxy.pid
    assert same(client, site)


@few_policies
@pytest.mark.parametrize("plain_side", ["client", "proxy", "server"])
def test_mixed(apps: Programs, site: Path, policy: Policy, plain_side: str) -> None:
    """S7, S18, S21, O1: what a plain program takes part in is on TCP, and the other leg on the SAN."""
    policies = [None if plain_side == side else policy for side in ("proxy", "server")]
    front, back, proxy, server = chain(apps, policies, site)
    client = curl(apps, None if plain_side == "client" else policy, front)
    looks.connected(front, 1)
    looks.connected(back, 1)
    if looks.SWITCH:
        wanted = {"client": ["tcp", "san"], "proxy": ["tcp", "tcp"], "server": ["san", "tcp"]}[plain_side]
        assert legs(front, back) == wanted
        if plain_side != "proxy":
            counted = programs.counters(proxy.pids)
            assert counted.connections == {"tcp": 1, "unix": 1}, counted
            assert counted.reasons == {"PEER_TCP" if plain_side == "client" else "NO_COMPANION": 1}, counted
        else:
            looks.on_tcp(front, client, proxy)
            looks.on_tcp(back, proxy, server)
    assert same(client, site)


@pytest.mark.parametrize("close", [False, True], ids=["keep-alive", "close"])
def test_load(apps: Programs, site: Path, plain: Policy, close: bool) -> None:
    """S22, S28, T4, X5: a child for each of many connections; no request fails, and no child or connection is left."""
    front, back, proxy, _ = chain(apps, [plain, plain], site)
    client = wrk(apps, plain, front, *(CLOSE if close else []), seconds=1 if close else 3)
    if not close:
        looks.connected(front, CONNECTIONS)
        with client.frozen():
            looks.on_san(front, client, proxy, CONNECTIONS)
    assert requests(client) > 0

    def over() -> bool:
        now = [programs.kernel(port) for port in (front, back)]
        return not any(kernel.connecting or kernel.accepted or kernel.tcp for kernel in now)

    programs.wait_for(lambda: over() and proxy.pids == {proxy.pid}, "the children and their connections have ended")


def test_half_close(apps: Programs, plain: Policy) -> None:
    """T9, S28: an end of file goes through the proxy in one direction while data comes back in the other."""
    front, back = apps.port(), apps.port()
    server = apps.serve([PYTHON, PEER, "serve", str(back)], plain, back)
    proxy = servers.socat(apps, plain, front, back)
    client = apps.start([PYTHON, PEER, "fetch", str(front), str(SIZE)], plain, pipes=True)
    looks.on_san(front, client, proxy)
    looks.on_san(back, proxy, server)
    client.send("go on")
    assert client.finish() == f"same {SIZE + 32}\n".encode()


def test_killed_child(apps: Programs, site: Path, plain: Policy) -> None:
    """X4, X5, S19: a child that is killed breaks both legs of its own connection, and no other."""
    front, back, proxy, _ = chain(apps, [plain, plain], site)
    client = curl(apps, plain, front)
    looks.on_san(front, client, proxy)
    pid = looks.worker(front, proxy)
    other = curl(apps, plain, front)
    looks.connected(front, 2)
    os.kill(pid, signal.SIGKILL)
    client.output.read()
    assert client.popen.wait(10) in (18, 56), client.said()
    assert same(other, site)
    client = curl(apps, plain, front)
    looks.on_san(front, client, proxy)
    assert same(client, site)
    assert legs(front, back) == ["san", "san"] or not looks.SWITCH
