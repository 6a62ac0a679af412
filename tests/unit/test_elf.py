"""What the launcher sees in a program file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from interposer.launch import elf

SOURCE = "int main(void) { return 0; }\n"
HEAD = Path("/bin/true").read_bytes()[:64]
"""Of a program of this machine's architecture, as the library would have it."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a program that does nothing with the given compiler and flags."""
    place = tmp_path_factory.mktemp("programs")
    (place / "nothing.c").write_text(SOURCE)

    def build(*command: str) -> Path:
        output = place / "-".join(word.strip("-").replace("/", "_") for word in command)
        if not output.exists():
            subprocess.run([*command, "-o", output, place / "nothing.c"], check=True, timeout=60)
        return output

    return build


def copy_of_true(place: Path) -> Path:
    shutil.copy("/bin/true", place / "true")
    return place / "true"


def test_dynamic_program_has_no_obstacle() -> None:
    """O4: an ordinary program is not warned about."""
    program = elf.inspect("/bin/true", HEAD)
    assert (program.obstacle, program.binary, program.shell) == ("", "/bin/true", False)


@pytest.mark.parametrize("flag", ["-static", "-static-pie"])
def test_static_program(compiled: Callable[..., Path], flag: str) -> None:
    """O4, T14: a static program is known by its missing PT_INTERP."""
    program = elf.inspect(str(compiled("gcc", flag)), HEAD)
    assert program.obstacle == "it is statically linked"
    assert program.ignores


def test_musl_program(compiled: Callable[..., Path]) -> None:
    """O4: a musl program is known by its loader."""
    program = elf.inspect(str(compiled("musl-gcc")), HEAD)
    assert "musl" in program.obstacle
    assert not program.ignores


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [(18, b"\xb7\x00", "aarch64, not x86-64"), (4, b"\x01", "32-bit pointers"), (18, b"\x01\x30", "machine 12289")],
)
def test_other_architecture(tmp_path: Path, offset: int, value: bytes, words: str) -> None:
    """O4: class and machine are compared with the library's."""
    image = bytearray(Path("/bin/true").read_bytes())
    image[offset : offset + len(value)] = value
    path = tmp_path / "foreign"
    path.write_bytes(image)
    assert words in elf.inspect(str(path), HEAD).obstacle


@pytest.mark.parametrize(("mode", "word"), [(0o4755, "setuid"), (0o2755, "setgid")])
def test_setuid_and_setgid(tmp_path: Path, mode: int, word: str) -> None:
    """X3, O4: privilege bits are an obstacle."""
    path = copy_of_true(tmp_path)
    path.chmod(mode)
    assert elf.inspect(str(path), HEAD).obstacle == f"it is {word}"


def test_setgid_without_group_execution_is_no_privilege(tmp_path: Path) -> None:
    """X3: that combination means mandatory locking, not a privileged program."""
    path = copy_of_true(tmp_path)
    path.chmod(0o2745)
    assert elf.inspect(str(path), HEAD).obstacle == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="setcap needs root")
def test_file_capabilities(tmp_path: Path) -> None:
    """X3, O4: file capabilities are an obstacle."""
    path = copy_of_true(tmp_path)
    subprocess.run(["/sbin/setcap", "cap_net_bind_service+ep", path], check=True, timeout=10)
    assert elf.inspect(str(path), HEAD).obstacle == "it has file capabilities"


def test_scripts_are_followed_to_their_interpreter(compiled: Callable[..., Path], tmp_path: Path) -> None:
    """O4: what counts is the program that the kernel will run."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_text(f"#! {compiled('gcc', '-static')} -x\n")
    outer.write_text(f"#!{inner}\n")
    program = elf.inspect(str(outer), HEAD)
    assert program.obstacle == "it is statically linked"
    assert program.binary == str(compiled("gcc", "-static"))
    assert program.path == str(outer)


def test_scripts_in_a_circle_are_refused(tmp_path: Path) -> None:
    """O4: as the kernel refuses them (ELOOP), in words."""
    path = tmp_path / "snake"
    path.write_text(f"#!{path}\n")
    with pytest.raises(elf.NotExecutable, match="interpreters"):
        elf.inspect(str(path), HEAD)


def test_text_without_a_first_line_is_for_the_shell(tmp_path: Path) -> None:
    """O4: execve refuses it, shells run it."""
    path = tmp_path / "plain"
    path.write_text("echo hi\n")
    program = elf.inspect(str(path), HEAD)
    assert program.shell
    assert program.obstacle == ""


@pytest.mark.parametrize("content", [b"\x7fELF", b"\0\1\2\3", b"#!\n"])
def test_broken_files_are_not_executable(tmp_path: Path, content: bytes) -> None:
    """O4: they fail before the start, with exit status 126."""
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(elf.NotExecutable):
        elf.inspect(str(path), HEAD)


@pytest.mark.parametrize("offset", [b"\xff" * 8, b"\xff" * 7 + b"\x7f"])
def test_damaged_headers_are_left_to_exec(tmp_path: Path, offset: bytes) -> None:
    """O4: where the program headers would stand far outside of the file."""
    path = tmp_path / "program"
    image = Path("/bin/true").read_bytes()
    path.write_bytes(image[:32] + offset + image[40:])
    assert elf.inspect(str(path), HEAD).ignores


def test_missing_interpreter_and_loader_are_named(tmp_path: Path) -> None:
    """O4: the kernel's plain ENOENT would blame the program itself."""
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    with pytest.raises(elf.NotFound, match="/no/such/interpreter"):
        elf.inspect(str(script), HEAD)
    binary = tmp_path / "binary"
    image = Path("/bin/true").read_bytes()
    binary.write_bytes(image.replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/ld-linux-absent.so.2", 1))
    with pytest.raises(elf.NotFound, match="ld-linux-absent"):
        elf.inspect(str(binary), HEAD)


def test_interpreter_that_is_no_file(tmp_path: Path) -> None:
    """O4: refused as the kernel would, without waiting for a pipe's other end."""
    os.mkfifo(tmp_path / "pipe")
    script = tmp_path / "script"
    for interpreter in (tmp_path, tmp_path / "pipe", "/dev/null"):
        script.write_text(f"#!{interpreter}\n")
        with pytest.raises(elf.NotExecutable, match="not a regular file"):
            elf.inspect(str(script), HEAD)


def test_find_wants_a_regular_file(tmp_path: Path) -> None:
    """O4: opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe", 0o755)
    (tmp_path / "pipe").chmod(0o755)
    with pytest.raises(elf.NotExecutable, match="not a regular file"):
        elf.find(f"{tmp_path}/pipe", {})


def test_find_goes_through_path_as_exec_does(tmp_path: Path) -> None:
    """O4: the first executable file wins; directories and data files are passed by."""
    first, second = tmp_path / "a", tmp_path / "b"
    (first / "tool").mkdir(parents=True)
    second.mkdir()
    (second / "tool").write_text("#!/bin/sh\n")
    (second / "tool").chmod(0o755)
    assert elf.find("tool", {"PATH": f"{first}:{second}"}) == f"{second}/tool"
    with pytest.raises(elf.NotExecutable):
        elf.find("tool", {"PATH": str(first)})
    with pytest.raises(elf.NotFound):
        elf.find("tool", {"PATH": "/nowhere"})
    with pytest.raises(elf.NotFound):
        elf.find(str(tmp_path / "absent"), {})
