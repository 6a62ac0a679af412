"""Listeners that one process makes and another serves, and what is given back when descriptors run out.

Each test is a program of a few lines under sanrun, which prints what it saw."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from world import names_of

from interposer.diag import stats

SANRUN = Path(sys.executable).parent / "sanrun"

COMMON = """
import os, resource, socket, subprocess, sys, threading, time
def carrier(end):
    return os.readlink(f"/proc/self/fd/{end.fileno()}") in tcp() and "tcp" or "san"
def tcp():
    inodes = [line.split()[9] for line in open("/proc/net/tcp").readlines()[1:]]
    return {f"socket:[{inode}]" for inode in inodes}
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
listener.set_inheritable(True)
address = listener.getsockname()
def ask():
    client = socket.create_connection(address, timeout=5)
    client.settimeout(5)
    try:
        return carrier(client), client.recv(2).decode()
    except TimeoutError:
        return carrier(client), "silence"
def serve(count):
    for _ in range(count):
        accepted, _ = listener.accept()
        accepted.sendall(b"ok")
        accepted.close()
"""


def said(program: str, *options: str, policy: Path | None = None) -> list[str]:
    chosen = ["--policy", str(policy)] if policy else []
    done = subprocess.run([SANRUN, *chosen, "--", "/usr/bin/python3", "-c", COMMON + program, *options],
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_served_by_another_program() -> None:
    """S23, T4: a listener that its maker never served is handed on by exec; no client waits at its companion."""
    child = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); a, _ = s.accept(); a.sendall(b'ok')"
    assert said(f"""
if os.fork() == 0:
    os.environ.pop("LD_PRELOAD")
    os.execv("/usr/bin/python3", ["python3", "-c", {child!r}, str(listener.fileno())])
time.sleep(0.3)
print(*ask())
os.wait()
""") == ["tcp", "ok"]


def test_workers_stay_on_the_san() -> None:
    """S23, T4: a master that serves nothing itself and execs something else leaves its workers their companion."""
    assert said("""
worker = os.fork()
if worker == 0:
    serve(2)
    os._exit(0)
print(*ask())
if os.fork() == 0:
    os.execv("/bin/true", ["true"])
os.wait()
print(*ask())
""") == ["san", "ok", "san", "ok"]


def test_program_that_starts_itself_anew_without_the_switch() -> None:
    """S23, T4: as nginx does where it is upgraded. The new one serves alone once the old workers have gone, although
    their master goes on: no client waits at the companion."""
    child = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); a, _ = s.accept(); a.sendall(b'ok')"
    assert said(f"""
if os.fork() == 0:
    serve(1)
    os._exit(0)
print(*ask())
os.wait()
started, starts = os.pipe()
if os.fork() == 0:
    os.environ.pop("LD_PRELOAD")
    os.execv(sys.executable, ["python3", "-c", {child!r}, str(listener.fileno())])
os.close(starts)
os.read(started, 1)
print(*ask())
os.wait()
""") == ["san", "ok", "tcp", "ok"]


def test_server_that_hands_its_listener_on_and_ends() -> None:
    """S23, T5: a server that accepts, hands its listener to another by SCM_RIGHTS and closes it, as haproxy does when
    reloaded, loses no client that came meanwhile."""
    child = """
import socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
_, (fd,), _, _ = socket.recv_fds(end, 1, 1)
end.recv(1)
socket.socket(fileno=fd).accept()[0].sendall(b"ok")
"""
    assert said(f"""
listener.set_inheritable(False)
threading.Thread(target=serve, args=(1,)).start()
print(*ask())
ours, theirs = socket.socketpair()
other = subprocess.Popen(["/usr/bin/python3", "-c", {child!r}, str(theirs.fileno())], pass_fds=[theirs.fileno()])
socket.send_fds(ours, [b"x"], [listener.fileno()])
client = socket.create_connection(address, timeout=5)
listener.close()
ours.send(b"x")
print(carrier(client), client.recv(2).decode())
other.wait()
""") == ["san", "ok", "tcp", "ok"]


def test_lock_of_the_program_on_its_listener() -> None:
    """T3, T5: a lock that a program took on a blocking listener from elsewhere is still there after accept()."""
    worker = """
