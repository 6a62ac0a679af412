"""CPython's own network tests, with the switch and without it: the same results, test by test, with the connections on
the SAN. As a program, prints a table of them.

    python tests/apps/suites.py [--python 3.12]... [--suite test_ssl]... [--long] [--markdown]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "tests/behaviour")]

from interpreters import DEBIANS, interpreters  # noqa: E402
from programs import Policy, Programs  # noqa: E402

from interposer.diag import stats  # noqa: E402

DRIVER = Path(__file__).parent / "cpython_driver.py"
SECONDS = 900
"""That one module may take."""
JOBS = 3
"""Modules that run at the same time: most of their time they wait."""
AGAIN = 6
"""Further runs without the switch where results differ: a test that TCP fails now and then says nothing."""
ASYNCIO_QUICK = ("base_events", "buffered_proto", "events", "selector_events", "sendfile", "server", "sock_lowlevel",
                 "sslproto", "streams", "transports")
QUICK = (
    *(f"test_asyncio.test_{part}" for part in ASYNCIO_QUICK),
    "test_selectors",
    "test_socketserver",
    "test_httpservers",
    "test_httplib",
    "test_poplib",
    "test_imaplib",
    "test_smtplib",
    "test_xmlrpc",
    "test_telnetlib",
)
LONG = (
    "test_asyncio",
    *(suite for suite in QUICK if "." not in suite),
    "test_asynchat",
    "test_asyncore",
    "test_docxmlrpc",
    "test_eintr",
    "test_epoll",
    "test_ftplib",
    "test_logging:Handler",
    "test_multiprocessing:onnection",
    "test_multiprocessing:istener",
    "test_multiprocessing_fork:onnection",
    "test_multiprocessing_fork:istener",
    "test_multiprocessing_spawn:istener",
    "test_nntplib",
    "test_os:Sendfile",
    "test_poll",
    "test_robotparser",
    "test_select",
    "test_smtpd",
    "test_socket:!VSOCK",                # AF_VSOCK, which hangs on virtual machines
    "test_ssl",
    "test_timeout",
    "test_urllib2_localnet",
    "test_wsgiref",
)
FORCED = {
    f"test.test_ssl.TestPreHandshakeClose.test_preauth_data_to_tls_{side}": "D3: a linger-0 close is an end of file"
    for side in ("client", "server")
}
"""Tests that differ because of a permitted difference."""
EXPLAINED = ("NO_LISTENER", "REFUSED", "BACKLOG_FULL")
"""Why connections of these suites may be on TCP: nobody listened, or did so no longer, or had too small a backlog."""
RESOURCES = {"test_socketserver": ("network",)}
"""What must be allowed to a module; "network" there is this machine's."""


PROCESS = "(the process)"


@dataclass(frozen=True)
class Run:
    """One run of a module."""

    outcomes: Mapping[str, str]
    """By test. One that neither ended nor failed is "begun"; the status of the process, if not 0, is one too."""
    connections: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    said: str = ""


@dataclass(frozen=True)
class Comparison:
    python: str
    suite: str
    plain: Sequence[Run]
    switched: Run

    @property
    def tests(self) -> int:
        return len(self.plain[0].outcomes)

    @property
    def differences(self) -> dict[str, str]:
        """By test, what was seen with the switch and never without."""
        found = {}
        for test in sorted({test for run in (*self.plain, self.switched) for test in run.outcomes}):
            seen = {run.outcomes.get(test, "missing") for run in self.plain}
            now = self.switched.outcomes.get(test, "missing")
            if now not in seen and test not in FORCED:
                found[test] = f"{now} instead of {' or '.join(sorted(seen))}"
        return found

    @property
    def unsteady(self) -> dict[str, list[str]]:
        """Tests that have more than one outcome without the switch."""
        whole = [run.outcomes for run in self.plain if PROCESS not in run.outcomes] or [self.plain[0].outcomes]
        tests = sorted({test for outcomes in whole for test in outcomes})
        found = {test: [outcomes.get(test, "missing") for outcomes in whole] for test in tests}
        return {test: outcomes for test, outcomes in found.items() if len(set(outcomes)) > 1}


