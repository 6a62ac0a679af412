"""Programs that received one listener each, and what becomes of the clients that wait for one of them when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_sharing_listeners import RECEIVER, SENDER, WAIT, Yard, on_san, yard

__all__ = ["yard"]

SENDERS = SENDER.format(
    before="", after="while True:\n    end, _ = door.accept()\n    socket.send_fds(end, [b'x'], [listener.fileno()])"
)
# Waits at the listener for a moment, so that clients find it, and for a signal; the last argument is the rest.
IDLER = """
import select
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
_, fds, _, _ = socket.recv_fds(end, 1, 4)
listener = socket.socket(fileno=fds[0])
select.select([listener], [], [], 0)
ready()
signal.sigwait([signal.SIGUSR1])
exec(sys.argv[2])
"""


def idler(yard: Yard, tmp_path: Path, rest: str) -> tuple[subprocess.Popen[str], str]:
    """A receiver of a listener that serves nobody, and where others get that listener."""
    door = str(tmp_path / "door")
    yard.told(yard.start(f"port = {yard.port}\n" + SENDERS, door, switched=False))
    first = yard.start(IDLER, door, rest)
    yard.told(first)
    return first, door


def heir(yard: Yard, door: str, way: str = "accept") -> subprocess.Popen[str]:
    """Another receiver, which serves."""
    second = yard.start(RECEIVER, door, way)
    yard.told(second)
    end = time.monotonic() + WAIT
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        while probe.connect_ex(f"\0san1/L/127.0.0.1:{yard.port}/1") != 0:   # its beacon, which comes last
            assert time.monotonic() < end
            time.sleep(0.01)
    return second


ENDS = {
    "_exit": ("os._exit(0)", "accept"),
    "exit": ("sys.exit()", "poll"),
    "syscall": ("import ctypes\nctypes.CDLL(None).syscall(231, 0)", "accept"),
    "close": ("listener.close()\nsignal.pause()", "epoll"),
    "all": ("os.closerange(3, 100)\nsignal.pause()", "accept"),
}


@pytest.mark.parametrize("end", ENDS)
def test_receiver_that_ends(yard: Yard, tmp_path: Path, end: str) -> None:
    """S23, T5, T8: who waits for a receiver of a listener that ends, or closes it, is served by another one."""
    rest, way = ENDS[end]
    first, door = idler(yard, tmp_path, rest)
    waiting = [yard.client() for _ in range(2)]
    second = heir(yard, door, way)
    os.kill(first.pid, signal.SIGUSR1)
    for client in waiting:
        on_san(*yard.replies(client), pid=second.pid)
    on_san(*yard.ask(1), pid=second.pid)


def test_last_receiver_ends(yard: Yard, tmp_path: Path) -> None:
    """S23: who waits for the last receiver is told at once that it has gone."""
    first, _ = idler(yard, tmp_path, "os._exit(0)")
    waiting = yard.client()
    os.kill(first.pid, signal.SIGUSR1)
    assert yard.replies(waiting)[0].problem in ("end", "ConnectionResetError")


def test_children_of_a_receiver_end(yard: Yard, tmp_path: Path) -> None:
    """S23, T4: a child that ends, with memory of its own or its parent's, takes no client from its parent."""
    rest = """
try:
    subprocess.run(["/nowhere"])
except FileNotFoundError:
    pass
if os.fork() == 0:
    os._exit(0)
os.wait()
serve(listener)
"""
    first, door = idler(yard, tmp_path, rest)
    waiting = [yard.client() for _ in range(2)]
    heir(yard, door)
    os.kill(first.pid, signal.SIGUSR1)
    for client in waiting:
        on_san(*yard.replies(client), pid=first.pid)


# Makes a connection as a receiver of the listener would have accepted it, and passes it on as that user.
CARRIER = """
import os, signal, socket, sys
uid, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
def unix(name, to=None):
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(5)
    one.bind("\\0san1/" + name)
    if to:
        one.connect("\\0san1/" + to)
    return one
own = port if what != "another port" else 1
listener = unix(f"L/127.0.0.1:{own}/9")
listener.listen()
client = unix(f"C/127.0.0.1:30000/127.0.0.1:{own}", f"L/127.0.0.1:{own}/9")
passed, _ = listener.accept()
listener.close()
carrier = unix("F/0123456789abcdef", f"L/127.0.0.1:{port}/0")
if what == "a pipe":
    passed.close()
    passed = open(os.pipe()[0])
if what == "another word":
    socket.send_fds(carrier, [b"G"], [passed.fileno()])
elif what == "no descriptor":
    carrier.send(b"F")
elif what != "nothing":
    socket.send_fds(carrier, [b"F"], [passed.fileno()])
passed.close()
print("sent", flush=True)
try:
    said = client.recv(100)
except OSError:
    said = b""
print("in" if said else "out", flush=True)
signal.pause()
"""
RUBBISH = ("nothing", "no descriptor", "another word", "a pipe", "another port")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_carriers(yard: Yard, tmp_path: Path) -> None:
    """X1, X2, X4: a connection is taken from its own user or root alone; what is no proper message is dropped at once,
    with all that came with it, and the next client is served."""
    first, _ = idler(yard, tmp_path, "serve(listener, 'poll')")
    os.kill(first.pid, signal.SIGUSR1)
    on_san(*yard.ask(1), pid=first.pid)
    before = os.listdir(f"/proc/{first.pid}/fd")
    for uid, what in [(0, "proper"), (61234, "proper"), *((0, what) for what in RUBBISH)]:
        os.kill(first.pid, signal.SIGSTOP)   # else it may accept the carrier before anything is in it
        liar = yard.start(CARRIER, str(uid), str(yard.port), what, switched=False, common=False)
        yard.told(liar, "sent")
        os.kill(first.pid, signal.SIGCONT)
        yard.told(liar, "in" if (uid, what) == (0, "proper") else "out")
        liar.kill()
        on_san(*yard.ask(1), pid=first.pid)
        assert os.listdir(f"/proc/{first.pid}/fd") == before
