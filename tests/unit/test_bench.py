"""tools/bench: its statistics, its rows, its command line, and that what is not what it should be is no measurement."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_report as report  # noqa: E402
import bench_run  # noqa: E402
from bench_report import Row, Samples  # noqa: E402
from bench_rows import ROWS  # noqa: E402
from programs import Failed  # noqa: E402

NAMES = [row.name for row, _ in ROWS]


def bench(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / "bench.py", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


# ---- statistics


@pytest.mark.parametrize(
    ("count", "rank"),
    # From tables of the sign test: the rank that both ends have, counted from their side.
    [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (21, 6), (25, 8), (30, 10), (50, 18), (100, 40)],
)
def test_interval_of_the_median(count: int, rank: int) -> None:
    """X8: the 95 % interval goes from the k-th smallest to the k-th largest value, by the binomial distribution."""
    values = list(range(1, count + 1))
    random.Random(count).shuffle(values)
    assert report.median_interval(values) == (rank, count + 1 - rank)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_interval_of_few_values(count: int) -> None:
    """X8: with less than six values nothing better than their whole range can be said."""
    assert report.median_interval([float(n) for n in range(count)]) == (0, count - 1)


def test_interval_covers() -> None:
    """X8: of intervals of a skewed distribution at least 95 in 100 hold its median."""
    source = random.Random(4)
    held = 0
    for _ in range(2000):
        low, high = report.median_interval([source.expovariate(1) for _ in range(21)])
        held += low <= math.log(2) <= high
    assert held >= 1900


def test_result_of_pairs() -> None:
    """X8: the ratio is the median of the pairs' ratios, not the ratio of the medians; the bar is for the median."""
    row = Row("some", "meaning", "requests/s", "unix", 1.3)
    result = report.result(row, Samples([10, 40, 90], [10, 10, 60], {"more": 1}))
    assert result["ratio"] == 1.5 and (result["low"], result["high"]) == (1, 4)
    assert (result["tcp"], result["san"], result["pairs"]) == (10, 40, 3)
    assert result["met"] is True and result["more"] == 1
    assert list(result)[:9] == ["name", "provider", "ratio", "low", "high", "tcp", "san", "unit", "pairs"]


def test_result_of_times() -> None:
    """X8: where less is better the bar is a maximum."""
    row = Row("some", "meaning", "us", "unix", 0.8, better="lower")
    assert report.result(row, Samples([9], [10]))["met"] is False
    assert report.result(row, Samples([8], [10]))["met"] is True


def test_result_of_differences() -> None:
    """X8: what is added is judged by itself, also to nothing."""
    row = Row("some", "meaning", "bytes", "unix", 60, "added", "lower")
    result = report.result(row, Samples([61, 60], [0, 1]))
    assert (result["added"], result["added_low"], result["added_high"]) == (60, 59, 61)
    assert result["ratio"] is None and result["met"] is True


def test_result_without_tcp() -> None:
    """P1: a figure without a TCP side has no ratio, and its own interval."""
    row = Row("some", "meaning", "ns", None, 100, "san", "lower")
    result = report.result(row, Samples([101, 99, 120]))
    assert (result["tcp"], result["ratio"], result["san"]) == (None, None, 101)
    assert (result["low"], result["high"], result["met"]) == (99, 120, False)


def test_tables() -> None:
    """X8: the tables have a line for each row; in the README, calls that are met share one."""
    results = [
        report.result(Row("a", "of a", "us", "unix", 0.8, better="lower"), Samples([8.0] * 6, [10.0] * 6)),
        *(
            report.result(
                Row(f"calls-{call}", f"calls of `{call}`", "calls", "tcp", 60, "added", "lower"),
                Samples([20 + extra], [10], {"call": call}),
            )
            for call, extra in (("read", 8), ("write", 3), ("connect", 900))
        ),
    ]
    lines = report.text_table(results).splitlines()
    assert len(lines) == 5
    assert lines[1].split() == ["a", "us", "10", "8", "x0.80", "<=", "0.80", "met"]
    assert lines[4].split()[-4:] == ["+910", "<=", "60", "MISSED"]
    lines = report.markdown_table(results).splitlines()
    assert len(lines) == 5
    assert lines[3] == "| calls of `read`, `write` | calls |  |  | +13 to +18 | <= 60 |"
    assert lines[4] == "| calls of `connect` | calls | 10 | 920 | +910 | <= 60, missed |"


# ---- rows