import fcntl, os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
fcntl.lockf(listener, fcntl.LOCK_EX)
listener.accept()[0].sendall(b"ok")
if os.fork() == 0:
    try:
        fcntl.lockf(listener, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("held", flush=True)
    os._exit(0)
os.wait()
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number, address = listener.fileno(), listener.getsockname()
        with subprocess.Popen([SANRUN, "--", "/usr/bin/python3", "-c", worker, str(number)], pass_fds=[number],
                              stdout=subprocess.PIPE, text=True) as program:
            try:
                with socket.create_connection(address, timeout=10) as client:
                    assert client.recv(2) == b"ok"
                assert program.communicate(timeout=10)[0] == "held\n"
            finally:
                program.kill()


def test_many_programs_accept_on_one_listener() -> None:
    """S23, T5: of programs that share a blocking listener from elsewhere, none that loses a TCP client to another waits
    for the next one while SAN clients wait for it."""
    worker = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    accepted, _ = listener.accept()
    accepted.sendall(b"ok")
    accepted.close()
"""
    clients = """
import socket, sys
def asks():
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2) as client:
        return client.recv(2) == b"ok"
print(all(asks() for _ in range(20)))
"""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        number, address = listener.fileno(), listener.getsockname()
        start = [SANRUN, "--", "/usr/bin/python3", "-c"]
        workers = [subprocess.Popen([*start, worker, str(number)], pass_fds=[number]) for _ in range(4)]
        try:
            end = time.monotonic() + 30
            while len(names_of(address[1])) < 8 and time.monotonic() < end:
                time.sleep(0.02)
            assert len(names_of(address[1])) == 8   # a listener and its beacon for each
            for count in (1, 2, 3, 1, 2, 3):
                for _ in range(60):
                    together = [socket.create_connection(address, timeout=5) for _ in range(count)]
                    assert [client.recv(2) for client in together] == [b"ok"] * count
                    for client in together:
                        client.close()
                    sleeping = [Path(f"/proc/{each.pid}/wchan").read_text() for each in workers]
                    assert "inet_csk_accept" not in sleeping
                done = subprocess.run([*start, clients, str(address[1])], capture_output=True, text=True, timeout=60)
                assert done.stdout == "True\n", done.stderr
            assert all(stats.process(each.pid).connections.get("unix", 0) > 4 for each in workers)
        finally:
            for each in workers:
                each.kill()
                each.wait()


@pytest.mark.parametrize(("number", "limit"), [(63, 1024), (64, 1024), (700, 1024), (4999, 8000), (9, 20)])
def test_number_of_an_inherited_listener(number: int, limit: int) -> None:
    """T4: a listener that comes by exec is found, whatever its number and however few or many there may be."""
    child = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.accept()[0].sendall(b'ok')"
    assert said(f"""
if os.fork() == 0:
    os.dup2(listener.fileno(), {number})
    resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.execv("/usr/bin/python3", ["python3", "-c", {child!r}, "{number}"])
listener.close()
print(*ask())
""") == ["san", "ok"]


@pytest.fixture
def plainly(tmp_path: Path) -> Path:
    """A policy by which programs with that argument listen on TCP."""
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\n[[process]]\narg = "plainly"\n[[process.rule]]\nrole = "listen"\nuse = "tcp"\n')
    return policy


def test_listener_of_a_program_that_is_to_use_tcp(plainly: Path) -> None:
    """P3, S23, T4: a listener that comes by exec follows the new program's policy, blocks as before, and no client
    waits at the companion."""
    child = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); print(s.getblocking(), flush=True); "
    child += "[s.accept()[0].sendall(b'ok') for _ in 'ab']"
    assert said(f"""
early = socket.create_connection(address, timeout=5)
print(carrier(early))
read, write = os.pipe()
if os.fork() == 0:
    os.dup2(write, 1)
    os.execv("/usr/bin/python3", ["python3", "-c", {child!r}, str(listener.fileno()), "plainly"])
os.close(write)
listener.close()
print(os.fdopen(read).readline().strip())
try:
    print(early.recv(2) or "ended")
except ConnectionResetError:
    print("ended")
print(*ask(), *ask())
""", policy=plainly) == ["san", "True", "ended", "tcp", "ok", "tcp", "ok"]


def test_listener_beside_a_program_that_is_to_use_tcp(plainly: Path) -> None:
    """P3, S23, T4: a server goes on on the SAN while a program that it started has its listener, but not
    its policy."""
    assert said("""
