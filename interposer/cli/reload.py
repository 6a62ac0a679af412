"""`sanctl reload`: compiles changed policies; the programs that run by them follow at their next connection."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from interposer.cli import output, targets
from interposer.cli.output import PROBLEM, Failure, clean, complain
from interposer.config.problems import Problem
from interposer.diag import stats, tables
from interposer.launch import helper, reload, runtime, table_cache


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads the policies of running programs again. Every program follows within a second, at its next listen() or "
        "connect(); connections that exist stay as they are. A policy with an error is told, and the old one holds. "
        "Compiled policies whose files are gone are removed when no program runs by them."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "pid", type=targets.pid, metavar="PID", nargs="*", help="only their policies; without, all of this user's"
    )


def run(options: argparse.Namespace) -> int:
    programs = tables.programs()
    chosen = _of_processes(options.pid) if options.pid else _all(programs)
    outcomes = []
    for table in chosen:
        users = programs.by_table.get(table, [])
        outcome = reload.reload(table, users, programs.unknown, os.environ)
        outcomes.append((outcome, users))
        problem = _helper(outcome, users)
        if not options.json:
            _tell(outcome, users)
        if problem:
            complain(problem)
    if options.json:
        output.print_json({"tables": [_json(outcome, users) for outcome, users in outcomes]})
    elif not outcomes:
        complain("there is nothing to reload: no program was started by sanrun")
    return PROBLEM if any(outcome.result == reload.FAILED for outcome, _ in outcomes) else 0


def _all(programs: tables.Programs) -> list[str]:
    """This user's tables: those in the run-time directory, and those of running programs wherever they are."""
    try:
        found = reload.tables(os.environ)
    except runtime.Refused as error:
        raise Failure(str(error)) from None
    return [table for table in dict.fromkeys([*found, *sorted(programs.by_table)]) if reload.is_ours(table)]


def _of_processes(pids: Sequence[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            table = tables.table_of(pid)
            if not table:
                stats.process(pid)  # says so where the process is not interposed
                raise Failure(f"process {pid} does not say by which policy it runs; leave it out to reload all")
        except stats.ProcessError as error:
            raise Failure(str(error)) from None
        except stats.PageError as error:
            raise Failure(f"process {pid}: {error}") from None
        except FileNotFoundError:
            raise Failure(f"there is no process {pid}") from None
        except PermissionError:
            raise Failure(f"process {pid} may not be inspected by this user: try as its owner or as root") from None
        except OSError as error:
            raise Failure(f"process {pid}: {error.strerror}") from None
        found.append(table)
    return list(dict.fromkeys(found))


def _helper(outcome: reload.Outcome, users: Sequence[int]) -> str:
    """A policy that has come to ask functions may need the helper process, for as long as its programs run."""
    if not outcome.helper:
        return ""
    for pid in users:
        try:
            helper.spawn(outcome.table, table_cache.helper_address(outcome.table), _log(pid), pid)
        except ProcessLookupError:
            continue
        except OSError as error:
            return f"the policy's helper process did not start: {error}"
    return ""


def _log(pid: int) -> str | None:
    try:
        path = tables.variable(pid, "INTERPOSER_LOG")
    except OSError:
        return None
    return path if path and path.startswith("/") else None


def _tell(outcome: reload.Outcome, users: Sequence[int]) -> None:
    for problem in outcome.problems:
        complain(str(problem))
    for warning in outcome.warnings:
        print(clean(str(Problem(warning.file, warning.line, f"warning: {warning.message}", warning.hint))))
    policy = clean(", ".join(outcome.policy)) or "the built-in defaults"
    if outcome.result == reload.RELOADED:
        programs = f"{len(users)} {'program follows' if len(users) == 1 else 'programs follow'}"
        print(f"{clean(outcome.table)}: reloaded from {policy}; {programs}")
    elif outcome.result == reload.REMOVED:
        print(f"{clean(outcome.table)}: removed: {policy} is gone, and no program runs by it")
    else:
        print(f"{clean(outcome.table)}: as it was")


def _json(outcome: reload.Outcome, users: Sequence[int]) -> dict[str, object]:
    return {
        "table": outcome.table,
        "result": outcome.result,
        "policy": list(outcome.policy),
        "processes": list(users),
        "problems": output.problems(outcome.problems),
        "warnings": output.problems(outcome.warnings),
    }