WANTED = {
    "connect-2cpu": 1.15,
    "connect-1cpu": 1.5,
    "roundtrip-2cpu": 0.80,
    "roundtrip-1cpu": 0.68,
    "stream-large": 1.3,
    "stream-stock": 1.1,
    "redis-p1": 1.3,
    "redis-p16": 1.2,
    "nginx-keepalive": 1.4,
    "nginx-close": 1.5,
    "connect-plain-server": 0.90,
    "decide-1000-ports": 100,
    "decide-1000-prefixes": 100,
    "upcall": 3,
    "connections-10000": 10000,
    "memory-connect": 1024,
    "memory-accept": 1024,
    "start-preload": None,
    "start-sanrun": None,
    "start-engine": None,
    "memory-engine": None,
    **{f"syscalls-{call}": 0 for call in ("read", "write", "connect", "accept")},
    **{f"instructions-{call}": 60 for call in ("read", "write", "send", "recv", "poll", "epoll_wait", "connect")},
    **{f"instructions-{call}": 60 for call in ("accept", "close", "socket", "sendmsg", "recvmsg")},
}


def test_rows_are_complete() -> None:
    """X8: every row that is wanted is there, once, with its bar."""
    bars = {row.name: row.bar for row, _ in ROWS}
    assert {name: bars.get(name, "missing") for name in WANTED} == WANTED
    assert len(NAMES) == len(set(NAMES)) == len({row.meaning for row, _ in ROWS})


def test_rows_are_sound() -> None:
    """X8: only known words stand in the rows, and times and costs are better when lower."""
    for row, _ in ROWS:
        assert row.judged in ("ratio", "added", "san") and row.better in ("higher", "lower")
        assert row.provider in ("unix", "tcp", None)
        assert (row.better == "higher") == (row.unit.endswith("/s") or row.unit == "connections")


# ---- the command line


def test_list() -> None:
    """X8: --list names every row."""
    run = bench("--list")
    assert run.returncode == 0
    assert [line.split()[0] for line in run.stdout.splitlines()] == NAMES


def test_wrong_row() -> None:
    """X8: a row that does not exist is answered with the nearest one, before anything is measured."""
    run = bench("roundtrip-1cpu", "conect-2cpu")
    assert run.returncode == 2 and run.stdout == ""
    assert "no row 'conect-2cpu', perhaps you mean connect-2cpu; --list lists all" in run.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pairs", "0"], "--pairs wants a number from 1 on"),
        (["--plot", "ratios.gif"], "should end in .svg, .png or .pdf"),
        (["--json", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
    ],
)
def test_wrong_options(words: list[str], said: str) -> None:
    """X8: what cannot work is said before anything is measured."""
    run = bench(*words)
    assert run.returncode == 2 and run.stdout == ""
    assert said in run.stderr


# ---- measuring


def test_a_small_measurement(tmp_path: Path) -> None:
    """X8: rows of each kind are measured; the JSON has machine facts and the promised keys."""
    file = tmp_path / "rows.json"
    run = bench("--quick", "--pairs", "3", "--json", str(file), "roundtrip-1cpu", "syscalls-*", "instructions-recv")
    assert run.returncode == 0, run.stderr
    document = json.loads(file.read_text())
    assert document["failures"] == {}
    assert {"cpus", "kernel", "libc", "python", "wmem_max", "load_before"} <= document["machine"].keys()
    assert document["machine"]["congestion_control"] == "cubic"
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [name for name in NAMES if name in rows] and len(rows) == 6
    trip = rows["roundtrip-1cpu"]
    assert (trip["provider"], trip["unit"], trip["pairs"], trip["better"]) == ("unix", "us", 3, "lower")
    assert 0 < trip["low"] <= trip["ratio"] <= trip["high"]
    assert trip["tcp"] > 0 and trip["san"] > 0
    assert all(rows[f"syscalls-{call}"]["tcp"] == 1 for call in ("read", "write", "connect", "accept"))
    received = rows["instructions-recv"]
    assert 5 < received["tcp"] < received["san"] < 1000
    assert received["functions"].keys() >= {"recv"}
    assert "roundtrip-1cpu" in run.stdout and "cubic" in run.stdout


ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import bench_machine, bench_network, bench_run, demo, programs
bench_machine.with_privilege()
bench = bench_run.Bench(1, True, demo.Progress())
try:
    with bench.network():
        for policy in (bench.san, bench.on_tcp):
            pins = bench_network.pinning(1)
            server, client = bench_network.start_pair(bench, pins, bench.san, policy)
            bench_run.ask(client, "roundtrip 10")
            bench_run.expect_san(client, 1)
            bench.stop(client)
            bench.stop(server)
            print("on the SAN", flush=True)
except programs.Failed as failure:
    print("Failed", failure)
finally:
    bench.close()
    bench.apps.remove()
"""


def test_a_side_that_is_elsewhere_is_no_measurement() -> None:
    """X8: a SAN side whose connections are on TCP fails its row, as does a TCP side without cubic."""
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(TOOLS)], capture_output=True, text=True, timeout=60, check=False
    )
    first, second = run.stdout.splitlines()
    assert first == "on the SAN"
    assert second.startswith("Failed") and second.endswith("its counters: {'unix': 0, 'tcp': 1, 'POLICY_TCP': 1}")
    with pytest.raises(Failed, match="bbr instead of cubic"):
        bench_run.expect_cubic(["12.5", "bbr"])
    bench_run.expect_cubic(["12.5", "cubic"])
