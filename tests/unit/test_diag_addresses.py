"""The control side of providers, and the address table as the command line shows it, in network name spaces."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from typing import Any

import pytest
from build_c import ROOT

from interposer.diag import addresses
from interposer.providers import NAMES, unix

APART = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
SANCTL = [sys.executable, "-m", "interposer.cli.sanctl"]
SETUP = "ip link set lo up; ip link add d0 type veth peer name d1; ip link set d0 addrgenmode none"
START = "import sys; sys.argv = ['sanrun', *sys.argv[1:]]; from interposer.cli.sanrun import main; main()"
SPY = "import os; os.execve = lambda *_: (print(*sys.modules), sys.stdout.flush(), os._exit(0)); "


def apart(*commands: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Shell commands in a new network name space."""
    run = subprocess.run(
        [*APART, "sh", "-c", "; ".join(commands)], capture_output=True, text=True, timeout=30, cwd=ROOT
    )
    assert run.returncode == status, run
    assert "Traceback" not in run.stderr
    return run


def test_text() -> None:
    """S25, O2: `sanctl addresses` follows: after each change it shows what is there now."""
    show = shlex.join([*SANCTL, "addresses"])
    change = "ip addr add 10.9.0.1/24 dev d0; ip -6 addr add fd09::1/64 dev d0 nodad; ip link set d0 up"
    shown = apart(SETUP, show, change, show, "ip addr del 10.9.0.1/24 dev d0", show).stdout.splitlines()
    head = "INTERFACE STATE ADDRESS PROVIDERS"
    v4, v6 = "lo up 127.0.0.1/8 unix", "lo up ::1/128 unix"
    assert [" ".join(line.split()) for line in shown] == [
        head, v4, v6,
        head, v4, "d0 up 10.9.0.1/24 unix", v6, "d0 up fd09::1/64 unix",
        head, v4, v6, "d0 up fd09::1/64 unix",
    ]  # fmt: skip


def test_json() -> None:
    """O2: the same for scripts; of a point-to-point link the prefix is the other end's."""
    change = "ip addr add 10.8.0.1 peer 10.8.0.2/24 dev d0; ip addr del ::1/128 dev lo"
    shown = json.loads(apart(SETUP, change, shlex.join([*SANCTL, "addresses", "--json"])).stdout)
    common = {"up": False, "providers": ["unix"]}
    assert shown == {
        "schema": 1,
        "addresses": [
            {**common, "interface": "lo", "index": 1, "up": True, "address": "127.0.0.1", "prefix": 8},
            {**common, "interface": "d0", "index": 3, "address": "10.8.0.1", "prefix": 32},
        ],
        "providers": {"unix": {"usable": True, "problem": None}},
    }


def test_loopback_down() -> None:
    """O2, S7: without a loopback nothing is served, and the verb says why and what to do."""
    run = apart("ip addr add 10.9.0.1/24 dev lo", shlex.join([*SANCTL, "addresses"]), status=1)
    assert run.stdout.splitlines()[1].split() == ["lo", "down", "10.9.0.1/24", "tcp"]
    assert run.stderr == "sanctl: unix cannot be used: the loopback interface is down: ip link set lo up\n"


def test_every_provider_has_a_control_side() -> None:
    """S29: what is built in has a module that explains it, can be asked for itself, and works on this machine."""
    for name in NAMES:
        side = addresses.control(name)
        assert side.EXPLANATION and side.probe() is None
    assert {provider.name for provider in addresses.table().providers} == set(NAMES)


@pytest.mark.parametrize(
    ("family", "protocol", "problem"),
    [
        (socket.AF_UNIX, -1, "AF_UNIX"),
        (socket.AF_NETLINK, socket.NETLINK_ROUTE, "where addresses are"),
        (socket.AF_NETLINK, 4, "tcp_diag"),
        (socket.AF_INET, -1, "ip link set lo up"),
    ],
)
def test_probe(monkeypatch: pytest.MonkeyPatch, family: int, protocol: int, problem: str) -> None:
    """O1: whatever the provider needs and the machine forbids is named."""
    real = socket.socket

    def forbid(a: int, b: int, c: int = -1, **options: Any) -> socket.socket:
        if a == family and protocol in (-1, c):
            raise PermissionError(1, "Operation not permitted")
        return real(a, b, c, **options)

    assert unix.probe() is None
    monkeypatch.setattr(unix.socket, "socket", forbid)
    assert problem in str(unix.probe())


def test_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """O2: a kernel that forbids netlink gives a message, no traceback."""

    def forbid() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(addresses, "IPRoute", forbid)
    with pytest.raises(addresses.AddressesError, match="Operation not permitted"):
        addresses.table()


def modules_of_start(*arguments: str) -> set[str]:
    """What a start of sanrun has loaded when it becomes the program."""
    code = START.replace("from", SPY + "from")
    run = subprocess.run(
        [sys.executable, "-E", "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return set(run.stdout.split())


def test_dry_run_shows_the_table() -> None:
    """S25, O2: `sanrun --dry-run` shows the addresses and who serves them."""
    shown = apart(SETUP, shlex.join([sys.executable, "-E", "-P", "-c", START, "--dry-run", "true"])).stdout
    assert shown.endswith("\naddresses of this machine:\n  127.0.0.1/8 on lo (up): unix\n  ::1/128 on lo (up): unix\n")


def test_a_start_does_not_load_pyroute2() -> None:
    """P1, X8: it would take a tenth of a second. Neither does one with --verbose, which compiles the policy anew."""
    for arguments in (["true"], ["--verbose", "true"]):
        loaded = modules_of_start(*arguments)
        assert "interposer.launch.table_cache" in loaded
        dear = ("pyroute2", "interposer.diag", "interposer.providers.")
        assert not {name for name in loaded if name.startswith(dear)}
