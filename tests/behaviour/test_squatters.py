"""Companions of strangers, and peers that lie. A stranger is a process of another user that has the names first."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from puppet import Actor
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


# Connects as another user under an honest name, sends a byte with descriptors, and tells what the kernel said.
GIFT = """\
import array, os, socket, sys
uid, mine, to = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
one = socket.socket(socket.AF_UNIX)
one.bind("\\0" + mine)
one.connect("\\0" + to)
fds = array.array("i", [0] * 50).tobytes()
for _ in range(5):
    try:
        one.sendmsg([b"g"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    except PermissionError:
        one.sendall(b"-")
print("sent", flush=True)
sys.stdin.read()
"""


def test_descriptors_from_a_stranger(san: World) -> None:
    """X4: descriptors that a hostile peer sends never reach the program, however it reads; where the kernel can refuse
    them, they are not even sent."""
    listener, address = san.listener()
    to = f"san1/L/{LOOPBACK}:{address[1]}/0"
    mine = f"san1/C/{LOOPBACK}:{san.port()}/{LOOPBACK}:{address[1]}"
    command = [sys.executable, "-c", GIFT, str(STRANGER), mine, to]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout
        assert peer.stdout.readline() == "sent\n"
        accepted, _ = san.server.accept(listener)
        before = os.listdir(f"/proc/{san.server.pid}/fd")
        refused = bytes(san.server.recv(accepted, 1, socket.MSG_PEEK)) == b"-"
        assert refused == (tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 16))
        assert san.server.recvmsg(accepted, [1], control=512)[1:3] == (0, 0)
        assert san.server.read(accepted, 1) in (b"g", b"-")
        assert san.server.recv(accepted, 1) in (b"g", b"-")
        assert os.listdir(f"/proc/{san.server.pid}/fd") == before
        peer.communicate("")


def test_descriptors_from_a_server(san: World) -> None:
    """X4, T7: nor do those that a lying server sends, with whatever its client reads."""
    with ExitStack() as stack:
        plain = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        address = plain.getsockname()
        name = f"\0san1/L/{LOOPBACK}:{address[1]}/0"
        beacon, companion = (
            stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        )
        companion.bind(name)
        companion.listen()
        beacon.bind(name)
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        assert companion_name(san.client, fd)
        liar = stack.enter_context(companion.accept()[0])
        before = os.listdir(f"/proc/{san.client.pid}/fd")
        for _ in range(4):
            socket.send_fds(liar, [b"g"], [0] * 50)
        assert san.client.recvmsg(fd, [1], control=512) == (b"g", 0, 0, 0)
        assert san.client.recvmsg(fd, [1], socket.MSG_PEEK, control=512) == (b"g", 0, 0, 0)
        assert san.client.read(fd, 1) == san.client.recv(fd, 1) == san.client.recvfrom(fd, 1)[0] == b"g"
        assert os.listdir(f"/proc/{san.client.pid}/fd") == before


def drop_privileges(actor: Actor, user: int) -> None:
    assert actor.raw("setresgid", user, user, user).value == 0
    assert actor.raw("setresuid", user, user, user).value == 0


@pytest.mark.parametrize("when", ["before socket", "before listen", "after listen"])
def test_server_that_drops_privileges(san: World, when: str) -> None:
    """X1, O1: a server that becomes another user before socket() or after listen() is served to clients of a third one.
    In between the listener is root's and its companion a stranger's, as a squatter's would be: TCP."""
    server = san.server
    if when == "before socket":
        drop_privileges(server, STRANGER)
    listener = server.socket()
    assert server.bind(listener, (LOOPBACK, san.port())) == 0
    if when == "before listen":
        drop_privileges(server, STRANGER)
    assert server.listen(listener) == 0
    if when == "after listen":
        drop_privileges(server, STRANGER)
    drop_privileges(san.client, STRANGER + 1)
    address = server.getsockname(listener)[:2]
    if when == "before listen":
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        assert not companion_name(san.client, fd)
        assert reasons(san) == {"STRANGER": 1}
        return
    for _ in range(3):
        san.join(listener, address)


def test_another_users_companion_beside_a_server(san: World) -> None:
    """X1: of two users' companions at one address, a third user's client takes the one of the listener's owner."""
    drop_privileges(san.server, STRANGER + 1)
    listener, address = san.listener()
    drop_privileges(san.client, STRANGER + 2)
    with squatter(*(f"san1/L/{LOOPBACK}:{address[1]}/{slot}" for slot in (1, 2, 3, 4, 5, 6))):
        for _ in range(8):
            san.join(listener, address)


def test_privileged_port_of_the_client(san: World) -> None:
    """X2, O1: who is not root cannot prove a privileged local port, and does not try; root can."""
    listener, address = san.listener(backlog=16)
    ports = []
    for _ in range(2):
        fd = san.client.socket()
        port = next(p for p in range(600, 1000) if p not in ports and san.client.bind(fd, (LOOPBACK, p)) == 0)
        ports.append(port)
        if len(ports) == 2:
            drop_privileges(san.client, STRANGER)
        assert san.client.connect(fd, address) == 0
        assert bool(companion_name(san.client, fd)) == (len(ports) == 1)
        assert san.server.accept(listener)[1] == (LOOPBACK, port)
    assert reasons(san) == {"PORT_PRIVILEGE": 1}


# Takes only beacons: nobody listens behind them.
BEACONS = """\
import os, socket, sys
uid, names = int(sys.argv[1]), sys.argv[2:]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
held = []
for name in names:
    held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    held[-1].bind("\\0" + name)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("serves", [True, False], ids=["server", "plain server"])
def test_beacons_that_lie(san: World, serves: bool) -> None:
    """X1, S18, O1: beacons without a listener behind them cost an attempt: the server's own companion is found among
    them, and else it is TCP at once."""
    port = san.port()
    names = [f"san1/L/{LOOPBACK}:{port}/{slot}" for slot in range(64) if slot != 40]
    command = [sys.executable, "-c", BEACONS, str(STRANGER), *names]
    with ExitStack() as stack:
        liar = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(liar.kill)
        assert liar.stdout
        assert liar.stdout.readline() == "ready\n"
        if serves:
            listener, address = san.listener(port=port)
            for _ in range(3):
                san.join(listener, address)
            return
        plain = stack.enter_context(socket.create_server((LOOPBACK, port)))
        fd = san.client.socket()
        assert san.client.connect(fd, (LOOPBACK, port)) == 0
        assert not companion_name(san.client, fd)
        stack.enter_context(plain.accept()[0])
        assert reasons(san) == {"REFUSED": 1}


# Fills a companion's backlog with claims that are refused, or with honest connections that say nothing.
FLOOD = """\
import os, socket, sys
uid, port, to = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
held = []
while len(held) < 500:
    one = socket.socket(socket.AF_UNIX)
    one.setblocking(False)
    if sys.argv[4] == "honest":
        one.bind(f"\\0san1/C/127.0.0.1:{20000 + len(held)}/127.0.0.1:{port}")
    try:
        one.connect("\\0" + to)
    except BlockingIOError:
        break
    held.append(one)
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["honest", "unnamed"])
def test_flood(san: World, kind: str) -> None:
    """X4, S23: with a backlog full of a stranger's connections a client goes by TCP and is accepted; afterwards the SAN
    serves again."""
    listener, address = san.listener(backlog=8)
    to = f"san1/L/{LOOPBACK}:{address[1]}/0"
    command = [sys.executable, "-c", FLOOD, str(STRANGER), str(address[1]), to, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdout
        waiting = int(flood.stdout.readline())
        assert 0 < waiting < 500
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        assert reasons(san) == {"BACKLOG_FULL": 1}
        own = san.client.getsockname(fd)
        for _ in range(waiting + 1):
            if san.server.accept(listener)[1] == own:
                break
        else:
            raise AssertionError("the client was never accepted")
        flood.communicate("")
    san.server.setsockopt(listener, socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 0, 100_000))
    while san.server.accept(listener) != "EAGAIN":
        pass
    san.join(listener, address)
