"""Everything that C reads from outside, fuzzed: one target for each parser, beginning with what the product writes."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import seeds

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "fuzz"
NATIVE = ROOT / "interposer" / "native"
PLACE = ROOT / ".build" / "fuzz"
TARGETS = sorted(path.stem for path in HERE.glob("*.c"))
COMMON = ["clang", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", f"-I{ROOT}", f"-I{NATIVE}"]
WORDS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-sign-compare", "-Wno-unknown-attributes"]
SANITIZERS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SHORT = ("-max_total_time=2",)
LONG = ("-runs=1200000", "-max_total_time=600")


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _object(source: Path) -> Path:
    target = PLACE / f"{source.stem}.o"
    newest = max(path.stat().st_mtime_ns for path in (source, *NATIVE.glob("*.h"), *NATIVE.glob("*.def")))
    if not target.exists() or target.stat().st_mtime_ns < newest:
        fresh = target.with_suffix(f".{os.getpid()}")
        _run([*COMMON, "-w", "-c", "-o", fresh, source])
        fresh.rename(target)
    return target


@cache
def _rest() -> Path:
    """All native code, of which the linker takes what a target does not include itself."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_object, sorted(NATIVE.glob("*.c"))))
    archive = PLACE / f"rest.{os.getpid()}.a"
    archive.unlink(missing_ok=True)
    _run(["ar", "rcs", archive, *objects])
    return archive.rename(PLACE / "rest.a")


@cache
def _programs() -> dict[str, Path]:
    rest = _rest()

    def program(target: str) -> Path:
        output = PLACE / target
        _run([*COMMON, *WORDS, *SANITIZERS, "-o", output, HERE / f"{target}.c", rest, "-lpthread"])
        return output

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(program, TARGETS), strict=True))


def fuzz(target: str, place: Path, limits: tuple[str, ...]) -> int:
    seeds.write(target, place / "seeds")
    (place / "corpus").mkdir()
    command = [_programs()[target], *limits, "-timeout=10", "-print_final_stats=1", f"-artifact_prefix={place}/"]
    done = subprocess.run(
        [*command, place / "corpus", place / "seeds"], capture_output=True, text=True, timeout=900, errors="replace"
    )
    assert done.returncode == 0, done.stderr[-6000:]
    count = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert count
    assert int(count[1]) > 1000
    return int(count[1])


def test_every_target_has_seeds() -> None:
    """X4: no target begins with nothing."""
    assert sorted(seeds.ALL) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_short(target: str, tmp_path: Path, executions: dict[str, int]) -> None:
    """X4: for two seconds no input makes a parser crash, leak, hang, or read what it was not given."""
    executions[target] = fuzz(target, tmp_path, SHORT)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_long(target: str, tmp_path: Path, executions: dict[str, int]) -> None:
    """X4: a million inputs and more for each parser."""
    executions[target] = fuzz(target, tmp_path, LONG)
