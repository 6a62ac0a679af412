"""`sanctl stats`: connections and listeners by provider, fall-backs by reason, up-calls, the state of the engine;
and the processes that the switch cannot enter."""

from __future__ import annotations

import argparse
import dataclasses

from interposer.cli import output, targets
from interposer.cli.output import PROBLEM, complain
from interposer.diag import bypassed
from interposer.diag.stats import Process
from interposer.policy import reasons

HEADS = ("PID", "PROGRAM", "CONNECTIONS", "LISTENERS", "UP-CALLS", "ENGINE")
BYPASSED_HEADS = ("PID", "PROGRAM", "NOT INTERPOSED BECAUSE")
REASON_HEADS = ("PID", "TIMES", "REASON FOR TCP", "MEANING", "HINT")


def add_options(parser: argparse.ArgumentParser) -> None:
    targets.add_options(parser)


def run(options: argparse.Namespace) -> int:
    processes, whole = targets.find(options)
    others = bypassed.processes() if options.pid is None else []
    if options.json:
        answer: dict[str, object] = {"processes": [_json(process) for process in processes]}
        if options.pid is None:
            answer["bypassed"] = [dataclasses.asdict(other) for other in others]
        output.print_json(answer)
        return 0 if whole else PROBLEM
    if processes:
        output.print_table(HEADS, [_text(process) for process in processes], right=(0, 4))
        rows = [row for process in processes for row in _reasons(process)]
        if rows:
            print()
            output.print_table(REASON_HEADS, rows, right=(0, 1))
    else:
        complain("no interposed process")
    if others:
        if processes:
            print()
        output.print_table(BYPASSED_HEADS, [[str(other.pid), other.exe, other.why] for other in others], right=(0,))
    return 0 if whole else PROBLEM


def _json(process: Process) -> dict[str, object]:
    return {
        "pid": process.pid,
        "exe": process.exe,
        "connections": process.connections,
        "listeners": process.listeners,
        "reasons": process.reasons,
        "upcalls": process.upcalls,
        "engine": process.engine,
    }


def _text(process: Process) -> list[str]:
    return [
        str(process.pid),
        process.exe,
        _counts(process.connections),
        _counts(process.listeners),
        str(process.upcalls),
        process.engine,
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _reasons(process: Process) -> list[list[str]]:
    rows = []
    for symbol, count in process.reasons.items():
        reason = reasons.BY_SYMBOL.get(symbol)
        rows.append(
            [str(process.pid), str(count), symbol, reason.sentence if reason else "", reason.hint if reason else ""]
        )
    return rows
