"""Starts the helper process of a policy, or tells one that runs already about one more program."""

from __future__ import annotations

import _socket
import os
import struct
import sys

from interposer.launch.environment import REQUIRE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from interposer.policy.helper import Helper

ATTEMPTS = 10
ANSWER_SECONDS = 1
START_SECONDS = 10.0
READY = b"ready"
NOT_INHERITED = ("LD_PRELOAD", "INTERPOSER", "INTERPOSER_TABLE", "INTERPOSER_LOG", "INTERPOSER_POLICY", REQUIRE)


class HelperError(OSError):
    """The helper cannot be started; the message says why."""


def spawn(table_path: str, address: str, log: str | None = None, pid: int = 0) -> None:
    """Makes sure that a helper serves `table_path` at the abstract `address` for as long as a process lives: `pid`, or
    this one, which becomes the program by exec and keeps its pid.

    When this returns the helper has read the table and answers. It is no child of the program, has no terminal, and
    holds none of its descriptors. Raises HelperError, and ProcessLookupError where there is no process `pid`.
    """
    pidfd = os.pidfd_open(pid or os.getpid())
    try:
        for _ in range(ATTEMPTS):
            if _join(address, pidfd):
                return
            listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
            try:
                listener.bind(b"\0" + address.encode())
                listener.listen(128)
            except OSError:
                continue  # another launcher was faster
            else:
                _fork(listener, pidfd, table_path, log)
                return
            finally:
                listener.close()
    finally:
        os.close(pidfd)
    raise HelperError(f"the helper's address @{address} is taken, and nobody answers there")


def _join(address: str, pidfd: int) -> bool:
    """Asks a helper that runs already to watch this process too. False where none runs."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        # Only a blocking connect() waits for room in the backlog, and this bounds it.
        wait = struct.pack("=qq", ANSWER_SECONDS, 0)
        connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, wait)
        connection.connect(b"\0" + address.encode())
        connection.settimeout(ANSWER_SECONDS)
        peer = struct.unpack("=3i", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
        if peer[1] not in (0, os.geteuid()):
            raise HelperError(f"the helper's address @{address} is held by process {peer[0]} of user {peer[1]}")
        message = struct.pack("=II", 4, 0)
        connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", pidfd))])
        return connection.recv(64) == message
    except TimeoutError:
        raise HelperError(f"the helper at @{address} does not answer") from None
    except HelperError:
        raise
    except OSError:
        return False  # nobody there, or one that ended just now
    finally:
        connection.close()


def _fork(listener: _socket.socket, pidfd: int, table_path: str, log: str | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    child = os.fork()
    if not child:
        _detach(theirs.fileno(), listener, pidfd, table_path, log)
    theirs.close()
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass  # our caller ignores SIGCHLD, so the kernel has reaped it
    ours.settimeout(START_SECONDS)
    try:
        answer = ours.recv(4096)
    except TimeoutError:
        raise HelperError(f"it is not ready after {START_SECONDS:.0f} s") from None
    finally:
        ours.close()
    if answer != READY:
        raise HelperError(answer.decode(errors="backslashreplace") or "it ended")


def _detach(answer: int, listener: _socket.socket, pidfd: int, table_path: str, log: str | None) -> NoReturn:
    """In the child, which ends at once. The grandchild says READY or what went wrong, and serves."""
    import fcntl

    try:
        answer = fcntl.fcntl(answer, fcntl.F_DUPFD, 64)
        os.setsid()
        if os.fork() == 0:
            helper = _become_helper(answer, listener, pidfd, table_path, log)
            os.write(answer, READY)
            os.close(answer)
            answer = -1
            helper.run()
    except BaseException as error:
        os.write(answer, str(error).encode(errors="backslashreplace")[:4096])
    finally:
        os._exit(0)


def _become_helper(answer: int, listener: _socket.socket, pidfd: int, table_path: str, log: str | None) -> Helper:
    """Keeps two descriptors, the log and `answer`, and nothing that could hold the program's things open."""
    import fcntl

    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (listener.fileno(), pidfd)]
    if log:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NOCTTY
        high.append(fcntl.fcntl(os.open(log, flags, 0o600), fcntl.F_DUPFD, 64))
    null = fcntl.fcntl(os.open("/dev/null", os.O_RDWR), fcntl.F_DUPFD, 64)
    listener.detach()
    for number in range(3):
        os.dup2(high[2] if log and number else null, number)
    # What functions print is for the log.
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    for number, fd in enumerate(high):
        os.dup2(fd, 3 + number, inheritable=False)
    os.closerange(3 + len(high), answer)
    os.closerange(answer + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    for name in NOT_INHERITED:
        os.environ.pop(name, None)
    with open("/proc/self/comm", "w") as comm:
        comm.write("sanrun-helper")
    from interposer.policy.helper import prepare

    return prepare(3, table_path, 4, 5 if log else -1)
