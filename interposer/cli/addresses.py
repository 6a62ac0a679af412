"""`sanctl addresses`: the machine's subnets, and the providers that serve them."""

from __future__ import annotations

import argparse

from interposer.cli import output
from interposer.cli.output import PROBLEM, Failure, complain
from interposer.diag import addresses

HEADS = ("INTERFACE", "STATE", "ADDRESS", "PROVIDERS")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    try:
        table = addresses.table()
    except addresses.AddressesError as error:
        raise Failure(str(error)) from None
    if options.json:
        providers = {each.name: {"usable": not each.problem, "problem": each.problem} for each in table.providers}
        output.print_json({"addresses": [_json(entry) for entry in table.entries], "providers": providers})
    else:
        output.print_table(HEADS, [row(entry) for entry in table.entries])
        for provider in table.providers:
            if provider.problem:
                complain(f"{provider.name} cannot be used: {provider.problem}")
    return PROBLEM if any(provider.problem for provider in table.providers) else 0


def row(entry: addresses.Entry) -> list[str]:
    """The cells of one line."""
    subnet = entry.subnet
    state = "up" if subnet.up else "down"
    return [subnet.interface, state, str(subnet.address), ", ".join(entry.providers) or "tcp"]


def _json(entry: addresses.Entry) -> dict[str, object]:
    subnet = entry.subnet
    return {
        "interface": subnet.interface,
        "index": subnet.index,
        "up": subnet.up,
        "address": str(subnet.address.ip),
        "prefix": subnet.address.network.prefixlen,
        "providers": list(entry.providers),
    }
