"""Every socket option by number, as tests/hosts/options_walk.c asks for it: on TCP and on the SAN the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

import pytest
from puppet import ROOT
from walks import walk

TABLE = ROOT / "interposer/native/options.def"
LEVELS = {"SOL_SOCKET": 1, "IPPROTO_TCP": 6, "IPPROTO_IP": 0, "IPPROTO_IPV6": 41}
Key = tuple[int, int]


@cache
def table() -> Mapping[Key, tuple[str, str]]:
    """Level and number to name and treatment."""
    found = re.findall(r"^OPTION\((\w+), (\d+), (\w+), (\w+), ", TABLE.read_text(), re.MULTILINE)
    return {(LEVELS[level], int(number)): (name, treatment) for level, number, name, treatment in found}


def key_of(line: str) -> Key:
    match = re.match(r"[a-z ]+ (\d+) (\d+) ", line)
    assert match, line
    return int(match[1]), int(match[2])


def differences(family: str) -> Iterator[str]:
    tcp, san = walk("options_walk", family, switched=False)[0], walk("options_walk", family, switched=True)[0]
    assert len(tcp) == len(san)
    for expected, got in zip(tcp, san, strict=True):
        on_connection = expected.startswith(("connected", "accepted"))
        refused = on_connection and table().get(key_of(expected), ("", ""))[1] == "REFUSED"
        if expected != got and not refused:
            yield f"{got}, by TCP {expected.partition(': ')[2]}"


@pytest.mark.parametrize("family", ["4", "6"])
def test_every_option_is_tcps(family: str) -> None:
    """T6, T12, S13, S22: results, errno and values of every option: on fresh, listening, connected, accepted sockets,
    set before connect, before listen and after it, with right, short, long and negative lengths, with wild pointers."""
    found = list(differences(family))
    assert not found, "\n".join([f"{len(found)} differences", *found[:40]])
    assert walk("options_walk", family, switched=False)[1] == 0
    assert walk("options_walk", family, switched=True)[1] > 1000


@pytest.mark.parametrize("family", ["4", "6"])
def test_refused_options_are_refused(family: str) -> None:
    """T6: what a companion cannot do says so when it is set, and reads as never set."""
    refused = {key for key, (_, treatment) in table().items() if treatment == "REFUSED"}
    assert refused == {(1, 60), (6, 19), (6, 31)}
    lines = [
        line
        for line in walk("options_walk", family, switched=True)[0]
        if line.startswith("connected") and key_of(line) in refused
    ]
    errors = {
        key: {line.partition(": ")[2] for line in lines if key_of(line) == key and " set " in line} for key in refused
    }
    assert errors[1, 60] == {"EOPNOTSUPP", "EINVAL", "EFAULT", "ok"}  # switching it off is no harm
    assert errors[6, 19] == {"EPERM", "EINVAL", "EFAULT"}
    assert errors[6, 31] == {"ENOENT", "EINVAL", "EFAULT"}
    values = {line.partition(": ")[2] for line in lines if " get 64: " in line}
    assert values == {"ok 4:00000000", "ok 0:"}


@pytest.mark.parametrize("family", ["4", "6"])
def test_the_table_is_complete(family: str) -> None:
    """T6: every option that this kernel's TCP knows is in the table."""
    known = set()
    for line in walk("options_walk", family, switched=False)[0]:
        answer = line.partition(": ")[2]
        if " wild" not in line and not answer.startswith(("ENOPROTOOPT", "EINVAL", "EFAULT")):
            known.add(key_of(line))
        if line.startswith("fresh") and " set 4: EINVAL" in line:
            known.add(key_of(line))
    known = {key for key in known if key[0] in LEVELS.values()}
    if family == "4":
        known = {key for key in known if key[0] != 41}
    assert len(known) > 150
    missing = sorted(known - set(table()))
    assert not missing, f"not in options.def: {missing}"


def test_no_option_stands_twice() -> None:
    """T6: one treatment for each."""
    found = re.findall(r"^OPTION\((\w+), (\d+), ", TABLE.read_text(), re.MULTILINE)
    assert len(found) == len(set(found)) == len(table())
