"""The data of connections never waits for Python, whatever Python is busy with."""

from __future__ import annotations

import select
import time
from pathlib import Path

import pytest
from puppet import switched_environment
from world import World, companion_name

from interposer.diag import stats

FUNCTIONS = """
def decide(request):
    while request.remote and request.remote[1] == {port}:
        pass
    return "unix"
"""
POLICY = """
version = 1
[defaults]
engine = "{engine}"
timeout_ms = 3000
[[rule]]
use = "python:site_policy:decide"
"""


@pytest.mark.parametrize("engine", ["embedded", "reactive"])
def test_data_does_not_enter_python(san: World, tmp_path: Path, engine: str) -> None:
    """P7: While a function has Python and does not let go of it, connections that it decided about carry data, are
    polled, asked for their names and closed; none of that is a question."""
    port = san.port()
    (tmp_path / "site_policy.py").write_text(FUNCTIONS.format(port=port))
    (tmp_path / "policy.toml").write_text(POLICY.format(engine=engine))
    environment = switched_environment("--policy", str(tmp_path / "policy.toml"))
    san.stage.environments = {**san.stage.environments, "client": environment, "server": environment}
    listener, address = san.listener()
    fd, accepted = san.join(listener, address)
    other = san.client.thread("other")
    blocked = other.socket()
    before = {actor.pid: stats.process(actor.pid).upcalls for actor in (san.client, san.server)}
    assert min(before.values()) >= 1
    waiting = other.start_connect(blocked, ("127.0.0.1", port))
    assert waiting.blocks(0.3)
    begun = time.monotonic()
    for _ in range(200):
        assert san.client.send(fd, b"there") == 5
        assert san.server.poll([(accepted, select.POLLIN)], 1000) == (1, ["IN"])
        assert san.server.recv(accepted, 10) == b"there"
        assert san.server.write(accepted, b"back") == 4
        assert san.client.read(fd, 10) == b"back"
    assert san.client.getpeername(fd) == address
    assert companion_name(san.client, fd)
    assert san.client.close(fd) == 0
    assert san.server.recv(accepted, 10) == b""
    assert time.monotonic() - begun < 2
    assert waiting.blocks(0)
    assert stats.process(san.server.pid).upcalls == before[san.server.pid]
    # The other thread's questions alone.
    assert stats.process(san.client.pid).upcalls <= before[san.client.pid] + 2
    assert waiting.result() == "ECONNREFUSED"
