"""`sanctl reload`: running programs follow a changed policy, and nothing else changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from policy_world import NO_PROCESSES, ON_SAN, PYTHON, SANRUN, World

from interposer.diag import stats

TCP = '[[rule]]\nrole = "connect"\nuse = "tcp"\n'
ON_TCP = ("tcp", "policy.toml:2")
FUNCTION = '[[rule]]\nrole = "connect"\nuse = "python:site_policy:decide"\n'
# Where the program's environment was, there is nothing any more, as after setproctitle().
FORGETFUL = """\
import runpy, sys
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[47]), int(fields[48])
with open("/proc/self/mem", "r+b", buffering=0) as memory:
    memory.seek(start)
    memory.write(bytes(end - start))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


def tables(world: World) -> list[Path]:
    return sorted((world.folder / "run" / "interposer").glob("table-*"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def helpers(world: World) -> list[int]:
    """Pids of the living helpers that serve a table of this world."""
    found = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "sanrun-helper":
            with contextlib.suppress(OSError):
                if str(world.folder).encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process.pid)
    return found


def test_programs_follow_and_connections_stay(world: World) -> None:
    """P6: after sanctl reload the verdicts change within a second; a connection stays on the SAN and works."""
    client, pid = made = world.client()
    first = int(client.ask("connect"))
    world.write(TCP)
    text = world.reload()
    assert text == f"{tables(world)[0]}: reloaded from {world.policy}; 2 programs follow\n"
    world.follows(made, ON_TCP)
    assert world.row(pid, first)["provider"] == "unix"
    assert client.ask(f"echo {first}") == "hello"
    world.write("")
    table = world.reload_json()
    assert table.pop("processes") == sorted(process.pid for process in world.programs)
    assert table == {
        "table": str(tables(world)[0]), "result": "reloaded", "policy": [str(world.policy)], "problems": [],
        "warnings": [],
    }  # fmt: skip
    world.follows(made, ON_SAN, ON_TCP)


def test_bad_policy_changes_nothing(world: World) -> None:
    """P4, P6: file, line and word of every error, status 1, and the old policy holds; the next good one is taken."""
    client = world.client()
    world.connect(client)
    before = tables(world)[0].read_bytes()
    world.write('[[rule]]\nrole = "lissen"\nuse = "tpc"\n')
    text = world.reload(status=1)
    assert f'{world.policy}:3: role = "lissen"' in text and 'did you mean "listen"?' in text
    assert f'{world.policy}:4: unknown provider "tpc"' in text
    assert [problem["line"] for problem in world.reload_json(failed=True)["problems"]] == [3, 4]
    assert tables(world)[0].read_bytes() == before
    time.sleep(1)
    assert world.connect(client) == ON_SAN
    world.write(TCP)
    world.reload()
    world.follows(client, ON_TCP)


TWO_LISTENERS = """\
import os, socket, sys
first = socket.create_server(("127.0.0.1", 0))
print(os.getpid(), flush=True)
for line in sys.stdin:
    second = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(first.getsockname())
    accepted = first.accept()[0]
    print(second.fileno(), accepted.fileno(), flush=True)
"""


def test_a_rule_is_named_as_of_its_policy(world: World) -> None:
    """P6, O1: what a listener of an earlier policy accepts is not shown as of a rule that now has the number."""
    script = world.folder / "two.py"
    script.write_text(TWO_LISTENERS)
    program, pid = world.started(str(SANRUN), "--policy", str(world.policy), PYTHON, str(script))

    def rules() -> list[str]:
        descriptors = [int(word) for word in program.ask("go").split()]
        rows = {row.fd: row.rule for row in stats.process(pid).rows}
        return [rows[descriptor].removeprefix(f"{world.folder}/") for descriptor in descriptors]

    assert rules() == ["defaults", "defaults"]
    world.write('[[rule]]\nrole = "both"\nuse = ["unix"]\n')
    world.reload()
    wait_until(lambda: rules()[0] == "policy.toml:2")
    assert rules() == ["policy.toml:2", "an earlier policy"]


def test_a_process_alone(world: World) -> None:
    """P6: with a PID only its policy is reloaded, for all programs that run by it."""
    other = world.folder / "other.toml"
    shutil.copy(world.policy, other)
    one = world.client()
    two = world.started(str(SANRUN), "--policy", str(other), *world.client_command())
    for policy in (world.policy, other):
        policy.write_text("version = 1\n" + TCP)
    assert f"reloaded from {other}; 1 program follows" in world.sanctl("reload", str(two[1]), str(two[1]))
    world.follows(two, ("tcp", "other.toml:2"))
    assert world.connect(one) == ON_SAN


def test_warnings_are_told(world: World) -> None:
    """P4: a reload says what deserves a look, as sanctl check does."""
    world.write('[[process]]\nexe = "nobody"\n')
    text = world.reload()
    assert f"{world.policy}:2: warning: [[process]] changes nothing" in text
    assert "reloaded" in text
    assert [warning["line"] for warning in world.reload_json()["warnings"]] == [2]


def test_drop_in_is_read(world: World) -> None:
    """P4, P6: a file that came into policy.d is part of the policy from the reload on."""
    client = world.client()
    world.connect(client)
    (world.folder / "policy.d").mkdir()
    extra = world.folder / "policy.d" / "extra.toml"
    extra.write_text("version = 1\n" + TCP)
    assert f"reloaded from {world.policy}, {extra}" in world.reload()
    world.follows(client, ("tcp", "policy.d/extra.toml:2"))


def test_policy_that_comes_and_goes(world: World) -> None:
    """P6: a program that was started without any policy gets the one that is there now, and loses it with its file."""
    home = world.folder / "config"
    world.environment["XDG_CONFIG_HOME"] = str(home)
    client = world.started(str(SANRUN), *world.client_command())
    assert world.connect(client) == ON_SAN
    (home / "interposer").mkdir(parents=True)
    policy = home / "interposer" / "policy.toml"
    policy.write_text("version = 1\n" + TCP)
    assert f"reloaded from {policy}; 1 program follows" in world.reload()
    world.follows(client, ("tcp", "config/interposer/policy.toml:2"))
    policy.unlink()
    if not os.path.exists("/etc/interposer/policy.toml"):
        assert "reloaded from the built-in defaults; 1 program follows" in world.reload()
        world.follows(client, ON_SAN, ("tcp", "config/interposer/policy.toml:2"))


def test_policy_that_is_gone(world: World) -> None:
    """P6, X5: while a program runs by it the table stays, and status 1 says so; then it is removed, and told."""
    client = world.client()
    table = tables(world)[0]
    world.policy.unlink()
    text = world.reload(status=1)
    assert f"its policy {world.policy} is gone, and programs run by it: " in text and str(client[1]) in text
    assert table.exists()
    assert world.connect(client) == ON_SAN
    world.close()
    world.programs.clear()
    assert world.reload(alone=True) == f"{table}: removed: {world.policy} is gone, and no program runs by it\n"
    assert tables(world) == []
    if os.geteuid() == 0:
        assert "there is nothing to reload" in world.sanctl("reload", prefix=NO_PROCESSES)


def test_only_tables_of_ours_are_touched(world: World) -> None:
    """X3: of what lies beside them, links, damaged and foreign tables, nothing is read as a policy or removed."""
    table = tables(world)[0]
    elsewhere = world.folder / "elsewhere"
    shutil.copy(table, elsewhere)
    link, damaged, note = (table.with_name(name) for name in ("table-link", "table-damaged", "note"))
    link.symlink_to(elsewhere)
    damaged.write_bytes(table.read_bytes()[:-1])
    table.with_name("table-altered").write_bytes(table.read_bytes().replace(b"policy.toml", b"nobody.toml"))
    note.write_text("table")
    os.mkfifo(table.with_name("table-fifo"))
    if os.geteuid() == 0:
        foreign = shutil.copy(table, table.with_name("table-foreign"))
        os.chown(foreign, 65534, 65534)
        shared = shutil.copy(table, table.with_name("table-shared"))
        os.chmod(shared, 0o666)
    world.close()
    world.programs.clear()
    world.policy.unlink()
    before = {path.name for path in table.parent.iterdir()}
    assert world.reload(alone=True).count("removed") == 1
    assert {path.name for path in table.parent.iterdir()} == before - {table.name}
    assert elsewhere.exists()


def test_run_time_directory_of_others_is_refused(world: World) -> None:
    """X3: nothing is written where somebody else could have put a file."""
    world.close()
    world.programs.clear()
    place = tables(world)[0].parent
    place.chmod(0o777)
    assert "can be written by other users" in world.reload(status=1)
    place.rename(place.with_name("other"))
    place.symlink_to("other")
    assert "is a symbolic link" in world.reload(status=1)


@ROOT_ONLY
def test_another_users_program_cannot_lead_root_astray(world: World) -> None:
    """X3: what another user's program says of its table is not followed, neither by name nor into a pipe."""
    pipe = world.folder / "pipe"
    os.mkfifo(pipe, 0o666)
    forged = Path(shutil.copy(tables(world)[0], world.folder / "table-forged"))
    os.chown(forged, 65534, 65534)
    library = SANRUN.parents[2] / "interposer" / "libinterposer.so"
    for place in (pipe, forged):
        environment = {"LD_PRELOAD": str(library), "INTERPOSER_TABLE": str(place), "PATH": "/usr/bin:/bin"}
        stranger = subprocess.Popen(["sleep", "60"], env=environment, user=65534, group=65534, extra_groups=[])
        try:
            wait_until(lambda pid=stranger.pid: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
            assert str(place) not in world.reload()
            text = world.sanctl("reload", str(stranger.pid), status=1)
            assert "this installation did not make it for this user" in text
        finally:
            stranger.kill()
            stranger.wait(10)
    assert forged.stat().st_uid == 65534


def test_forgetful_program_keeps_its_table(world: World) -> None:
    """P6, X5: a program that has overwritten its environment may still need the table of a policy that is gone."""
    script, policy = world.folder / "forgetful.py", world.folder / "other.toml"
    script.write_text(FORGETFUL)
    policy.write_text("version = 1\n")
    words = ("--policy", str(policy), PYTHON, str(script), *world.client_command()[1:])
    client = world.started(str(SANRUN), *words)
    assert b"INTERPOSER" not in Path(f"/proc/{client[1]}/environ").read_bytes()
    policy.write_text("version = 1\n" + TCP)
    assert f"reloaded from {policy}; 0 programs follow" in world.reload()
    world.follows(client, ("tcp", "other.toml:2"))
    policy.unlink()
    text = world.reload()
    assert "is gone, but programs that do not say by which policy they run might need it" in text
    assert len(tables(world)) == 2
    assert "does not say by which policy it runs" in world.sanctl("reload", str(client[1]), status=1)


@pytest.mark.parametrize("words, message", [
    (("1",), "process 1"), (("999999",), "there is no process 999999"), (("0",), "no process id"),
    (("x",), "no process id"), ((str(os.getpid()),), "is not interposed"),
])  # fmt: skip
def test_wrong_process(world: World, words: tuple[str, ...], message: str) -> None:
    """P6: a process that cannot be told to follow is named, and nothing is reloaded."""
    before = tables(world)[0].stat().st_ino
    assert message in world.sanctl("reload", *words, status=2 if "id" in message else 1)
    assert tables(world)[0].stat().st_ino == before


def test_help() -> None:
    """O2: what it does and what it takes."""
    words = [SANRUN.parent / "sanctl", "reload", "--help"]
    text = subprocess.run(words, capture_output=True, text=True, timeout=20).stdout
    assert "--json" in text and "PID" in text and "within a second" in " ".join(text.split())


def test_functions_that_come_with_a_reload(world: World) -> None:
    """P5, P6, P8, X5: a policy that begins to ask functions gets its helper, which ends with the programs."""
    client = world.client()
    assert world.connect(client) == ON_SAN
    assert helpers(world) == []
    (world.folder / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    world.write(FUNCTION)
    world.reload()
    assert len(helpers(world)) == 1
    world.follows(client, ON_TCP)
    assert world.row(client[1], int(client[0].ask("connect")))["reason"] == "FUNCTION_TCP"
    (world.folder / "site_policy.py").write_text("def decide(request):\n    return 'unix'  # now\n")
    world.reload()
    (helper,) = helpers(world)
    world.follows(client, ("unix", "policy.toml:2"), ON_TCP)
    held = len(os.listdir(f"/proc/{helper}/fd"))
    world.reload()
    assert len(os.listdir(f"/proc/{helper}/fd")) == held, "each program is watched once"
    world.write("")
    world.reload()
    world.follows(client, ON_SAN, ("unix", "policy.toml:2"))
    world.close()
    world.programs.clear()
    wait_until(lambda: helpers(world) == [])


def test_an_answer_that_the_reload_overtook(world: World) -> None:
    """P5, P6: a function still runs when the policy changes: its answer is neither used nor remembered."""
    gate = world.folder / "gate"
    (world.folder / "site_policy.py").write_text(
        "import os, time\n"
        "def decide(request):\n"
        f"    while not os.path.exists({str(gate)!r}):\n"
        "        time.sleep(0.01)\n"
        "    return 'unix'\n"
    )
    world.write("[defaults]\ntimeout_ms = 9000\n" + FUNCTION)
    client = world.client()
    program = client[0].process
    assert program.stdin
    program.stdin.write("connect\n")
    program.stdin.flush()
    time.sleep(1)  # the library looks for a new table at most every 0.8 s
    world.write(TCP)
    world.reload()
    gate.touch()
    row: dict[str, Any] = world.row(client[1], int(client[0].line()))
    assert (row["provider"], row["rule"], row["reason"]) == ("tcp", f"{world.policy}:2", "POLICY_TCP")
    assert world.connect(client) == ON_TCP