def _outcomes(lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    worst = ("error", "failure")
    for line in lines:
        test, outcome = json.loads(line)
        if outcome == "begun":
            seen[test] += 1
        name = f"{test} #{seen[test]}" if seen[test] > 1 else test   # some modules run a test several times
        if found.get(name) not in worst:
            found[name] = outcome
    return found


def run(python: str, suite: str, switched: bool) -> Run:
    """One module, in a process of its own."""
    programs = Programs(switched)
    output = programs.directory / "outcomes"
    output.touch()
    start = time.monotonic()
    try:
        words = [python, str(DRIVER), str(output), suite, *RESOURCES.get(suite, ())]
        program = programs.start(words, Policy("none", None, False), pipes=True)
        end = start + SECONDS
        while not (text := output.read_text()).endswith('["", ""]\n') and program.popen.poll() is None:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        outcomes = _outcomes(text.splitlines())
        ended = outcomes.pop("", None) is not None
        page = stats.process(program.pid) if switched and program.popen.poll() is None else None
        program.input.close()
        try:
            status = program.popen.wait(20 if ended else 0.1)
        except subprocess.TimeoutExpired:
            status = "still running"
        if status != 0 or not ended:
            outcomes[PROCESS] = f"status {status}"
        said = program.errors.read_text(errors="replace")
        counted = (page.connections, page.reasons) if page else ({}, {})
        return Run(outcomes, *counted, time.monotonic() - start, said)
    finally:
        programs.close()
        programs.remove()


def compare(python: str, executable: str, suite: str) -> Comparison:
    found = Comparison(python, suite, [run(executable, suite, False)], run(executable, suite, True))
    for _ in range(AGAIN):
        if not found.differences:
            break
        found = Comparison(python, suite, [*found.plain, run(executable, suite, False)], found.switched)
    return found


def has(executable: str, suite: str) -> bool:
    """Whether this interpreter has the module."""
    module = suite.partition(":")[0].replace(".", "/")
    code = "import os.path, test; print(os.path.dirname(test.__file__))"
    place = Path(subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=20).stdout.strip())
    return (place / f"{module}.py").exists() or (place / module / "__init__.py").exists()


def compare_all(pythons: Mapping[str, str], suites: Sequence[str], jobs: int = JOBS) -> list[Comparison]:
    wanted = [(version, path, suite) for version, path in pythons.items() for suite in suites if has(path, suite)]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: compare(*one), wanted))


# ---- the table


def _label(version: str, executable: str) -> str:
    return f"{version}, Debian's" if executable == DEBIANS else version


def markdown(found: Sequence[Comparison], pythons: Mapping[str, str]) -> str:
    """Suites down, interpreters across: tests, differences where there are any, connections by SAN and by TCP."""
    versions = [version for version in pythons if any(one.python == version for one in found)]
    rows = ["| suite | " + " | ".join(_label(version, pythons[version]) for version in versions) + " |",
            "|---|" + "---|" * len(versions)]
    for suite in dict.fromkeys(one.suite for one in found):
        cells = []
        for version in versions:
            cell = [one for one in found if one.suite == suite and one.python == version]
            cells.append(_cell(cell[0]) if cell else "")
        rows.append(f"| {suite.replace(':!', ' without ').replace(':', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(one: Comparison) -> str:
    differences = f", {len(one.differences)} differ" if one.differences else ""
    counts = one.switched.connections
    return f"{one.tests}{differences}; {counts.get('unix', 0)} / {counts.get('tcp', 0)}"


def reasons(found: Iterable[Comparison]) -> Counter[str]:
    """Why connections stayed on TCP, and how many."""
    total: Counter[str] = Counter()
    for one in found:
        total.update(one.switched.reasons)
    return total


def report(found: Sequence[Comparison]) -> str:
    lines = []
    for one in found:
        counts = one.switched.connections
        lines.append(f"{one.python:5} {one.suite:36} {one.tests:5} tests, {len(one.differences)} differ; connections: "
                     f"{counts.get('unix', 0)} SAN, {counts.get('tcp', 0)} TCP {dict(one.switched.reasons) or ''} "
                     f"({one.plain[0].seconds:.0f} s, {one.switched.seconds:.0f} s)")
    for one in found:
        lines += [f"different: {one.python} {test}: {text}" for test, text in one.differences.items()]
        lines += [f"unsteady on TCP: {one.python} {test}: {seen}" for test, seen in one.unsteady.items()]
    return "\n".join([*lines, f"why TCP: {dict(reasons(found))}"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares CPython's own tests with the switch and without it.")
    parser.add_argument("--python", action="append", help="a version; all that are found, unless given")
    parser.add_argument("--suite", action="append", help="a module of the package `test`")
    parser.add_argument("--long", action="store_true", help="all suites")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--markdown", action="store_true", help="print a table only")
    options = parser.parse_args()
    pythons = {version: path for version, path in interpreters().items()
               if not options.python or version in options.python}
    found = compare_all(pythons, options.suite or (LONG if options.long else QUICK), options.jobs)
    print(markdown(found, pythons) if options.markdown else report(found))
    return int(any(one.differences for one in found))


if __name__ == "__main__":
    sys.exit(main())