threading.Thread(target=serve, args=(2,)).start()
print(*ask())
child = subprocess.Popen(["/usr/bin/python3", "-c", "print('up', flush=True); input()", "plainly"],
                         stdin=-1, stdout=-1, text=True, close_fds=False)
print(child.stdout.readline().strip())
print(*ask())
child.communicate("x")
""", policy=plainly) == ["san", "ok", "up", "san", "ok"]


def test_fork_beside_a_start() -> None:
    """S23, T4: a child that is forked while another thread starts a program lets none inherit companions by accident,
    neither then nor after a start of its own."""
    assert said("""
def inheritable():
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    def flags(number):
        try:
            return int(open(f"/proc/self/fdinfo/{number}").read().split()[3], 8)
        except FileNotFoundError:
            return os.O_CLOEXEC
    return [number for number in numbers if number > 2 and not flags(number) & os.O_CLOEXEC]
print(inheritable() == [listener.fileno()], flush=True)
here, there = os.pipe()
os.set_inheritable(there, True)
starter = threading.Thread(target=os.system, args=(f"echo x >&{there}; exec sleep 1",))
starter.start()
os.read(here, 1)
os.set_inheritable(there, False)
child = os.fork()
if child == 0:
    print(inheritable() == [listener.fileno()])
    os.system("true")
    print(inheritable() == [listener.fileno()], flush=True)
    os._exit(0)
os.waitpid(child, 0)
starter.join()
print(inheritable() == [listener.fileno()])
""") == ["True"] * 4


@pytest.mark.parametrize("way", ["fork", "posix_spawn"])
def test_flags_of_an_inherited_listener(way: str) -> None:
    """T3, T4: another program finds a blocking listener blocking, and the maker's accept goes on to wait."""
    look = "import fcntl, os, sys; print(bool(fcntl.fcntl(int(sys.argv[1]), fcntl.F_GETFL) & os.O_NONBLOCK))"
    assert said(f"""
words = ["python3", "-c", {look!r}, str(listener.fileno())]
if {way!r} == "fork":
    child = os.fork()
    if child == 0:
        os.execv("/usr/bin/python3", words)
else:
    child = os.posix_spawn("/usr/bin/python3", words, os.environ)
os.waitpid(child, 0)
server = threading.Thread(target=serve, args=(1,))
server.start()
print(ask()[1])
server.join()
""") == ["False", "ok"]


def test_fork_while_another_thread_accepts() -> None:
    """S23, T4: a child that closed the listener keeps no companion of it, though a thread was in accept at the fork."""
    assert said("""
threading.Thread(target=serve, args=(1,), daemon=True).start()
time.sleep(0.3)
ready, done = os.pipe()
child = os.fork()
if child == 0:
    listener.close()
    os.write(done, b"x")
    time.sleep(5)
    os._exit(0)
os.read(ready, 1)
names = [line.split()[-1] for line in open("/proc/net/unix", errors="replace") if f"L/127.0.0.1:{address[1]}/" in line]
print(len(names))
held = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
inodes = [line.split()[6] for line in open("/proc/net/unix", errors="replace") if f"L/127.0.0.1:{address[1]}/" in line]
print(sum(f"socket:[{inode}]" in held for inode in inodes))
os.kill(child, 9)
print(ask()[1])
""") == ["2", "0", "ok"]


def test_parked_sockets_are_given_back() -> None:
    """X6: a program at its hard limit of descriptors gets the numbers of parked sockets for connections of its own."""
    (count,) = said("""
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
ends = []
try:
    while len(ends) < 64:
        ends.append(socket.socket())
        ends[-1].connect(address)
    while True:
        ends.append(socket.socket())
except OSError:
    print(len(ends))
""")
    assert int(count) >= 105, count


@pytest.mark.parametrize("way", ["daemon(1, 0)", "login_tty(other)"])
def test_numbers_that_libc_replaces(way: str) -> None:
    """T10: daemon() and login_tty() put another file under 0, 1 and 2 by calls that no hook sees."""
    program = """
import ctypes, pty
out = os.dup(1)
terminal, other = pty.openpty()
client = socket.create_connection(address)
was = carrier(client)
for number in range(3):
    os.dup2(client.fileno(), number)
done = ctypes.CDLL(None).WAY
os.write(out, f"{was} {done} {os.write(0, b'x')} {os.write(1, b'x')} {os.write(2, b'x')}".encode())
"""
    assert said(program.replace("WAY", way)) == ["san", "0", "1", "1", "1"]
