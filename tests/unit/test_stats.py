"""The stats page: native/stats.c writes it, interposer.diag.stats reads it."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stats_driver
from stats_driver import Host

from interposer.diag import stats
from interposer.policy import reasons

SECOND = 1.1
HIDDEN = 500
"""Where the host's hidden_fd() puts descriptors."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats_driver.build(tmp_path_factory.mktemp("stats"))


@pytest.fixture
def host(program: Path) -> Iterator[Host]:
    started = Host(program)
    yield started
    started.close()


def look(pid: int) -> stats.Process | None:
    return stats._look(pid)


def page(pid: int) -> stats.Process:
    found = look(pid)
    assert found
    return found


def row(pid: int, fd: int) -> stats.Row | None:
    return next((row for row in page(pid).rows if row.fd == fd), None)


def test_layout_is_the_one_that_the_reader_knows(host: Host) -> None:
    """O2: native/stats.h and the reader agree on every field's place."""
    said = {name: int(value) for name, _, value in (word.partition("=") for word in host.ask("layout").split())}
    places = iter(said.items())
    sizes = dict(next(places) for _ in range(2))
    assert sizes == {"stats_row": stats.ROW.size, "stats_page": stats.HEADER.size}

    def offsets(prefix: str, fields: dict[str, str]) -> None:
        at = 0
        for field, code in fields.items():
            assert said[f"{prefix}.{field}"] == at, field
            at += struct.calcsize("=" + code)

    offsets("stats_row", {"role": "I", "family": "I", "provider": "I", "reason": "I", "local": "24s", "remote": "24s",
                          "inode": "Q", "started": "Q", "rule": f"{stats.RULE_SIZE}s", "sequence": "Q"})
    offsets("endpoint", {"ip": "16s", "scope": "I", "port": "H"})
    offsets("stats_page", {"magic": "8s", "version": "I", "pid": "I", "row_size": "I", "nrows": "I", "rows": "I",
                           "engine": "I", "engine_reason": "I", "max_row": "I", "started": "Q", "table_generation": "Q",
                           "connections": "8Q", "listeners": "8Q", "reasons": "64Q", "upcalls": "Q"})
    limits = (stats.PROVIDERS, stats.REASONS, stats.ROWS, stats.RULE_SIZE)
    assert (said["providers"], said["reasons"], said["rows"], said["rule"]) == limits


def test_no_page_before_something_happened(host: Host) -> None:
    """O2, X8: a process that does nothing with sockets has no page, and costs none."""
    host.do("generation 7", "clear 3", "copy 3 4")
    assert look(host.pid) is None
    host.do("connection 1")
    assert page(host.pid).generation == 7


def test_counters(host: Host) -> None:
    """O1, O2: connections and listeners by provider, fall-backs by reason, up-calls, engine."""
    policy, busy = reasons.BY_SYMBOL["POLICY_TCP"].number, reasons.BY_SYMBOL["ENGINE_BUSY"].number
    host.do("connection 1", "connection 1", "connection 0", "listener 1", "upcall", "upcall", "upcall")
    host.do(f"reason {policy}", f"reason {policy}", f"reason {busy}", "reason 63", "reason 64", "connection 8")
    found = page(host.pid)
    assert found.connections == {"unix": 2, "tcp": 1}
    assert found.listeners == {"unix": 1, "tcp": 0}
    assert found.reasons == {"POLICY_TCP": 2, "ENGINE_BUSY": 1, "UNKNOWN_63": 1}
    assert found.upcalls == 3
    assert found.exe == os.readlink(f"/proc/{host.pid}/exe")
    assert abs(found.started / 1e9 - time.time()) < 60
    texts = {"0 0": "not started", "1 0": "ready", "2 0": "helper", f"3 {busy}": "refused: ENGINE_BUSY"}
    for command, text in texts.items():
        host.do(f"engine {command}")
        assert page(host.pid).engine == text


