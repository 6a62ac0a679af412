"""Connections that one program makes and another uses: known from the first call on, with their addresses, and shown by
sanctl as connections of the program that has them now."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from puppet import plain_environment, switched_environment

from interposer.diag import stats

WAIT = 20
PYTHON = "/usr/bin/python3"

COMMON = """
import ctypes, mmap, os, select, signal, socket, struct, subprocess, sys, threading
def pair():
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def raw_close(fd):
    # mov edi, edi; mov eax, 3; syscall; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b803000000 0f05 c3"))
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    function(fd)
def events(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return sorted(poll.poll(3000))[0][1]
"""
ORDINARY = str(0x1 | 0x4 | 0x2000)       # POLLIN | POLLOUT | POLLRDHUP: TCP shows no POLLHUP then


def start(program: str, *arguments: str, switched: bool = True) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, "-c", COMMON + program, *arguments],
        env=switched_environment() if switched else plain_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.readline().split()


def end(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate("\n", timeout=WAIT)
    assert (process.returncode, out) == (0, "")


def connections(pid: int) -> list[tuple[int, str, str, str]]:
    rows = (row for row in stats.process(pid).rows if row.role != "listen")
    return [(row.fd, row.provider, str(row.local), str(row.remote)) for row in rows]


@pytest.mark.parametrize("which", ["client", "accepted"])
def test_inherited_as_standard_descriptors(which: str) -> None:
    """T4, S26, S27, O2: a program that inherits a connection under two numbers, as from inetd, is listed with it,
    and its first poll() after the peer's close shows what TCP would."""
    process = start(f"""
client, accepted = pair()
mine, other = (client, accepted) if {which!r} == "client" else (accepted, client)
os.dup2(mine.fileno(), 50)
os.dup2(mine.fileno(), 51)
say("ends", *mine.getsockname(), *mine.getpeername())
child = os.fork()
if child == 0:
    code = {COMMON!r} + '''
say(os.getpid())
sys.stdin.readline()
say(events(50))
say(os.read(50, 9).decode(), socket.socket(fileno=51).getpeername()[1])
'''
    os.execv(sys.executable, ["python3", "-c", code])
mine.close()
os.close(50)
os.close(51)
other.sendall(b"last")
other.close()
os.waitpid(child, 0)
""")
    _, local, local_port, peer, peer_port = line(process)
    (pid,) = line(process)
    seen = connections(int(pid))
    assert [row[:2] for row in seen] == [(50, "unix"), (51, "unix")], seen
    assert {row[2:] for row in seen} == {(f"{local}:{local_port}", f"{peer}:{peer_port}")}
    assert stats.process(int(pid)).connections["unix"] == 1
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    assert line(process) == [ORDINARY]
    assert line(process) == ["last", peer_port]
    end(process)


SENDER = """
from multiprocessing.connection import Client
from multiprocessing.reduction import send_handle
client, accepted = pair()
channel = Client(sys.argv[1])
send_handle(channel, (client if sys.argv[2] == "client" else accepted).fileno(), None)
mine, other = (client, accepted) if sys.argv[2] == "client" else (accepted, client)
mine.close()
sys.stdin.readline()
other.sendall(b"last")
other.close()
"""
RECEIVER = """
from multiprocessing.connection import Listener
from multiprocessing.reduction import recv_handle
door = Listener(sys.argv[1])
say("open")
fd = recv_handle(door.accept())
say(fd)
sys.stdin.readline()
say(events(fd))
say(os.read(fd, 9).decode())
"""


@pytest.mark.parametrize("which", ["client", "accepted"])
@pytest.mark.parametrize("switched", [True, False])
def test_passed_to_another_program(tmp_path: Path, which: str, switched: bool) -> None:
    """T5, S26, S27, D7, O2: multiprocessing passes a connection to a program that was started on its own; there it is
    listed and shows TCP's events at once; a program that is not interposed reads its bytes."""
    door = str(tmp_path / "door")
    receiver = start(RECEIVER, door, switched=switched)
    assert line(receiver) == ["open"]
    sender = start(SENDER, door, which)
    (fd,) = line(receiver)
    if switched:
        assert [row[:2] for row in connections(receiver.pid)] == [(int(fd), "unix")]
        assert stats.process(receiver.pid).connections["unix"] == 1
    end(sender)
    assert receiver.stdin
    receiver.stdin.write("\n")
    receiver.stdin.flush()
    seen = line(receiver)
    assert seen == [ORDINARY] if switched else len(seen) == 1
    assert line(receiver) == ["last"]
    end(receiver)


@pytest.mark.parametrize("what", ["pipe", "unix", "connection"])
def test_received_under_a_stale_number(what: str) -> None:
    """T10, T5: what recvmsg() puts under the number of a connection that a bare instruction closed is what it is."""
    process = start(f"""
client, accepted = pair()
one, other = socket.socketpair()
number = client.detach()
if {what!r} == "pipe":
    sent, write = os.pipe()
elif {what!r} == "unix":
    sent = socket.socketpair()[0].detach()
else:
    far, near = pair()
    sent, wanted = far.fileno(), (far.getsockname(), far.getpeername())
socket.send_fds(one, [b"x"], [sent])
raw_close(number)
_, fds, _, _ = socket.recv_fds(other, 1, 1)
assert fds == [number], fds
if {what!r} == "pipe":
    os.write(write, b"bytes")
    assert os.read(number, 9) == b"bytes"
else:
    got = socket.socket(fileno=number)
    if {what!r} == "unix":
        assert (got.family, got.getsockname()) == (socket.AF_UNIX, ""), got
    else:
        assert (got.getsockname(), got.getpeername()) == wanted
accepted.settimeout(3)
assert accepted.recv(1) == b""
""")
    end(process)


def test_forking_server() -> None:
    """T4, S27: socketserver's ForkingTCPServer answers each client in a child of its own, on the SAN."""
    process = start("""
import socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline() + b"%d\\n" % os.getpid())
server = socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
seen = set()
for number in range(5):
    with socket.create_connection(server.server_address, timeout=5) as end, end.makefile("rwb") as file:
        file.write(b"%d\\n" % number)
        file.flush()
        assert int(file.readline()) == number
        seen.add(int(file.readline()))
say(len(seen - {os.getpid()}))
sys.stdin.readline()
server.shutdown()
""")
    assert line(process) == ["5"]
    counted = stats.process(process.pid).connections
    assert counted["unix"] == 10 and not counted.get("tcp"), counted
    end(process)
