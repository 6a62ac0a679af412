"""Companions of strangers, and peers that lie. A stranger is a process of another user that has the names first."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
STRANGER = 61234

# Takes the names of a listener, stream and beacon, tells of every connection and every byte.
SQUAT = """\
import os, socket, sys
uid, names = int(sys.argv[1]), sys.argv[2:]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
held = []
for name in names:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        one = socket.socket(socket.AF_UNIX, kind)
        one.bind("\\0" + name)
        held.append(one)
        if kind == socket.SOCK_STREAM:
            one.listen(16)
print("ready", flush=True)
while True:
    connection, _ = held[0].accept()
    got = connection.recv(100)
    if got:
        print("got", got, flush=True)
"""
# Connects to a companion listener under a claimed name; "in" if it was accepted and answered.
CLAIM = """\
import os, socket, sys
uid, mine, to = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
one = socket.socket(socket.AF_UNIX)
one.settimeout(5)
if mine:
    one.bind("\\0" + mine)
one.connect("\\0" + to)
try:
    one.sendall(b"lies")
    got = one.recv(10)
except OSError:
    got = b""
print("in" if got else "out", flush=True)
"""


@contextmanager
def squatter(*names: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SQUAT, str(STRANGER), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
        assert "got" not in process.stdout.read(), "a squatter got bytes"


def reasons(world: World) -> dict[str, int]:
    return dict(stats.process(world.client.pid).reasons)


def test_before_a_plain_server(san: World) -> None:
    """X1, O1: the names of a plain server's address are a stranger's: TCP, with the reason, and not a byte to him."""
    with socket.create_server((LOOPBACK, 0)) as plain:
        address = plain.getsockname()
        with squatter(f"san1/L/{LOOPBACK}:{address[1]}/0"):
            fd = san.client.socket()
            assert san.client.connect(fd, address) == 0
            assert not companion_name(san.client, fd)
            accepted, peer = plain.accept()
            with accepted:
                assert peer == san.client.getsockname(fd)
                san.client.send(fd, b"secret")
                assert accepted.recv(10) == b"secret"
            assert reasons(san) == {"STRANGER": 1}


def test_before_nobody(san: World) -> None:
    """X1: names without a TCP listener get no connection: refused, as by TCP."""
    port = san.port()
    with squatter(f"san1/L/{LOOPBACK}:{port}/0"):
        fd = san.client.socket()
        assert san.client.connect(fd, (LOOPBACK, port)) == "ECONNREFUSED"


def test_before_the_server(san: World) -> None:
    """X1: a server that starts after the squatter serves SAN clients, from another slot."""
    port = san.port()
    with squatter(f"san1/L/{LOOPBACK}:{port}/0"):
        listener, address = san.listener(port=port)
        for _ in range(5):
            san.join(listener, address)


def test_after_the_server(san: World) -> None:
    """X1: further slots taken by a stranger beside a server's: its clients reach the server."""
    listener, address = san.listener()
    names = [f"san1/L/{LOOPBACK}:{address[1]}/{slot}" for slot in (1, 2, 3)]
    with squatter(*names):
        for _ in range(8):
            san.join(listener, address)


def test_wildcard_squatter(san: World) -> None:
    """X1: a stranger at the wildcard gets no client of an exact listener."""
    listener, address = san.listener()
    with squatter(f"san1/L/0.0.0.0:{address[1]}/0", f"san1/D/{'0' * 32}:{address[1]}/0"):
        for _ in range(3):
            san.join(listener, address)


def test_all_slots_squatted(san: World) -> None:
    """X1, S24, O1: with every name taken the listener is TCP only and says so; clients go by TCP."""
    port = san.port()
    names = [f"san1/L/{LOOPBACK}:{port}/{slot}" for slot in range(64)]
    with squatter(*names):
        listener, address = san.listener(port=port)
        assert dict(stats.process(san.server.pid).reasons).get("NAME_TAKEN") == 1
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        accepted, _ = san.server.accept(listener)
        assert not companion_name(san.client, fd)
        san.client.send(fd, b"secret")
        assert san.server.recv(accepted, 10) == b"secret"


CLAIMS = {
    "another machine's address": "san1/C/192.0.2.1:40000/{host}:{port}",
    "another destination": "san1/C/{host}:40000/127.0.0.2:{port}",
    "another port": "san1/C/{host}:40000/{host}:1",
    "a privileged port": "san1/C/{host}:22/{host}:{port}",
    "no port": "san1/C/{host}:0/{host}:{port}",
    "no name": "",
    "a listener's name": "san1/L/{host}:40000/0",
    "another version": "san2/C/{host}:40000/{host}:{port}",
    "more than a name": "san1/C/{host}:40000/{host}:{port}/0",
    "a leading zero": "san1/C/{host}:040000/{host}:{port}",
    "half a name": "san1/C/{host}:40000/",
    "a large number": "san1/C/{host}:99999999999999999999/{host}:{port}",
    "a letter": "san1/C/127.0.0.x:40000/{host}:{port}",
    "an IPv6 spelling": "san1/C/" + "00" * 10 + "ffff7f000001:40000/{host}:{port}",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims(san: World, claim: str) -> None:
    """X2: a peer with a claim that it could not have made over TCP is not accepted, and the next client is."""
    listener, address = san.listener(kind=0o4000)
    mine = CLAIMS[claim].format(host=LOOPBACK, port=address[1])
    to = f"san1/L/{LOOPBACK}:{address[1]}/0"
    command = [sys.executable, "-c", CLAIM, str(STRANGER), mine, to]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as liar:
        assert liar.stdout
        san.server.poll([(listener, 1)], 5000)
        assert san.server.accept(listener) == "EAGAIN"
        assert liar.stdout.readline() == "out\n"
    san.join(listener, address)


def test_honest_stranger(san: World) -> None:
    """X2: the same peer with an honest name is a client as any other: what the claims are refused for is the claim."""
    listener, address = san.listener()
    mine = f"san1/C/{LOOPBACK}:{san.port()}/{LOOPBACK}:{address[1]}"
    command = [sys.executable, "-c", CLAIM, str(STRANGER), mine, f"san1/L/{LOOPBACK}:{address[1]}/0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout
        accepted, _ = san.server.accept(listener)
        assert san.server.recv(accepted, 10) == b"lies"
        san.server.send(accepted, b"truth")
        assert peer.stdout.readline() == "in\n"


def test_descriptors_from_a_peer(san: World) -> None:
    """X4, T7: descriptors that a peer sends never reach the program."""
    client = san.client
    listener, address = san.listener()
    fd, accepted = san.join(listener, address)
    before = len(os.listdir(f"/proc/{san.server.pid}/fd"))
    rights = struct.pack("=QiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, 0) + bytes(4)
    assert client.sendmsg(fd, [b"gift"], 0, None, rights) == 4
    assert san.server.recvmsg(accepted, [10], control=64)[:3] == (b"gift", 0, 0)
    assert len(os.listdir(f"/proc/{san.server.pid}/fd")) == before
