"""The processes that a verb looks at: all, or the one of --pid."""

from __future__ import annotations

import argparse

from interposer.cli.output import Failure, complain
from interposer.diag import bypassed, stats


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--pid", type=pid, metavar="N", help="look at this process only")


def find(options: argparse.Namespace) -> tuple[list[stats.Process], bool]:
    """The processes, and whether all that should be shown could be read. Raises Failure."""
    if options.pid is None:
        found, problems = stats.processes()
        for problem in problems:
            complain(problem)
        return found, not problems
    try:
        return [stats.process(options.pid)], True
    except stats.PageError as error:
        raise Failure(f"process {options.pid}: {error}") from None
    except stats.ProcessError as error:
        why = bypassed.why(options.pid)
        raise Failure(f"process {options.pid} cannot be interposed: {why}" if why else str(error)) from None


def pid(text: str) -> int:
    """A process id on the command line."""
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no process id")
    return int(text)
