"""Listeners that one program makes and another serves: by exec, a spawned process, SCM_RIGHTS, socket activation, or by
listening on a socket that the parent bound. No client waits for a program that never accepts, and programs that are
interposed serve by the SAN what they received.

The programs are Python of a few lines. A server answers every connection with its process id and its wait."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from puppet import HOSTS, plain_environment, switched_environment
from world import free_port, names_of

from interposer.diag import stats

WAIT = 15.0
PYTHON = "/usr/bin/python3"
HOST = "127.0.0.1"
WAYS = ("accept", "poll", "select", "epoll", "exclusive")

COMMON = "import os, signal, socket, subprocess, sys\nfrom sharing import *\n"


@dataclass(frozen=True)
class Reply:
    """What a client saw: who carried it, and the server's process id and way to wait, or what went wrong."""

    carrier: str
    pid: int = 0
    way: str = ""
    problem: str = ""


CLIENT = f"""
import os, socket, sys
for number in range(int(sys.argv[2])):
    end = socket.create_connection(("{HOST}", int(sys.argv[1])), timeout={WAIT})
    if len(sys.argv) > 3:
        os.write(1, b"connected\\n")
    try:
        said = end.recv(200).decode()
        problem = "" if said else "end"
        if said and said.split()[2:] != ["%s:%d" % end.getsockname(), "%s:%d" % end.getpeername()]:
            problem = said + " but " + str((end.getsockname(), end.getpeername()))
    except OSError as error:
        said, problem = "", type(error).__name__
    inode = os.readlink("/proc/self/fd/%d" % end.fileno())[8:-1]
    carrier = "tcp" if any(line.split()[9] == inode for line in open("/proc/net/tcp").readlines()[1:]) else "san"
    print(carrier, *(said.split()[:2] or ["0", "-"]), problem)
"""


