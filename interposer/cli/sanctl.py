"""`sanctl VERB`: looks at running programs and checks policies. One module for each verb, imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from interposer.cli.output import PROBLEM, Failure, complain

VERBS = {
    "ss": "list the listeners and connections of interposed processes",
    "stats": "count connections by provider, and fall-backs to TCP by reason",
    "addresses": "list this machine's addresses and the providers that serve them",
    "check": "validate a policy",
    "reload": "let running programs follow a changed policy",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a problem was found; a wrong command line exits with 2."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sanctl ss | head` ends quietly
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        status: int = importlib.import_module(f"interposer.cli.{options.verb}").run(options)
        sys.stdout.flush()
    except Failure as failure:
        complain(str(failure))
        return PROBLEM
    except OSError as error:
        complain(str(error))
        os._exit(PROBLEM)  # at a normal exit Python would try to write the rest once more
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sanctl",
        description="Looks at programs that run under sanrun.",
        epilog="exit status: 0; 1 a problem was found; 2 wrong command line",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, description in VERBS.items():
        # Only the verb in use pays for the import of its options.
        chosen = verbs.add_parser(verb, help=description, description=description[0].upper() + description[1:] + ".")
        if verb in arguments:
            importlib.import_module(f"interposer.cli.{verb}").add_options(chosen)
    options = parser.parse_args(arguments)
    if options.version:
        from interposer import __version__

        print(f"sanctl {__version__}")
        parser.exit(0)
    if not options.verb:
        parser.error(f"no verb; there are: {', '.join(VERBS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
