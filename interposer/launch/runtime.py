"""The run-time directory, which holds compiled tables: private to its user, and refused when it is not.

Imports nothing beyond what a starting interpreter has loaded, because every `sanrun` runs it.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PID_DIGITS = 7
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Refused(Exception):
    """The run-time directory cannot be used; the message says why and what to do."""


def directory(environ: Mapping[str, str], *, make: bool = True) -> str:
    """The directory, made if need be unless not `make`. Raises Refused."""
    path = _choose(environ)
    if not make and not os.path.lexists(path):
        return path
    try:
        os.mkdir(path, 0o700)
        os.chmod(path, 0o755)  # a program started here may become another user and still reads its table
    except FileExistsError:
        pass
    except OSError as error:
        raise Refused(f"cannot make the run-time directory {path}: {error.strerror}; {_remedy(environ)}") from None
    check(path, environ)
    return path


def check(path: str, environ: Mapping[str, str]) -> None:
    """Raises Refused unless the directory is one in which only this user can put files."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise Refused(f"the run-time directory {path} is a symbolic link; remove it, or {_remedy(environ)}")
    if not stat.S_ISDIR(status.st_mode):
        raise Refused(f"the run-time directory {path} is not a directory; remove it, or {_remedy(environ)}")
    if status.st_uid != os.geteuid():
        owner = f"user {status.st_uid}, not to you ({os.geteuid()})"
        raise Refused(f"the run-time directory {path} belongs to {owner}; {_remedy(environ)}")
    if status.st_mode & OTHERS_WRITE:
        raise Refused(f"the run-time directory {path} can be written by other users; chmod go-w {path}")


def _choose(environ: Mapping[str, str]) -> str:
    user = os.geteuid()
    base = environ.get("XDG_RUNTIME_DIR", "")
    # After su or sudo it may still be another user's, which is no place for our files.
    if base.startswith("/") and not _belongs_to_another(base, user):
        return f"{base.rstrip('/')}/interposer"
    if os.path.isdir(f"/run/user/{user}"):
        return f"/run/user/{user}/interposer"
    return "/run/interposer" if user == 0 else f"/tmp/interposer-{user}"


def _belongs_to_another(path: str, user: int) -> bool:
    try:
        return os.stat(path).st_uid != user
    except OSError:
        return False


def _remedy(environ: Mapping[str, str]) -> str:
    if environ.get("XDG_RUNTIME_DIR"):
        return "set XDG_RUNTIME_DIR to a directory of yours, or unset it"
    return "set XDG_RUNTIME_DIR to a directory of yours"


def write(path: str, data: bytes) -> None:
    """Replaces the file at once, so that a reader sees the old or the new one. Raises Refused."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        _reclaim(os.path.dirname(path))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(fd, 0o644)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}; free some space there, or set XDG_RUNTIME_DIR") from None


def link(path: str, target: str) -> None:
    """Makes a symbolic link in a subdirectory of its own, or puts it right. Raises Refused."""
    temporary = f"{os.path.dirname(path)}.{os.getpid()}.new"
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if os.path.islink(path) and os.readlink(path) == target:
            return
        os.symlink(target, temporary)
        os.rename(temporary, path)
    except OSError as error:
        raise Refused(f"cannot make {path}: {error.strerror}; free some space there, or set XDG_RUNTIME_DIR") from None


def replaceable(path: str) -> bool:
    """Whether another user could put a directory of his own in the place of this one, if it went away."""
    status = os.stat(os.path.dirname(path))
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & OTHERS_WRITE)


def digest(text: str) -> str:
    """Names a file after a text."""
    # hashlib would load OpenSSL, 3 ms at every start.
    try:
        from _sha256 import sha256
    except ImportError:
        from _sha2 import sha256
    found: str = sha256(os.fsencode(text)).hexdigest()
    return found[:32]


def _reclaim(place: str) -> None:
    """Removes what a killed writer left."""
    for name in os.listdir(place):
        words = name.split(".")
        if words[-1] == "new" and words[-2:-1] and _is_left(words[-2]):
            try:
                os.unlink(f"{place}/{name}")
            except FileNotFoundError:
                pass  # another launcher was faster


def _is_left(writer: str) -> bool:
    if not (writer.isascii() and writer.isdecimal()) or len(writer) > PID_DIGITS:
        return False
    if int(writer) == os.getpid():
        return True  # its writer had the pid that is now ours
    try:
        os.kill(int(writer), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def read(path: str) -> bytes | None:
    """The file's bytes; None when it is missing, or not one that this user wrote."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
            return None
        return os.read(fd, status.st_size)
    finally:
        os.close(fd)
