"""What kind of program a file is, and whether the preloaded library can enter it.

Imports nothing beyond what a starting interpreter has loaded, because every `sanrun` runs it.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PT_INTERP, PT_NOTE = 3, 4
HEAD_SIZE = 4096
HEADERS_MAX = 65536  # of the kernel's
STATIC = "it is statically linked"
GO = "it is a Go program, which makes its system calls without libc"
GO_NOTE = (4).to_bytes(4, "little") + b"Go\0\0"
"""Type and name of the note that Go's linker leaves; gccgo's programs, which call libc, have none."""
SCRIPT_DEPTH = 5
"""How many `#!` lines the kernel follows."""
GLIBC_LOADERS = ("ld-linux", "ld64.so")
MACHINES = {3: "i386", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86-64", 183: "aarch64", 243: "riscv"}


class NotFound(Exception):
    """No such program: exit status 127."""


class NotExecutable(Exception):
    """A file, but none that can be executed: exit status 126."""


class Program:
    """`path` is what exec gets, `binary` the file that will run: a script's interpreter, else `path` itself.
    `obstacle` says why the library cannot follow it, "" when it can. A program that `ignores` a preload hands it on to
    its children; the others with an obstacle must not see one. `shell` marks a text without a `#!` line, which shells
    run themselves and execve refuses."""

    __slots__ = ("binary", "ignores", "obstacle", "path", "shell")

    def __init__(self, path: str, binary: str, obstacle: str, shell: bool) -> None:
        self.path = path
        self.binary = binary
        self.obstacle = obstacle
        self.ignores = obstacle in (STATIC, GO)
        self.shell = shell


def find(name: str, environ: Mapping[str, str]) -> str:
    """The path that execvp would execute. Raises NotFound and NotExecutable."""
    if not name:
        raise NotFound("the command is an empty word")
    if "/" in name:
        candidates = [name]
    else:
        candidates = [f"{place or '.'}/{name}" for place in environ.get("PATH", "/bin:/usr/bin").split(":")]
    refused = ""
    for path in candidates:
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            refused = refused or f"{path}: {error.strerror}"
            continue
        if stat.S_ISDIR(mode):
            refused = refused or f"{path} is a directory"
        elif not stat.S_ISREG(mode):
            refused = refused or f"{path} is not a regular file"
        elif not os.access(path, os.X_OK, effective_ids=True):
            refused = refused or f"{path} is not executable; chmod +x {path} if it should be"
        else:
            return path
    if refused:
        raise NotExecutable(refused)
    if "/" in name:
        raise NotFound(f"{name}: no such file")
    raise NotFound(f"{name}: not found in PATH")


def inspect(path: str, library_head: bytes | None) -> Program:
    """`library_head`: the first bytes of the library, whose architecture the program must share; None: any will do.
    Raises NotFound for a missing interpreter or loader and NotExecutable for a broken file."""
    binary = path
    for _ in range(SCRIPT_DEPTH):
        try:
            fd = os.open(binary, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFound(f"{path} wants the interpreter {binary}, which does not exist") from None
        except OSError:
            return Program(path, binary, _privilege(binary), False)  # may be executable without being readable
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise NotExecutable(f"{path} wants the interpreter {binary}, which is not a regular file")
            head = os.read(fd, HEAD_SIZE)
            if not head.startswith(b"#!"):
                return Program(path, binary, *_inspect_binary(fd, binary, head, library_head))
        finally:
            os.close(fd)
        words = head[2:].split(b"\n", 1)[0].split(None, 1)
        if not words:
            raise NotExecutable(f"{binary}: its first line names no interpreter")
        binary = os.fsdecode(words[0])
    raise NotExecutable(f"{path}: more than {SCRIPT_DEPTH} interpreters stand one behind the other")


def _inspect_binary(fd: int, binary: str, head: bytes, library_head: bytes | None) -> tuple[str, bool]:
    if not head.startswith(b"\x7fELF"):
        if b"\0" in head:
            raise NotExecutable(f"{binary}: neither an ELF program nor a script")
        return "", True
    if len(head) < 64:
        raise NotExecutable(f"{binary}: an ELF file that was cut short")
    obstacle = _privilege(binary)
    if obstacle:
        return obstacle, False
    if library_head and _architecture(head) != _architecture(library_head):
        return f"it is a program for {_architecture_name(head)}, not {_architecture_name(library_head)}", False
    loader, note = _segments(fd, head)
    if GO_NOTE in note:
        return GO, False
    if not loader:
        return STATIC, False
    name = loader.rsplit("/", 1)[-1]
    if not os.path.exists(loader):
        raise NotFound(f"{binary} wants the loader {loader}, which does not exist; install its C library")
    if name.startswith("ld-musl"):
        return "it uses the musl C library, not glibc", False
    if not name.startswith(GLIBC_LOADERS):
        return f"its loader {loader} is not glibc's", False
    return "", False


def _privilege(binary: str) -> str:
    """Why the loader would ignore a preload for this file, or should."""
    try:
        mode = os.stat(binary).st_mode
    except OSError:
        return ""
    if mode & stat.S_ISUID:
        return "it is setuid"
    if mode & stat.S_ISGID and mode & stat.S_IXGRP:
        return "it is setgid"
    try:
        os.getxattr(binary, "security.capability")
    except OSError:
        return ""
    return "it has file capabilities"


def _number(data: bytes, offset: int, size: int, big: bool) -> int:
    return int.from_bytes(data[offset : offset + size], "big" if big else "little")


def _architecture(head: bytes) -> tuple[int, int, int]:
    """Class, byte order, machine."""
    return head[4], head[5], _number(head, 18, 2, head[5] == 2)


def _architecture_name(head: bytes) -> str:
    kind, _, machine = _architecture(head)
    name = MACHINES.get(machine, f"machine {machine}")
    return f"{name} with 32-bit pointers" if name == "x86-64" and kind == 1 else name


def _segments(fd: int, head: bytes) -> tuple[str, bytes]:
    """PT_INTERP, "" where there is none, in a static program; and all of PT_NOTE."""
    loader, notes = "", b""
    wide, big = head[4] == 2, head[5] == 2
    table = _number(head, 32, 8, big) if wide else _number(head, 28, 4, big)
    size, count = (_number(head, 54 if wide else 42, 2, big), _number(head, 56 if wide else 44, 2, big))
    entries = _read_at(fd, head, table, size * count)
    for start in range(0, size * count, size or 1):
        kind = _number(entries, start, 4, big)
        if kind not in (PT_INTERP, PT_NOTE):
            continue
        word = 8 if wide else 4
        offset = _number(entries, start + word, word, big)
        content = _read_at(fd, head, offset, min(_number(entries, start + 4 * word, word, big), HEAD_SIZE))
        if kind == PT_NOTE:
            notes += content
        else:
            loader = loader or os.fsdecode(content.rstrip(b"\0"))
    return loader, notes


def _read_at(fd: int, head: bytes, offset: int, size: int) -> bytes:
    if offset + size <= len(head):
        return head[offset : offset + size]
    try:
        return os.pread(fd, min(size, HEADERS_MAX), offset)
    except (OSError, OverflowError):
        return b""  # a damaged file: exec will say so
