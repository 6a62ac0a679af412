"""`sanctl ss`: listeners and connections, which provider carries them, and why not a SAN."""

from __future__ import annotations

import argparse

from interposer.cli import output, targets
from interposer.cli.output import PROBLEM, complain
from interposer.diag import sockets
from interposer.diag.stats import Endpoint, reason_symbol
from interposer.policy import reasons

HEADS = ("PID", "FD", "ROLE", "LOCAL", "PEER", "PROVIDER", "RULE", "WHY TCP")


def add_options(parser: argparse.ArgumentParser) -> None:
    targets.add_options(parser)


def run(options: argparse.Namespace) -> int:
    processes, whole = targets.find(options)
    found = sockets.sockets(processes)
    if options.json:
        output.print_json({"sockets": [_json(entry) for entry in found]})
    elif found:
        output.print_table(HEADS, [_text(entry) for entry in found], right=(0, 1))
    else:
        complain("no listener or connection of an interposed process")
    return 0 if whole else PROBLEM


def _json(entry: sockets.Socket) -> dict[str, object]:
    return {
        "pid": entry.pid,
        "fd": entry.fd,
        "role": entry.role,
        "local": str(entry.local) if entry.local else None,
        "peer": str(entry.peer) if entry.peer else None,
        "provider": entry.provider,
        "rule": entry.rule,
        "reason": reason_symbol(entry.reason) if entry.reason else None,
    }


def _text(entry: sockets.Socket) -> list[str]:
    def address(end: Endpoint | None) -> str:
        return str(end) if end else "-"

    reason = reasons.BY_NUMBER.get(entry.reason)
    why = reason.sentence if reason else reason_symbol(entry.reason) if entry.reason else ""
    return [
        str(entry.pid),
        str(entry.fd),
        entry.role,
        address(entry.local),
        address(entry.peer),
        entry.provider,
        entry.rule or "-",
        why,
    ]
