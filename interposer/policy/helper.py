"""The helper process: the policy engine for programs that cannot have one in them, asked over AF_UNIX (P8).

One thread answers, another runs users' functions, so that a slow function delays nobody but those who ask it. The
messages are those of native/helper.h. Ends when every program that it was started for has ended and no client is left.
"""

from __future__ import annotations

import _queue
import _socket
import _thread
import os
import select
import stat
import struct
import sys
import time

from interposer.policy import reasons
from interposer.policy.engine import Engine, Facts
from interposer.policy.functions import Functions, forget_modules, tcp
from interposer.policy.guard import refuse_imports
from interposer.policy.request import OPTION_SIZE
from interposer.policy.table import ACTION_ASK, FUNCTION_NONE, MAX_SIZE, Table, TableError, sound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from interposer.policy.functions import Answer

FACT, REQUEST, ANSWER, WATCH = 1, 2, 3, 4
HEAD = struct.Struct("=II")
# type, number, generation; role, family, noptions, function, rule; local and remote: ip, scope, port, reserved. The
# options follow.
QUESTION = struct.Struct("=IIQBBHII16sIHH16sIHH4x")
# type, number, generation; action, otherwise, providers, reason, rule, function, buffers, remember_ms
REPLY = struct.Struct("=IIQBB4sHIIIII4x")
PEER = struct.Struct("=3i")
DESCRIPTORS = struct.Struct("=4i")

FACTS_MAX = 8 << 20
MESSAGE_MAX = 65536
TIMEOUTS_ALLOWED = 3


class Client:
    """One connection. The facts arrive in pieces before the first request."""

    def __init__(self, connection: _socket.socket) -> None:
        self.connection = connection
        self.pieces: dict[int, bytes] = {}
        self.size = 0
        self.generation = 0
        self.facts: Facts | None = None
        self.engine: Engine | None = None
        self.functions: Functions | None = None


class Job:
    """One call of a function for a client."""

    __slots__ = (
        "answered",
        "arguments",
        "client",
        "deadline",
        "functions",
        "generation",
        "number",
        "otherwise",
        "result",
        "timeout",
    )

    def __init__(
        self,
        client: Client,
        number: int,
        functions: Functions,
        arguments: tuple[int, int, int, int, bytes, int, bytes, int, bytes],
        otherwise: int,
        timeout: float,
    ) -> None:
        self.client = client
        self.number = number
        self.generation = client.generation
        self.functions = functions
        self.arguments = arguments
        self.otherwise = otherwise
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        self.result: Answer | None = None
        self.answered = False


class Worker:
    """The thread that runs functions. One that hangs is left behind and replaced."""

    def __init__(self, done: int) -> None:
        self.queue: _queue.SimpleQueue[Job | Functions] = _queue.SimpleQueue()
        self.busy_since: float | None = None
        self.current: object = None
        self._done = done
        _thread.start_new_thread(self._run, ())

    def replaced(self) -> Worker:
        """A new worker with the jobs that this one did not begin."""
        other = Worker(self._done)
        while True:
            try:
                other.queue.put(self.queue.get_nowait())
            except _queue.Empty:
                return other

    def _run(self) -> None:
        while True:
            job = self.queue.get()
            self.current, self.busy_since = job, time.monotonic()
            if isinstance(job, Functions):
                job.find_all()
            elif not job.answered:
                job.result = job.functions.decide(*job.arguments)
                os.write(self._done, b"x")
            self.current = self.busy_since = None