def test_rows(host: Host) -> None:
    """O1, O2: a row says role, addresses, provider, reason and rule of one descriptor."""
    host.do("row 7 1 4 1 0 127.0.0.1 80 - 0 4711 /etc/p.toml:3", "row 5 2 6 0 3 ::1 5000 fe80::1 443 12 defaults")
    low, high = page(host.pid).rows
    assert (low.fd, low.role, low.provider, low.reason, low.inode, low.rule) == (5, "connect", "tcp", 3, 12, "defaults")
    assert (str(low.local), str(low.remote)) == ("[::1]:5000", "[fe80::1]:443")
    assert (high.fd, high.role, high.provider, high.reason, high.inode) == (7, "listen", "unix", 0, 4711)
    assert (str(high.local), high.remote, high.rule) == ("127.0.0.1:80", None, "/etc/p.toml:3")
    assert abs(high.started / 1e9 - time.time()) < 60
    host.do("copy 7 30", "clear 7", "copy 9 5", "clear 99999999", "clear -1", "row -1 1 4 0 0 - 0 - 0 0 x")
    (copy,) = page(host.pid).rows
    assert (copy.fd, copy.rule) == (30, "/etc/p.toml:3")
    host.do(f"row {stats.ROWS - 1} 3 4 1 0 - 0 - 0 0 x", f"row {stats.ROWS} 3 4 1 0 - 0 - 0 0 x")
    assert [found.fd for found in page(host.pid).rows] == [30, stats.ROWS - 1]


def test_rule_of_a_row_is_its_last_one(host: Host) -> None:
    """O2, P6: a row that is used again shows the rule of its new socket, and of the new policy after a reload."""
    def shown() -> str:
        return page(host.pid).rows[0].rule

    host.do("row 5 1 4 1 0 - 0 - 0 0 first")
    assert shown() == "first"
    host.do("clear 5", "row 5 1 4 1 0 - 0 - 0 0 second")
    assert shown() == "second"
    host.do("clear 5", "row 5 1 4 1 0 - 0 - 0 0 second")
    assert shown() == "second"
    host.do("rename second other", "generation 77", "row 5 1 4 1 0 - 0 - 0 0 other")
    assert shown() == "other"


def test_first_writes_of_many_threads_are_all_counted(program: Path) -> None:
    """O2, T13: threads that meet while the page is made lose no count and make one page."""
    for _ in range(5):
        host = Host(program)
        try:
            host.do("threads 16 500")
            assert page(host.pid).connections["unix"] == 16 * 500
            links = [os.readlink(f"/proc/{host.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{host.pid}/fd")]
            assert links.count(stats.LINK) == 1
        finally:
            host.close()


@pytest.mark.parametrize("how", ["fork", "clone"])
def test_child_makes_its_own_page(host: Host, how: str) -> None:
    """O2, T4: a child counts for itself, shows what it inherited, and leaves the parent's page alone."""
    host.do("generation 3", "engine 1 0", "keep 5", "connection 1", "row 5 3 4 1 0 - 0 - 0 0 mine")
    child = host.fork(how)
    assert look(child) is None, "the parent's page is not the child's"
    host.do("connection 0")
    found = page(child)
    assert found.connections == {"unix": 0, "tcp": 1}
    assert (found.engine, found.generation) == ("ready", 3)
    assert [(inherited.fd, inherited.rule) for inherited in found.rows] == [(5, "inherited")]
    parents = page(host.pid)
    assert parents.connections == {"unix": 1, "tcp": 0}
    assert [(kept.fd, kept.rule) for kept in parents.rows] == [(5, "mine")]
    links = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
    assert links.count(stats.LINK) == 1, "the new page takes the descriptor of the inherited one"
    host.do("threads 8 100")
    assert page(child).connections == {"unix": 800, "tcp": 1}
    host.join()
    host.do("connection 1")
    assert page(host.pid).connections == {"unix": 2, "tcp": 0}


def test_child_that_closes_an_inherited_listener_shows_the_rest(host: Host) -> None:
    """O2, T4: a server that forks for each connection is seen while its child serves."""
    host.do("keep 5", "row 4 1 4 1 0 - 0 - 0 0 l", "row 5 3 4 1 0 - 0 - 0 0 c")
    child = host.fork()
    host.do("clear 6")
    assert look(child) is None
    host.do("clear 4")
    assert [found.fd for found in page(child).rows] == [5]
    assert [found.fd for found in page(host.pid).rows] == [4, 5]
    host.join()


def test_closed_descriptor_is_replaced(host: Host) -> None:
    """O2, T11: a daemon that closes all descriptors is found again within a second, with all it had counted."""
    host.do("connection 1", "row 5 1 4 1 0 - 0 - 0 0 before", "row 3000 1 4 1 0 - 0 - 0 0 far", "closefrom 3")
    assert look(host.pid) is None
    time.sleep(SECOND)
    host.do("row 6 2 4 1 0 - 0 - 0 0 after", "connection 1")
    found = page(host.pid)
    assert found.connections["unix"] == 2
    assert [kept.rule for kept in found.rows] == ["before", "after", "far"]


