"""SAN and TCP clients at one listener."""

from __future__ import annotations

import struct
import time

import pytest
from puppet import Buffer, Stage, pack_address, plain_environment
from world import World, companion_name

SECONDS = 1.5


@pytest.mark.parametrize("nonblocking", [False, True])
def test_neither_starves(san: World, nonblocking: bool) -> None:
    """S21: while SAN and TCP clients hammer one listener, each kind gets its part of the service."""
    listener, address = san.listener(backlog=64, kind=0o4000 if nonblocking else 0)
    plain_stage = Stage({"plain": plain_environment()})
    try:
        clients = {
            "san": [san.client.thread(f"san{n}") for n in range(3)],
            "tcp": [plain_stage.start(f"tcp{n}", "plain") for n in range(3)],
        }
        worker = san.server.thread("worker")
        worker.ask("puppet_serve_bytes", listener, ord("x"), 1 << 40)
        end = time.monotonic() + SECONDS
        done = dict.fromkeys(clients, 0)
        packed = Buffer(pack_address(address))
        busy = {}
        for kind, actors in clients.items():
            for actor in actors:
                actor.ask("puppet_ask_bytes", packed, 16, 25, Buffer(bytes(1024)))
                busy[actor] = kind
        while busy and time.monotonic() < end + 5:
            for actor, kind in list(busy.items()):
                answer = actor.answer("puppet_ask_bytes", 5)
                assert answer.result == 25, (kind, answer.result)
                assert struct.unpack("=256I", answer.memory[1])[ord("x")] == 25
                done[kind] += 25
                if time.monotonic() > end:
                    del busy[actor]
                else:
                    actor.ask("puppet_ask_bytes", packed, 16, 25, Buffer(bytes(1024)))
        assert not busy
        assert min(done.values()) > sum(done.values()) / 10, done
    finally:
        assert plain_stage.close() == ""


def test_turns(san: World) -> None:
    """S21: with many of both kinds waiting, no long run of one kind comes before the first of the other."""
    listener, address = san.listener(backlog=128)
    plain_stage = Stage({"plain": plain_environment()})
    try:
        plain = plain_stage.start("plain", "plain")
        for actor in (san.client, plain):
            for _ in range(40):
                fd = actor.raw("socket", 2, 1, 0).result
                assert actor.raw("connect", fd, Buffer(pack_address(address)), 16).result == 0
        kinds = []
        for _ in range(80):
            accepted = san.server.raw("accept", listener, None, None).result
            kinds.append(bool(companion_name(san.server, accepted)))
        assert kinds.count(True) == 40
        for start in range(0, 60, 20):
            assert len(set(kinds[start : start + 20])) == 2, kinds
    finally:
        assert plain_stage.close() == ""
