"""What tools/build brings up to date."""

from __future__ import annotations

import marshal
import os
from pathlib import Path

from interposer import build
from interposer.policy import build_engine, reasons


def test_installed_launcher_follows_its_source(tmp_path: Path) -> None:
    """O4: made anew where it is older than sanrun.c, left alone where it is newer, and not made where none was."""
    build.refresh_launcher(tmp_path)
    assert list(tmp_path.iterdir()) == []
    installed = tmp_path / "bin" / "sanrun"
    installed.parent.mkdir()
    installed.touch()
    build.refresh_launcher(tmp_path)
    assert installed.read_bytes() == b""
    os.utime(installed, (1, 1))
    build.refresh_launcher(tmp_path)
    assert installed.read_bytes().startswith(b"\x7fELF")
    assert os.access(installed, os.X_OK)
    assert list(installed.parent.iterdir()) == [installed]


def test_what_is_compiled_into_the_engine() -> None:
    """P1: the code of the engine's modules as they are, with nothing that would be read from a file first."""
    modules = build_engine.frozen_modules()
    assert {"interposer.policy.entry", "interposer.policy.engine", "interposer.policy.functions"} <= modules.keys()
    numbers: dict[str, object] = {}
    exec(marshal.loads(modules["interposer.policy.reasons"]), numbers)
    for reason in reasons.BY_NUMBER.values():
        assert numbers[reason.symbol] == reason.number
    for name, code in modules.items():
        assert "__future__" not in marshal.loads(code).co_names, name
    assert set(build_engine.sources()) >= {path for name, path in build_engine.OURS.items() if name in modules}


def test_engine_follows_its_modules(tmp_path: Path, monkeypatch) -> None:
    """P1: when a module that is compiled into the engine has changed, so has the engine."""
    made: list[str] = []

    def compile_it(output: str) -> None:
        made.append(output)
        Path(output).touch()

    monkeypatch.setattr(build_engine, "build", compile_it)
    output = tmp_path / "engine.so"
    build._build_engine(output, False)
    build._build_engine(output, False)
    assert made == [str(output)]
    os.utime(output, (1, 1))
    build._build_engine(output, False)
    assert made == [str(output)] * 2
