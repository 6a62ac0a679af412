"""`sanctl check`: says everything that is wrong with a policy, as file:line: message, and what deserves a look."""

from __future__ import annotations

import argparse
import os

from interposer import config
from interposer.cli import output
from interposer.cli.output import PROBLEM, clean
from interposer.config.problems import PolicyError, Problem


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("file", metavar="FILE", nargs="?", help="the policy; else the one that sanrun would read")


def run(options: argparse.Namespace) -> int:
    try:
        loaded = config.load(options.file, os.environ)
    except PolicyError as error:
        if options.json:
            output.print_json({"files": [], "rules": 0, "problems": output.problems(error.problems), "warnings": []})
            return PROBLEM
        for problem in error.problems:
            print(clean(str(problem)))
        return PROBLEM
    if options.json:
        warnings = output.problems(loaded.warnings)
        rules = len(loaded.policy.all_rules())
        output.print_json({"files": list(loaded.files), "rules": rules, "problems": [], "warnings": warnings})
        return 0
    for warning in loaded.warnings:
        print(clean(str(Problem(warning.file, warning.line, f"warning: {warning.message}", warning.hint))))
    if loaded.files:
        rules = len(loaded.policy.all_rules())
        print(f"{clean(', '.join(loaded.files))}: {rules} {'rule' if rules == 1 else 'rules'}, no errors")
    else:
        print("there is no policy file: the built-in defaults hold (unix on this machine, TCP elsewhere)")
    return 0