class Yard:
    """Starts servers and clients, and ends them all."""

    def __init__(self) -> None:
        self.port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, program: str, *arguments: str, switched: bool = True, common: bool = True
    ) -> subprocess.Popen[str]:
        environment = switched_environment() if switched else plain_environment()
        process: subprocess.Popen[str] = subprocess.Popen(
            [PYTHON, "-c", COMMON + program if common else program, *arguments],
            env={**environment, "PYTHONPATH": str(HOSTS)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def server(self, program: str, switched: bool = True) -> subprocess.Popen[str]:
        """A program that says "ready" when clients may come."""
        process = self.start(f"port = {self.port}\n" + program, switched=switched)
        self.told(process)
        return process

    @staticmethod
    def told(process: subprocess.Popen[str], word: str = "ready") -> None:
        assert process.stdout
        assert process.stdout.readline().strip() == word

    def client(self, switched: bool = True) -> subprocess.Popen[str]:
        """A client that has connected."""
        process = self.start(CLIENT, str(self.port), "1", "wait", switched=switched, common=False)
        self.told(process, "connected")
        return process

    @staticmethod
    def replies(process: subprocess.Popen[str]) -> list[Reply]:
        out, _ = process.communicate(timeout=WAIT + 5)
        split = (line.split(maxsplit=3) for line in out.splitlines())
        return [Reply(words[0], int(words[1]), words[2], "".join(words[3:]).strip()) for words in split]

    def ask(self, count: int = 4, switched: bool = True) -> list[Reply]:
        """What a client sees on that many connections, one after the other."""
        seen = self.replies(self.start(CLIENT, str(self.port), str(count), switched=switched, common=False))
        assert len(seen) == count
        return seen

    def close(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(WAIT)
            if process.stdout:
                process.stdout.close()
        end = time.monotonic() + 5
        while names_of(self.port) and time.monotonic() < end:
            time.sleep(0.01)
        assert not names_of(self.port)


@pytest.fixture
def yard() -> Iterator[Yard]:
    made = Yard()
    yield made
    made.close()


def on_san(*replies: Reply, pid: int = 0) -> None:
    """By the clients' own descriptors and by the servers' counters."""
    for reply in replies:
        assert (reply.carrier, reply.problem) == ("san", ""), replies
        assert stats.process(reply.pid).connections.get("unix"), reply
        assert not pid or reply.pid == pid, reply


def on_tcp(*replies: Reply) -> None:
    for reply in replies:
        assert (reply.carrier, reply.problem) == ("tcp", ""), replies


# ---- a master that listens, and workers that serve

STARTS = {
    "fork": "if os.fork() == 0:\n    os.execve(PYTHON, worker(fd, way), env)",
    "execvp": "if os.fork() == 0:\n    os.execvpe('python3', worker(fd, way), env)",
    "vfork": "subprocess.Popen(worker(fd, way), env=env, pass_fds=[fd])",
    "keep all": "subprocess.Popen(worker(fd, way), env=env, close_fds=False)",
    "spawn": "os.posix_spawn(PYTHON, worker(fd, way), env)",
    "actions": "listener.set_inheritable(False)\n"
    "os.posix_spawn(PYTHON, worker(50, way), env, file_actions=[(os.POSIX_SPAWN_DUP2, fd, 50)])",
    "system": "import threading\n"
    "os.environ.clear(); os.environ.update(env)\n"
    "threading.Thread(target=os.system, args=(' '.join(worker(fd, way)),)).start()",
    "popen": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "os.environ.clear(); os.environ.update(env)\n"
    "libc.popen(' '.join(worker(fd, way)).encode(), b'w')",
}


def master(start: str, env: str = "os.environ.copy()", way: str = "accept", before: str = "", count: int = 1) -> str:
    return f"""
listener = listen(port)
fd, way, env = listener.fileno(), {way!r}, {env}
{before}
for _ in range({count}):
    {STARTS[start].replace(chr(10), chr(10) + "    ")}
signal.pause()
"""


@pytest.mark.parametrize("start", STARTS)
def test_master_that_only_listens(yard: Yard, start: str) -> None:
    """S23, T4: the workers of a master that never waits itself serve its listener by the SAN."""
    server = yard.server(master(start))
    replies = yard.ask()
    on_san(*replies)
    assert server.pid not in {reply.pid for reply in replies}
    on_tcp(*yard.ask(1, switched=False))


@pytest.mark.parametrize("start", STARTS)
def test_worker_that_is_not_interposed(yard: Yard, start: str) -> None:
    """S23, T4: where the workers are not interposed all clients go by TCP, and none waits for the master."""
    yard.server(master(start, env="plain()"))
    on_tcp(*yard.ask())


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_wait(yard: Yard, way: str) -> None:
    """S23, T2, T4: workers serve what they inherited however they wait."""
    yard.server(master("vfork", way=way, count=2))
    on_san(*yard.ask(8))
    on_tcp(*yard.ask(1, switched=False))


@pytest.mark.parametrize("start", ["fork", "vfork", "spawn", "actions", "system"])
def test_supervisor_that_waits_and_leaves_accepting_to_others(yard: Yard, start: str) -> None:
    """S23, T4, T5: the client that wakes a supervisor is served by the program that it starts then."""
    server = yard.start(f"port = {yard.port}\n" + master(start, before="ready()\nwait(listener, 'poll')"))
    yard.told(server)
    first = yard.client()
    yard.told(server)
    on_san(*yard.replies(first), *yard.ask())


@pytest.mark.parametrize("start", ["fork", "vfork", "spawn", "actions", "system"])
def test_supervisor_of_a_plain_program(yard: Yard, start: str) -> None:
    """S23, T4: a client that wakes a supervisor of a plain program does not hang; those after it go by TCP."""
    server = yard.start(
        f"port = {yard.port}\n" + master(start, env="plain()", before="ready()\nwait(listener, 'poll')")
    )
    yard.told(server)
    first = yard.client()
    yard.told(server)
    on_tcp(*yard.ask())
    (reply,) = yard.replies(first)
    assert (reply.carrier, reply.problem) in (("san", "end"), ("san", "ConnectionResetError"))


def test_supervisor_that_waits_again(yard: Yard) -> None:
    """S23: who handed a listener on and waits again has a companion again."""
    yard.server("""
listener = listen(port)
subprocess.run(["/bin/true"], env=plain(), close_fds=False)
ready()
serve(listener, "epoll")
""")
    on_san(*yard.ask(4)[1:])            # the first finds no companion, and the server makes one as it accepts


@pytest.mark.parametrize("through", ["directly", "a shell"])
def test_server_that_leaks_its_listener(yard: Yard, through: str) -> None:
    """S23, T4: a server that accepts keeps its companion and who waits there, whoever inherits its listener, also by
    way of a program that is interposed and starts one that is not."""
    server = yard.server(f"""
listener = listen(port)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
ready()
listener.accept()[0].close()
ready()
signal.sigwait([signal.SIGUSR1])
if {through!r} == "directly":
    subprocess.run(["/bin/true"], env=plain(), close_fds=False)
    sleeper = subprocess.Popen(["/bin/sleep", "60"], env=plain(), close_fds=False)
else:
    os.system("env -i /bin/true")
serve(listener, "poll")
""")
    yard.client()
    yard.told(server)
    waiting = yard.client()
    os.kill(server.pid, signal.SIGUSR1)
    on_san(*yard.replies(waiting), *yard.ask(), pid=server.pid)


def test_start_of_a_program_that_is_not_there(yard: Yard) -> None:
    """T4, S23: who waits for the first accept() loses nothing by the failing start of another program."""
    server = yard.server("""
listener = listen(port)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
ready()
signal.sigwait([signal.SIGUSR1])
for start in (lambda: os.posix_spawn("/nowhere", ["x"], {}), lambda: os.posix_spawnp("nowhere", ["x"], {}),
              lambda: os.execve("/nowhere", ["x"], {})):
    try:
        start()
    except FileNotFoundError:
        pass
serve(listener, "poll")
""")
    waiting = yard.client()
    os.kill(server.pid, signal.SIGUSR1)
    on_san(*yard.replies(waiting), *yard.ask(), pid=server.pid)


@pytest.mark.parametrize("plainly", [False, True])
def test_sleeper_that_outlives_the_server(yard: Yard, plainly: bool) -> None:
    """S23: a child that keeps a listener after its server has gone has a companion only if it is interposed."""
    server = yard.server(f"""
listener = listen(port)
subprocess.Popen(["/bin/sleep", "60"], env=plain() if {plainly} else None, close_fds=False)
ready()
serve(listener)
""")
    on_san(*yard.ask(1))
    os.kill(server.pid, signal.SIGKILL)
    server.wait(WAIT)
    kept = [name for name in names_of(yard.port) if "/L/" in name]
    assert bool(kept) != plainly, kept   # an interposed program holds what TCP holds: the listener and its companion


# ---- a program in the place of another

@pytest.mark.parametrize("backlog", [0, 3])
def test_exec_of_the_server(yard: Yard, backlog: int) -> None:
    """S23, S27, T4: a server that puts another program in its own place loses no connection, waiting ones neither."""
    server = yard.server("""
listener = listen(port)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
ready()
signal.sigwait([signal.SIGUSR1])
os.execv(PYTHON, worker(listener.fileno(), "poll"))
""")
    waiting = [yard.client() for _ in range(backlog)]
    os.kill(server.pid, signal.SIGUSR1)
    yard.told(server)
    for client in waiting:
        on_san(*yard.replies(client), pid=server.pid)
    on_san(*yard.ask(), pid=server.pid)


@pytest.mark.parametrize("why", ["effective user", "no /proc"])
def test_exec_where_the_switch_cannot_follow(yard: Yard, why: str) -> None:
    """S23, T4, X3: the loader preloads nothing where real and effective user differ, and without /proc nothing
    is found that was handed on: clients go by TCP, and none waits."""
    how = {
        "effective user": "os.setresuid(0, 65534, 0)",
        "no /proc": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.unshare(0x20000) == 0\n"
        "assert libc.mount(b'none', b'/', None, 0x44000, None) == 0\n"
        "assert libc.mount(b'none', b'/proc', b'tmpfs', 0, None) == 0",
    }[why]
    server = yard.server(f"""
listener = listen(port)
{how}
os.execv(PYTHON, worker(listener.fileno(), "accept"))
""")
    on_tcp(*yard.ask())
    assert server.poll() is None


def test_new_program_beside_the_old(yard: Yard) -> None:
    """S23, T4: a server that starts its successor with the same listener and ends leaves no client unserved, nor those
    that waited for it."""
    server = yard.server("""
listener = listen(port)
signal.signal(signal.SIGUSR1, lambda *_: os.fork() or os.execv(PYTHON, worker(listener.fileno(), "epoll")))
ready()
serve(listener)
""")
    on_san(*yard.ask(1), pid=server.pid)
    os.kill(server.pid, signal.SIGUSR1)
    yard.told(server)
    os.killpg(server.pid, signal.SIGSTOP)   # clients gather while nobody serves
    waiting = [yard.client() for _ in range(4)]
    os.kill(server.pid, signal.SIGKILL)
    os.killpg(server.pid, signal.SIGCONT)
    for client in waiting:
        on_san(*yard.replies(client))


@pytest.mark.parametrize("then", ["switched", "plain", "fails"])
def test_epoll_through_exec(yard: Yard, tmp_path: Path, then: str) -> None:
    """T2, T4: an epoll that lives through exec, or through one that fails, goes on to tell of a listener, once."""
    second = """
import os, select, signal, socket, sys
same, watch = socket.socket(fileno=int(sys.argv[1])), select.epoll.fromfd(int(sys.argv[2]))
os.write(1, b"ready\\n")
for _ in range(4):
    assert watch.poll(10) == [(same.fileno(), select.EPOLLIN)]
    end, peer = same.accept()
    end.sendall(("%d epoll %s:%d %s:%d" % (os.getpid(), *peer, *end.getsockname())).encode())
    assert watch.poll(0) == []
try:
    watch.register(same.fileno(), select.EPOLLIN)
except FileExistsError:
    os.write(1, b"registered\\n")
signal.pause()
"""
    (tmp_path / "program").write_text(second)
    server = yard.start(f"""
import select
listener = listen({yard.port})
epoll = select.epoll()
epoll.register(listener.fileno(), select.EPOLLIN)
os.set_inheritable(epoll.fileno(), True)
words = [{str(tmp_path / "program")!r}, str(listener.fileno()), str(epoll.fileno())]
if {then!r} == "fails":
    try:
        os.execv("/nowhere", words)
    except FileNotFoundError:
        sys.argv = words
        exec(open(words[0]).read())
else:
    os.execve(PYTHON, [PYTHON, *words], plain() if {then!r} == "plain" else os.environ)
""")
    yard.told(server)
    replies = yard.ask()
    (on_tcp if then == "plain" else on_san)(*replies)
    yard.told(server, "registered")


def test_failed_exec(yard: Yard, tmp_path: Path) -> None:
    """S23, T4: an exec that fails leaves a server as it was, and its companion close-on-exec."""
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/true").read_bytes())   # nobody may execute it
    server = yard.server(f"""
listener = listen(port)
for path in ("{program}", "/nonexistent", "/etc/passwd", "{program}"):
    try:
        os.execv(path, ["x"])
    except OSError:
        pass
held = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 20]
assert not any(os.get_inheritable(fd) for fd in held), held
ready()
serve(listener)
""")
    on_san(*yard.ask(), pid=server.pid)


@pytest.mark.parametrize("keeps", [False, True])
def test_flags_of_one_among_many(yard: Yard, keeps: bool) -> None:
    """T3, T4: what a family knows of a listener outlives all those that a child makes and closes; where it keeps them,
    a later listener begins afresh."""
    program = f"""
import fcntl
first = listen(0)
def flag(listener):
    return bool(fcntl.fcntl(listener, fcntl.F_GETFL) & os.O_NONBLOCK)
if os.fork() == 0:
    first.setblocking(False)
    kept = []
    for number in range(60 if {keeps} else 4500):
        kept.append(socket.socket())
        kept[-1].setblocking(False)
        kept[-1].listen()
        if not {keeps}:
            kept.clear()
    os._exit(0)
os.wait()
second = listen(0)
print(flag(first), flag(second))
"""
    assert yard.start(program).communicate(timeout=WAIT)[0] == "True False\n"


def test_flags_follow(yard: Yard) -> None:
    """T3, T4: the next program finds a listener's O_NONBLOCK as the program before saw it."""
    for nonblocking in (False, True):
        done = yard.start(f"""
listener = listen({free_port()})
listener.setblocking({not nonblocking})
look = "import fcntl, os, sys; print(bool(fcntl.fcntl(int(sys.argv[1]), fcntl.F_GETFL) & os.O_NONBLOCK))"
os.execv(PYTHON, [PYTHON, "-c", look, str(listener.fileno())])
""")
        assert done.communicate(timeout=WAIT)[0].strip() == str(nonblocking)


# ---- SCM_RIGHTS

SENDER = """
import tempfile
listener = listen(port)
path = sys.argv[1]
door = socket.socket(socket.AF_UNIX)
door.bind(path)
door.listen()
ready()
end, _ = door.accept()
{before}
socket.send_fds(end, [b"x"], [listener.fileno()])
{after}
signal.pause()
"""
RECEIVER = """
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
_, fds, _, _ = socket.recv_fds(end, 1, 4)
listener = socket.socket(fileno=fds[0])
ready()
serve(listener, sys.argv[2])
"""


@pytest.mark.parametrize("way", ["accept", "poll", "epoll"])
@pytest.mark.parametrize("keeps", [False, True])
def test_listener_by_descriptor_passing(yard: Yard, tmp_path: Path, way: str, keeps: bool) -> None:
    """S23, T5, S27: a program that receives a listener serves it by the SAN; who sent it may close or keep it."""
    door = str(tmp_path / "door")
    program = SENDER.format(before="", after="" if keeps else "listener.close()")
    yard.told(yard.start(f"port = {yard.port}\n" + program, door))
    receiver = yard.start(RECEIVER, door, way)
    yard.told(receiver)
    replies = yard.ask()
    assert all(not reply.problem and reply.pid == receiver.pid for reply in replies), replies
    on_san(*replies[1:])                 # the first may have come before the receiver waited
    on_tcp(*yard.ask(1, switched=False))


@pytest.mark.parametrize("sides", ["plain receiver", "plain sender"])
def test_listener_passed_to_and_from_plain_programs(yard: Yard, tmp_path: Path, sides: str) -> None:
    """S23, T5: a plain receiver serves all clients by TCP; an interposed one has the SAN whoever made the listener."""
    door = str(tmp_path / "door")
    program = SENDER.format(before="", after="")
    yard.told(yard.start(f"port = {yard.port}\n" + program, door, switched=sides != "plain sender"))
    receiver = yard.start(RECEIVER, door, "poll", switched=sides != "plain receiver")
    yard.told(receiver)
    replies = yard.ask()
    assert all(not reply.problem and reply.pid == receiver.pid for reply in replies), replies
    if sides == "plain sender":
        on_san(*replies[1:])
    else:
        on_tcp(*replies)


# ---- socket activation

ACTIVATOR = """
listener = listen(port)
os.dup2(listener.fileno(), 3)
{before}
os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
os.environ.update(dict(word.split("=", 1) for word in sys.argv[1:]))
os.execve(PYTHON, worker(3, "{way}"), {env})
"""


@pytest.mark.parametrize("way", ["accept", "epoll"])
@pytest.mark.parametrize("switched", [False, True])
def test_socket_activation(yard: Yard, way: str, switched: bool) -> None:
    """T5, S7, S23: a service under sanrun whose listener a plain manager made serves TCP and SAN, a plain one TCP."""
    words = switched_environment() if switched else {}
    chosen = [f"{name}={word}" for name, word in words.items() if name.startswith(("LD_PRELOAD", "INTERPOSER"))]
    program = ACTIVATOR.format(before="", way=way, env="os.environ")
    service = yard.start(f"port = {yard.port}\n" + program, *chosen, switched=False)
    yard.told(service)
    replies = yard.ask()
    assert all(not reply.problem and reply.pid == service.pid for reply in replies), replies
    if switched:
        on_san(*replies[1:])
        assert stats.process(service.pid).listeners["unix"] == 1
    on_tcp(*yard.ask(1, switched=False))


@pytest.mark.parametrize("switched", [False, True])
def test_activation_by_the_first_client(yard: Yard, switched: bool) -> None:
    """T5, S23: the first client of a service manager that waits for it, as systemd-socket-activate does, is served."""
    env = "os.environ" if switched else "plain()"
    words = ACTIVATOR.format(before="ready()\nwait(listener, 'epoll')", way="accept", env=env)
    service = yard.start(f"port = {yard.port}\n" + words)
    yard.told(service)
    first = yard.client()
    yard.told(service)
    if switched:
        on_san(*yard.replies(first), *yard.ask(), pid=service.pid)
    else:
        on_tcp(*yard.ask())
        assert yard.replies(first)[0].problem in ("end", "ConnectionResetError")


# ---- listening on a socket that another process bound

@pytest.mark.parametrize("way", ["accept", "epoll"])
def test_spawned_workers_that_listen(yard: Yard, way: str) -> None:
    """S23, T4, T8: programs that listen on a socket which their parent bound serve it by the SAN, each its share."""
    yard.server(f"""
listener = listen(port, 0)
for _ in range(2):
    subprocess.Popen(worker(listener.fileno(), {way!r}) + ["16"], pass_fds=[listener.fileno()])
signal.pause()
""")
    Yard.told(yard.started[0])
    replies = yard.ask(24)
    assert not any(reply.problem for reply in replies)
    on_san(*replies[4:])
    assert len({reply.pid for reply in replies}) == 2
    on_tcp(*yard.ask(1, switched=False))


@pytest.mark.parametrize("who", ["child", "parent"])
def test_bound_before_a_fork(yard: Yard, who: str) -> None:
    """S23, T4, O1: a socket that was bound before a fork and listens after it stays on TCP with a reason: any of the
    processes may be the one that accepts."""
    server = yard.server(f"""
listener = listen(port, 0)
child = os.fork()
if child == 0:
    listener.listen(16)
    if {who!r} == "child":
        ready()
        serve(listener)
    os._exit(0)
if {who!r} == "child":
    signal.pause()
os.waitpid(child, 0)
ready()
serve(listener)
""")
    replies = yard.ask()
    on_tcp(*replies)
    if who == "child":
        assert stats.process(replies[0].pid).reasons["SHARED"], server.pid


@pytest.mark.parametrize("explicit", [False, True])
def test_connect_after_the_shutdown_of_a_listener(yard: Yard, explicit: bool) -> None:
    """S12, T9, T12: a listener that was shut down connects from a port of its own as TCP does: from its old one if the
    program had named it, else from another, which nobody else can have meanwhile."""
    for switched in (False, True):
        done = yard.start(f"""
target = socket.create_server(("127.0.0.1", 0))
listener = socket.create_server(("127.0.0.1", {yard.port if explicit else 0}))
port = listener.getsockname()[1]
listener.shutdown(socket.SHUT_RDWR)
listener.connect(target.getsockname())
print(listener.getsockname()[1] == port, target.accept()[1] == listener.getsockname())
""", switched=switched)
        assert done.communicate(timeout=WAIT)[0].split() == [str(explicit), "True"]
