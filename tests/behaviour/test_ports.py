"""Local ports, in a network name space that has only a few."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from puppet import plain_environment
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a network name space")
CLONE_NEWNET = 0x40000000
FIRST, LAST = 40000, 40019
UPPER = FIRST + (LAST - FIRST) // 2
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    assert libc.unshare(CLONE_NEWNET) == 0
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{FIRST} {LAST}")
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


def test_half_is_left_to_others(san: World) -> None:
    """X6, O1: connections on the SAN hold ports of the upper half only. When these are used up it is TCP, and a program
    without the switch can bind every port of the lower half."""
    listener, address = san.listener(backlog=64, port=30000)
    kinds = []
    while not kinds or kinds[-1]:
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        kinds.append(bool(companion_name(san.client, fd)))
        assert not kinds[-1] or san.client.getsockname(fd)[1] >= UPPER
        assert len(kinds) <= LAST - UPPER + 2
        assert not isinstance(san.server.accept(listener), str)
    assert len(kinds) > 5
    assert dict(stats.process(san.client.pid).reasons) == {"NO_PORT": 1}
    san.client.close(fd)
    san.stage.environments = {**san.stage.environments, "plain": plain_environment()}
    plain, bound = san.stage.start("plain", "plain"), 0
    for port in range(FIRST, UPPER):
        bound += plain.bind(plain.socket(), (LOOPBACK, port)) == 0
    assert bound >= UPPER - FIRST - 1   # but for that of the connection by TCP


def test_nothing_waits_after_the_end(san: World) -> None:
    """X5, X6: a closed connection leaves no socket behind, and its port is free at once."""
    listener, address = san.listener(backlog=64, port=30000)
    for _ in range(3 * (LAST - FIRST)):
        fd, accepted = san.join(listener, address)
        san.client.close(fd)
        san.server.close(accepted)
    shown = subprocess.run(["ss", "-Htan"], capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    assert len(shown) == 1, shown


def test_a_port_comes_again_last(san: World) -> None:
    """X6, T8: a closed connection's port is taken again only when all the others were, as after TIME_WAIT."""
    listener, address = san.listener(port=30000)
    used = []
    for _ in range(2 * (LAST - UPPER + 1)):
        fd = san.client.socket()
        assert san.client.connect(fd, address) == 0
        assert companion_name(san.client, fd)
        used.append(san.client.getsockname(fd)[1])
        accepted, _ = san.server.accept(listener)
        san.client.close(fd)
        san.server.close(accepted)
    half = len(used) // 2
    assert used[:half] == used[half:] and len(set(used)) == half