class Helper:
    def __init__(self, listener: _socket.socket, table_path: str, watched: list[int], log: int) -> None:
        self.listener = listener
        self.table_path = table_path
        self.watched = {fd: watched_pid(fd) for fd in watched}
        self.log_fd = log
        self.clients: dict[int, Client] = {}
        self.jobs: list[Job] = []
        self.timeouts = 0
        self.checked = 0.0
        self.stamp: tuple[int, int, int] | None = None
        self.poll = select.poll()
        self.done_read, done_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.worker = Worker(done_write)
        self.table = self.read_table()

    def log(self, line: str) -> None:
        if self.log_fd >= 0:
            now = time.time()
            text = f"{now:.6f} {os.getpid()} helper: {line}\n"
            os.write(self.log_fd, text.encode("utf-8", "backslashreplace"))

    # --- the table ---

    def read_table(self) -> Table:
        """The table as it is on disk. Raises OSError and TableError; nothing that others can write to is believed."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        with open(os.open(self.table_path, flags), "rb") as source:
            status = os.fstat(source.fileno())
            ours = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid())
            if not ours or status.st_mode & 0o022 or status.st_size > MAX_SIZE:
                raise TableError("not a table of ours")
            data = source.read(MAX_SIZE)
        if not sound(data):
            raise TableError("not a whole table")
        table = Table(data)
        forget_modules()
        self.timeouts = 0
        self.stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        self.checked = time.monotonic()
        for folder in table.search_path:
            if folder not in sys.path:
                sys.path.append(folder)
        if table.functions:
            # Imported now, so that an import counts against nobody's time.
            self.worker.queue.put(Functions(table, Facts(), self.log))
        return table

    def reload(self, generation: int) -> None:
        now = time.monotonic()
        if generation == self.table.generation and now - self.checked < 0.9:
            return
        self.checked = now
        try:
            status = os.stat(self.table_path)
            if (status.st_ino, status.st_mtime_ns, status.st_size) != self.stamp:
                self.table = self.read_table()
        except (OSError, TableError) as error:
            self.log(f"{self.table_path}: {error}")

    # --- the loop ---

    def run(self) -> None:
        """Until nobody is left to serve."""
        self.poll.register(self.listener.fileno(), select.POLLIN)
        self.poll.register(self.done_read, select.POLLIN)
        for pidfd in self.watched:
            self.poll.register(pidfd, select.POLLIN)
        while self.watched or self.clients:
            for fd, _ in self.poll.poll(self.until_deadline()):
                if fd == self.listener.fileno():
                    self.accept()
                elif fd == self.done_read:
                    os.read(self.done_read, 4096)
                elif fd in self.watched:
                    del self.watched[fd]
                    self.poll.unregister(fd)
                    os.close(fd)
                elif fd in self.clients:
                    self.serve(self.clients[fd])
            self.finish_jobs()

    def until_deadline(self) -> float | None:
        if not self.jobs:
            return None
        return max(0.0, min(job.deadline for job in self.jobs) - time.monotonic()) * 1000 + 1

    def accept(self) -> None:
        try:
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]
        except OSError:
            time.sleep(0.05)  # out of descriptors: not for ever, and not in a busy loop
            return
        connection = _socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        peer = PEER.unpack(connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, PEER.size))
        if peer[1] not in (0, os.geteuid()):
            self.log(f"user {peer[1]} is not served")
            connection.close()
            return
        connection.setblocking(False)
        self.clients[fd] = Client(connection)
        self.poll.register(fd, select.POLLIN)

    def drop(self, client: Client) -> None:
        fd = client.connection.fileno()
        if fd >= 0:
            del self.clients[fd]
            self.poll.unregister(fd)
            client.connection.close()

    def serve(self, client: Client) -> None:
        try:
            message, control, _, _ = client.connection.recvmsg(
                MESSAGE_MAX, _socket.CMSG_SPACE(DESCRIPTORS.size), _socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.drop(client)
            return
        received = descriptors(control)
        kind = HEAD.unpack_from(message)[0] if len(message) >= HEAD.size else 0
        pid = watched_pid(received[0]) if kind == WATCH and len(received) == 1 else None
        if pid is not None:
            self.watch(received[0], pid)
            self.send(client, message)
            return
        for fd in received:
            os.close(fd)
        if kind == FACT and not client.facts:
            field = HEAD.unpack_from(message)[1]
            client.size += len(message)
            if client.size <= FACTS_MAX:
                client.pieces[field] = client.pieces.get(field, b"") + message[HEAD.size :]
                return
        elif kind == REQUEST and len(message) >= QUESTION.size:
            self.answer(client, message)
            return
        self.drop(client)

    def watch(self, pidfd: int, pid: int) -> None:
        if pid in self.watched.values():
            os.close(pidfd)  # told again, by a reload
            return
        self.watched[pidfd] = pid
        self.poll.register(pidfd, select.POLLIN)

    def send(self, client: Client, message: bytes) -> None:
        try:
            client.connection.send(message, _socket.MSG_NOSIGNAL)
        except OSError:
            self.drop(client)

    def answer(self, client: Client, message: bytes) -> None:
        (
            _, number, generation, role, family, count, function, rule,
            local_ip, _, local_port, _, remote_ip, _, remote_port, _,
        ) = QUESTION.unpack_from(message)  # fmt: skip
        options = message[QUESTION.size :]
        if len(options) != count * OPTION_SIZE:
            self.drop(client)
            return
        self.reload(generation)
        if client.facts is None:
            client.facts = facts_of(client.pieces)
        if client.engine is None or client.functions is None or client.generation != self.table.generation:
            client.generation = self.table.generation
            client.engine = Engine(self.table, client.facts)
            client.functions = Functions(self.table, client.facts, self.log)
        otherwise = 0
        if function == FUNCTION_NONE or generation != self.table.generation or function >= len(self.table.functions):
            # The numbers of another table mean nothing here: the whole decision, by the table of today.
            action, otherwise, providers, reason, rule, function = client.engine.decide(
                role, family, local_ip, local_port, remote_ip, remote_port
            )
            if action != ACTION_ASK:
                self.reply(client, number, client.generation, (action, otherwise, providers, reason, 0, 0, 0), rule)
                return
        if self.timeouts >= TIMEOUTS_ALLOWED:
            self.reply(client, number, client.generation, tcp(reasons.FUNCTION_REFUSED, otherwise), rule)
            return
        timeout = self.table.functions[function].timeout_ms / 1000
        arguments = (function, rule, role, family, local_ip, local_port, remote_ip, remote_port, options)
        job = Job(client, number, client.functions, arguments, otherwise, timeout)
        self.jobs.append(job)
        self.worker.queue.put(job)

    def finish_jobs(self) -> None:
        now = time.monotonic()
        for job in [job for job in self.jobs if job.result is not None or now >= job.deadline]:
            self.jobs.remove(job)
            job.answered = True
            rule = job.arguments[1]
            if job.result is not None:
                answer = (job.result[0], job.result[1] or job.otherwise, *job.result[2:])
                self.reply(job.client, job.number, job.generation, answer, rule)
                continue
            answer = tcp(reasons.FUNCTION_TIMEOUT, job.otherwise)
            self.reply(job.client, job.number, job.generation, answer, rule)
            since = self.worker.busy_since
            if self.worker.current is job or (since is not None and now - since >= job.timeout):
                self.timeouts += 1
                self.worker = self.worker.replaced()

    def reply(self, client: Client, number: int, generation: int, answer: Answer, rule: int) -> None:
        """`generation` is of the table by which it was decided."""
        action, otherwise, providers, reason, *rest = answer
        if client.connection.fileno() >= 0:
            head = (ANSWER, number, generation, action, otherwise, bytes(providers), reason, rule, FUNCTION_NONE)
            self.send(client, REPLY.pack(*head, *rest))


def prepare(listening_socket_fd: int, table_path: str, watch_pidfd: int, log_fd: int = -1) -> Helper:
    """One whose run() answers on a listening AF_UNIX SOCK_SEQPACKET socket until the watched process and all clients
    are gone.

    Raises OSError or TableError when the table cannot be read at the start.
    """
    listener = _socket.socket(fileno=listening_socket_fd)
    listener.setblocking(False)
    sys.dont_write_bytecode = True
    refuse_imports()  # nothing here needs protection, but a function behaves the same wherever it runs
    return Helper(listener, table_path, [watch_pidfd], log_fd)


def watched_pid(fd: int) -> int | None:
    """The process behind a pidfd, a number that none has where it is gone; None where the descriptor is no pidfd, which
    need not become readable when a client ends."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            for line in info:
                if line.startswith(b"Pid:"):
                    return int(line[4:]) if int(line[4:]) > 0 else -fd
    except OSError:
        pass
    return None


def descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message."""
    found: list[int] = []
    for level, kind, data in control:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            found += struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4])
    return found


def facts_of(pieces: dict[int, bytes]) -> Facts:
    """The fields of native/helper.h, FACT_EXE to FACT_USER."""

    def words(field: int) -> tuple[bytes, ...]:
        return tuple(pieces.get(field, b"").split(b"\0")[:-1])

    user = pieces.get(6, b"")
    return Facts(
        pieces.get(1, b""),
        pieces.get(2, b""),
        words(3),
        words(4),
        words(5),
        int.from_bytes(user[:4], sys.byteorder),
    )