def test_number_that_the_program_took_stays_the_programs(host: Host) -> None:
    """T11, T10: where the program put another file on our descriptor's number, that file is left alone."""
    host.do("connection 1", f"take {HIDDEN}")
    taken = os.readlink(f"/proc/{host.pid}/fd/{HIDDEN}")
    assert taken != stats.LINK
    child = host.fork()
    host.do("connection 1")
    assert os.readlink(f"/proc/{child}/fd/{HIDDEN}") == taken
    assert page(child).connections["unix"] == 1
    host.join()
    time.sleep(SECOND)
    host.do("row 6 2 4 1 0 - 0 - 0 0 x")
    assert os.readlink(f"/proc/{host.pid}/fd/{HIDDEN}") == taken
    assert page(host.pid).connections["unix"] == 1


def test_small_file_limit_means_fewer_rows(host: Host) -> None:
    """X6: RLIMIT_FSIZE is obeyed, as going beyond it would kill the program."""
    host.do("limit fsize 20000", "connection 1", "row 5 1 4 1 0 - 0 - 0 0 x", "row 200 1 4 1 0 - 0 - 0 0 x")
    found = page(host.pid)
    assert found.connections["unix"] == 1
    assert [kept.fd for kept in found.rows] == [5]


@pytest.mark.parametrize("limit", ["fsize 100", "nofile 3", "as 1000000"])
def test_no_page_is_no_error(host: Host, limit: str) -> None:
    """X6: where the page cannot be had the program runs on."""
    host.do(f"limit {limit}", "connection 1", "row 5 1 4 1 0 - 0 - 0 0 x", "copy 5 6", "clear 5", "engine 1 0")
    assert look(host.pid) is None


def test_locked_memory_is_not_filled(host: Host) -> None:
    """X6: in a program that locks all its memory the sparse page stays sparse, and its allowance whole."""
    host.do("mlockall", "connection 1", "row 5 1 4 1 0 - 0 - 0 0 x")
    assert page(host.pid).rows
    resident, flags = 0, set()
    with open(f"/proc/{host.pid}/smaps") as smaps:
        ours = False
        for line in smaps:
            if "-" in line.split()[0]:
                ours = line.rstrip().endswith(stats.LINK)
            elif ours and line.startswith("Rss:"):
                resident += int(line.split()[1])
            elif ours and line.startswith("VmFlags:"):
                flags.update(line.split()[1:])
    assert 0 < resident <= 64
    assert flags and "lo" not in flags, "it does not count as locked"


def test_cost(program: Path) -> None:
    """X8: a row and the first page cost next to nothing (best of several: other load is not the writer's)."""
    rows, firsts = [], []
    for _ in range(8):
        host = Host(program)
        try:
            host.do("take 99")  # so that the originals are resolved
            firsts.append(int(host.ask("first")))
            rows.append(int(host.ask("bench 100000")))
        finally:
            host.close()
    assert min(rows) < 200, "nanoseconds"
    assert min(firsts) < 100_000, "nanoseconds"


def test_row_is_never_seen_half_written(host: Host) -> None:
    """O2: a reader sees one whole row or the other."""
    one = ("tcp", 1, "1.1.1.1:1111", "1.1.1.1:1111", 1111, "1" * 32)
    two = ("unix", 2, "2.2.2.2:2222", "2.2.2.2:2222", 2222, "2" * 32)
    host.do("hammer 5")
    seen = set()
    end = time.monotonic() + 2
    while time.monotonic() < end and (len(seen) < 2 or time.monotonic() < end - 1):
        found = look(host.pid)
        for shown in found.rows if found else ():
            seen.add((shown.provider, shown.reason, str(shown.local), str(shown.remote), shown.inode, shown.rule))
    assert seen and seen <= {one, two}


# Damaged pages.


def good() -> tuple[bytearray, bytearray]:
    """Head and rows of a valid page of this process, with one row at 5."""
    head = bytearray(stats.HEADER.pack(b"SANSTATS", 1, os.getpid(), stats.ROW.size, 64, 768, 0, 0, 5, 1, 2, *[0] * 81))
    rows = bytearray(64 * stats.ROW.size)
    ipv4 = stats.ENDPOINT.pack(bytes(10) + b"\xff\xff\x7f\0\0\1", 0, 80, 0)
    rows[5 * stats.ROW.size : 6 * stats.ROW.size] = stats.ROW.pack(1, 2, 1, 0, ipv4, bytes(24), 9, 8, b"defaults", 2)
    return head, rows


def read(head: bytes, rows: bytes, size: int | None = None) -> stats.Process | None:
    file = os.memfd_create("test")
    try:
        os.pwrite(file, head, 0)
        os.pwrite(file, rows, 768)
        if size is not None:
            os.ftruncate(file, size)
        return stats.read(file, os.getpid())
    finally:
        os.close(file)


