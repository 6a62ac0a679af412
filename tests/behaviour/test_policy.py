"""Policies in running programs: which section a process gets, and what a changed policy changes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from policy_world import ON_SAN, PYTHON, SANRUN, World

TCP_RULE = '[[process.rule]]\nrole = "connect"\nuse = "tcp"\n'


def test_sections_by_predicate(world: World) -> None:
    """P3, O1: A section applies by argument, environment, user, executable, name and cgroup, all together."""
    cgroup = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
    name = Path(os.path.realpath(PYTHON)).name
    world.write(
        f'[[process]]\nexe = "{name}"\nname = "python3*"\nuser = {os.geteuid()}\ncgroup = "{cgroup}"\narg = "--t?p"\n'
        f'env = "REGION=north*"\n{TCP_RULE}'
    )
    assert world.connect(world.client("--tcp", REGION="northwest")) == ("tcp", "policy.toml:9")
    assert world.connect(world.client("--tcp", REGION="south")) == ON_SAN
    assert world.connect(world.client("--tccp", REGION="northwest")) == ON_SAN
    for line in (f"user = {os.geteuid() + 1}", 'exe = "/opt/*"', 'name = "nginx"', 'cgroup = "/none"', 'env = "UNSET"'):
        world.write(f'[[process]]\narg = "--tcp"\n{line}\n{TCP_RULE}')
        assert world.connect(world.client("--tcp")) == ON_SAN, line


def test_children_get_the_policy_of_their_program(world: World) -> None:
    """P3: What a shell starts is judged as itself, whether it is forked or takes the shell's place."""
    world.write(f'[[process]]\nname = "sh"\n{TCP_RULE}')
    assert world.connect(world.client(shell='"$@"; exit')) == ON_SAN
    assert world.connect(world.client(shell='exec "$@"')) == ON_SAN
    world.write(f'[[process]]\nname = "python3*"\n{TCP_RULE}')
    assert world.connect(world.client(shell='exec "$@"')) == ("tcp", "policy.toml:4")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_user_is_whoever_the_program_starts_as(world: World) -> None:
    """P3: A program that is started as another user has that user's section, whoever ran sanrun."""
    world.write(f'[[process]]\nuser = 65534\n{TCP_RULE}')
    for folder in (world.folder, *list(world.folder.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    become = "exec setpriv --reuid=65534 --regid=65534 --clear-groups "
    assert world.connect(world.client(shell=become + '"$@"')) == ("tcp", "policy.toml:4")
    assert world.connect(world.client()) == ON_SAN


def test_sections_look_at_the_program_alone(world: World) -> None:
    """P3: Arguments and environment are those that the program itself got, not its parents'."""
    world.write(f'[[process]]\nenv = "REGION=north"\n{TCP_RULE}[[process]]\narg = "--tcp"\n{TCP_RULE}')
    assert world.connect(world.client(shell='REGION=north exec "$@"')) == ("tcp", "policy.toml:4")
    assert world.connect(world.client(shell='exec "$@"', REGION="north")) == ("tcp", "policy.toml:4")
    assert world.connect(world.client(shell='unset REGION; exec "$@"', REGION="north")) == ON_SAN
    assert world.connect(world.client(shell='exec "$@" --tcp')) == ("tcp", "policy.toml:9")
    assert world.connect(world.client(shell='exec "$@" "" --tcp')) == ("tcp", "policy.toml:9")


def test_sections_in_their_order(world: World) -> None:
    """P3, P1: Of several sections that apply the first matching rule wins, global rules are last, and what none says is
    the defaults'."""
    world.write(
        '[defaults]\notherwise = "error"\n'
        f'[[process]]\narg = "--one"\n[[process.rule]]\nrole = "connect"\nremote = "127.0.0.1:1"\nuse = "tcp"\n'
        f'[[process]]\narg = "--*"\n{TCP_RULE}'
        f'[[process]]\nenv = "THREE"\n[[process.rule]]\nrole = "connect"\nuse = "unix"\n'
        '[[rule]]\nrole = "connect"\nremote = "127.0.0.1"\nuse = "unix"\n'
    )
    assert world.connect(world.client("--one", THREE="")) == ("tcp", "policy.toml:12")
    assert world.connect(world.client(THREE="")) == ("unix", "policy.toml:17")
    assert world.connect(world.client()) == ("unix", "policy.toml:20")


def test_changed_policy_reaches_running_programs(world: World) -> None:
    """P6: After a reload new connections follow the new policy within a second; those made stay and work."""
    client, pid = made = world.client()
    first = int(client.ask("connect"))
    assert world.row(pid, first)["provider"] == "unix"
    world.write('[[rule]]\nrole = "connect"\nuse = "tcp"\n')
    # Starting anything by the changed policy compiles it anew.
    assert world.start("/bin/true").process.wait(timeout=20) == 0
    # One look of sanctl is part of the time.
    world.follows(made, ("tcp", "policy.toml:2"))
    assert client.ask(f"echo {first}") == "hello"
    assert world.row(pid, first)["provider"] == "unix"


def test_bad_policy_stops_the_launcher(world: World) -> None:
    """P4: A bad policy stops the launcher before the program starts, and running programs keep the old one."""
    client = world.client()
    world.write('[[rule]]\nrole = "connect"\nuse = "tpc"\n')
    marker = world.folder / "started"
    words = [str(SANRUN), "--policy", str(world.policy), "touch", str(marker)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, env=world.environment)
    assert done.returncode == 125
    assert f'{world.policy}:4: unknown provider "tpc"' in done.stderr
    assert 'did you mean "tcp"?' in done.stderr
    assert not marker.exists()
    time.sleep(1.1)
    assert world.connect(client) == ON_SAN
