"""Measures the SAN against TCP with cubic: in one run, in pairs that take turns, medians with 95 % intervals.

Exit status: 0, also where a bar is missed; 1 when a row could not be measured; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_machine as machine
import bench_report as report
from bench_rows import ROWS
from bench_run import Bench
from demo import Progress
from programs import ROOT, Failed

PAIRS, QUICK_PAIRS = 21, 3
EXTRA = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation",
         "--editable", f"{ROOT}[bench]"]  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measures the SAN against TCP with cubic, in interleaved pairs, and prints a table with the "
        "medians of the pairs' ratios and their 95 % intervals.",
        epilog="Ratios are SAN / TCP. A bar that is missed is no error; a row that cannot be measured is (status 1).",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="measure these only; patterns such as 'redis-*' work")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine facts and rows to FILE")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the ratios; .svg, .png or .pdf (needs matplotlib, which is installed if missing)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the README's table instead")
    parser.add_argument(
        "--pairs", metavar="N", type=int, help=f"pairs of each row (default {PAIRS}, with --quick {QUICK_PAIRS})"
    )
    parser.add_argument("--quick", action="store_true", help="shorter measurements, to see that they work")
    options = parser.parse_args(arguments)
    if options.pairs is not None and options.pairs < 1:
        parser.error(f"--pairs wants a number from 1 on, not {options.pairs}")
    if options.plot and options.plot.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot: {options.plot} should end in .svg, .png or .pdf")
    for file in (options.json, options.plot):
        if file and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            parser.error(f"cannot write {file}")
    for word in options.rows:
        if not any(fnmatch.fnmatchcase(row.name, word) for row, _ in ROWS):
            near = difflib.get_close_matches(word, [row.name for row, _ in ROWS], 1)
            parser.error(f"no row {word!r}" + (f", perhaps you mean {near[0]}" if near else "") + "; --list lists all")
    return options


def listing() -> str:
    width = max(len(row.name) for row, _ in ROWS)
    return "\n".join(f"{row.name.ljust(width)}  {row.meaning} ({row.unit})" for row, _ in ROWS)


def get_matplotlib() -> str:
    """Installs it where it is missing; what to do where that fails, or ""."""
    trial = [sys.executable, "-c", "import matplotlib"]
    if subprocess.run(trial, capture_output=True, timeout=60).returncode == 0:
        return ""
    print("==> installing matplotlib into .venv, for --plot", file=sys.stderr, flush=True)
    done = subprocess.run(EXTRA, capture_output=True, text=True, timeout=600, cwd=ROOT)
    if done.returncode == 0:
        return ""
    return f"--plot needs matplotlib, and it could not be installed:\n{done.stderr}Try: {' '.join(EXTRA)}"


def measure(options: argparse.Namespace, failures: dict[str, str]) -> list[report.Result]:
    pairs = options.pairs or (QUICK_PAIRS if options.quick else PAIRS)
    chosen = [
        (row, measure)
        for row, measure in ROWS
        if not options.rows or any(fnmatch.fnmatchcase(row.name, word) for word in options.rows)
    ]
    progress = Progress()
    bench = Bench(pairs, options.quick, progress)
    results = []
    try:
        for turn, (row, take) in enumerate(chosen):
            progress.say(f"{turn + 1}/{len(chosen)} {row.name}")
            bench.row = row.name
            start = time.monotonic()
            try:
                results.append(report.result(row, take(bench)) | {"seconds": round(time.monotonic() - start, 1)})
            except (Failed, ValueError, OSError, subprocess.SubprocessError) as failure:
                failures[row.name] = f"{type(failure).__name__ if not str(failure) else failure}"
            left = bench.close()
            if left and row.name not in failures:
                failures[row.name] = "left behind: " + ", ".join(left)
    finally:
        bench.close()
        bench.apps.remove()
        progress.end()
    return results


def main() -> int:
    options = parse(sys.argv[1:])
    if options.list:
        print(listing())
        return 0
    if options.plot:
        problem = get_matplotlib()
        if problem:
            print(problem, file=sys.stderr)
            return 1
    machine.with_privilege()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failures: dict[str, str] = {}
    try:
        about = machine.facts()
        results = measure(options, failures)
        if (last := machine.cache_line()) is not None:
            about["cache_line_ns"].append(last)
    except KeyboardInterrupt:
        return 130
    about["quick"] = options.quick
    if results:
        print(report.markdown_table(results) if options.markdown else report.text_table(results))
        print(f"\n{report.machine_text(about)}")
    if options.json:
        document: dict[str, Any] = {"machine": about, "rows": results, "failures": failures}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot and results:
        report.plot(results, options.plot, report.machine_text(about))
    for name, failure in failures.items():
        print(f"\nFAILED: {name}: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