def test_good_page_is_read() -> None:
    """O2: what the tests below damage is sound."""
    found = read(*good())
    assert found and [(kept.fd, str(kept.local)) for kept in found.rows] == [(5, "127.0.0.1:80")]


HEAD_DAMAGE = {
    "magic": (0, b"SANTABLE", "no valid head"),
    "version": (8, b"\2", "version 2"),
    "row size": (16, b"\1\0\0\0", "rows of 1 bytes"),
    "no rows": (20, bytes(4), "impossible rows"),
    "too many rows": (20, b"\xff\xff\xff\xff", "impossible rows"),
    "rows beyond the end": (20, b"\0\1\0\0", "cut off"),
    "rows in the head": (24, b"\0\0\0\0", "impossible rows"),
    "rows far away": (24, b"\xff\xff\xff\xff", "impossible rows"),
    "engine": (28, b"\4", "impossible engine"),
    "engine reason": (32, b"\x40", "impossible engine"),
    "max row": (36, b"\x40", "impossible rows"),
}


@pytest.mark.parametrize("damage", HEAD_DAMAGE)
def test_damaged_head(damage: str) -> None:
    """X4, O2: no number in the head is believed."""
    at, data, message = HEAD_DAMAGE[damage]
    head, rows = good()
    head[at : at + len(data)] = data
    with pytest.raises(stats.PageError, match=message):
        read(head, rows)


ROW_DAMAGE = {
    "role": (0, b"\4"),
    "family": (4, b"\1"),
    "provider": (8, b"\x08"),
    "reason": (12, b"\x40"),
    "rule without end": (80, b"x" * 96),
}


@pytest.mark.parametrize("damage", ROW_DAMAGE)
def test_damaged_row(damage: str) -> None:
    """X4, O2: no number in a row is believed."""
    at, data = ROW_DAMAGE[damage]
    head, rows = good()
    at += 5 * stats.ROW.size
    rows[at : at + len(data)] = data
    with pytest.raises(stats.PageError, match="impossible row for descriptor 5"):
        read(head, rows)


def test_short_pages() -> None:
    """X4, O2: a page that is cut off anywhere is an error, an empty one is one that is being made."""
    head, rows = good()
    for size in range(1, 768 + len(rows), 97):
        with pytest.raises(stats.PageError):
            read(head, rows, size)
    assert read(head, rows, 0) is None
    assert read(bytes(len(head)), rows) is None


def test_what_is_no_file_is_not_read() -> None:
    """X4: a pipe that bears the page's name cannot make the reader wait."""
    inner, outer = os.pipe()
    try:
        with pytest.raises(stats.PageError, match="not a file"):
            stats.read(inner, os.getpid())
    finally:
        os.close(inner)
        os.close(outer)


def test_page_of_another_process_is_ignored() -> None:
    """O2: a child that has not made its own page does not show its parent's."""
    head, rows = good()
    struct.pack_into("=I", head, 12, os.getppid())
    assert read(head, rows) is None


def test_random_damage_never_crashes_the_reader() -> None:
    """X4, O2: whatever stands in a page, the answer is a process, nothing, or PageError."""
    rng = random.Random(1)
    outcomes = set()
    for _ in range(1500):
        head, rows = good()
        for _ in range(rng.randrange(1, 6)):
            target, start, end = rng.choice(((head, 0, 184), (rows, 5 * stats.ROW.size, 6 * stats.ROW.size)))
            target[rng.randrange(start, end)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            outcomes.add(type(read(head, rows)))
        except stats.PageError:
            outcomes.add(stats.PageError)
    assert outcomes == {stats.Process, type(None), stats.PageError}


def test_damaged_page_hides_no_other_process(host: Host, program: Path) -> None:
    """X4, O2: one process with a damaged page is named, all others are listed."""
    other = Host(program)
    try:
        host.do("connection 1")
        other.do("connection 1")
        with open(f"/proc/{other.pid}/fd/{HIDDEN}", "r+b", buffering=0) as file:
            file.write(b"nonsense")
        found, problems = stats.processes()
        assert host.pid in [process.pid for process in found]
        assert f"process {other.pid}: its stats page has no valid head" in problems
        with pytest.raises(stats.PageError):
            stats.process(other.pid)
    finally:
        other.close()


def test_page_ends_with_the_process(program: Path) -> None:
    """X5: kill -9 leaves nothing behind."""
    host = Host(program)
    try:
        host.do("connection 1")
        os.kill(host.pid, signal.SIGKILL)
        host.popen.wait(stats_driver.WAIT)
        with pytest.raises(stats.ProcessError, match="there is no process"):
            stats.process(host.pid)
    finally:
        host.close()
