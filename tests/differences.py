"""The permitted differences D1 to D7 of a companion from TCP: this list, and no other. Each is a predicate over what
TCP showed, what the companion showed, and what went before. D5 (timing, sizes of partial transfers, SIOCOUTQ, counters
in TCP_INFO) and D7 (a program without the switch sees AF_UNIX) concern values that no scenario compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from puppet import Entry

History = Sequence[Entry]
SENDING = {"send", "write", "sendto", "sendmsg", "writev", "sendfile"}
Predicate = Callable[[Entry, Entry, History], bool]

def _without(events: list[tuple[int, str]], word: str) -> list[tuple[int, str]]:
    return [(data, "|".join(part for part in names.split("|") if part != word)) for data, names in events]


def _d1(tcp: Entry, san: Entry, before: History) -> bool:
    """epoll adds HUP beside IN|RDHUP, or beside what was asked for where neither was."""
    if san.call != "epoll_wait" or not isinstance(tcp.fact, list) or not isinstance(san.fact, list):
        return False
    hung = [(data, names.split("|")) for data, names in san.fact if "HUP" in names.split("|")]
    return [event for event in _without(san.fact, "HUP") if event[1]] == tcp.fact and all(
        "IN" in names or not _asked_for_input(data, before) for data, names in hung
    )


def _asked_for_input(data: int, before: History) -> bool:
    asked = [entry.given.split(", ")[-2:] for entry in before if entry.call == "epoll_ctl" and "DEL" not in entry.given]
    return any("IN" in events.split("|") for events, number in asked if number == str(data))


def _d2(tcp: Entry, san: Entry, before: History) -> bool:
    """One write earlier than TCP, EPIPE where TCP buffered, and the signal: where the kernel writes itself, and where
    the program began after the connection."""
    began = any(entry.call == "exec" for entry in before if entry.actor == san.actor)
    early = san.call == "sendfile" or (began and san.call in SENDING)
    return early and isinstance(tcp.fact, int) and san.fact == "EPIPE"


def _d3(tcp: Entry, san: Entry, before: History) -> bool:
    """End of file instead of ECONNRESET after a linger-0 close."""
    lingered = any(entry.call == "setsockopt" and entry.given.endswith("0100000000000000") for entry in before)
    return lingered and san.call in ("recv", "read") and tcp.fact == "ECONNRESET" and san.fact == b""


def _d4(tcp: Entry, san: Entry, before: History) -> bool:
    """An edge-triggered OUT more than TCP shows."""
    if san.call != "epoll_wait" or not isinstance(tcp.fact, list) or not isinstance(san.fact, list):
        return False
    edged = {entry.given.split(", ")[-1] for entry in before if entry.call == "epoll_ctl" and "ET" in entry.given}
    extra = [event for event in san.fact if event not in tcp.fact]
    return (
        bool(extra)
        and all(str(data) in edged and "OUT" in names for data, names in extra)
        and _without([event for event in san.fact if event in extra], "OUT")
        == [event for event in tcp.fact if event not in san.fact]
        + [(data, "") for data, names in extra if names == "OUT"]
    )


def _d6(tcp: Entry, san: Entry, before: History) -> bool:
    """TCP_DEFER_ACCEPT is recorded only."""
    return san.call == "getsockopt" and ", 6, 9, " in san.given


PERMITTED: dict[str, Predicate] = {"D1": _d1, "D2": _d2, "D3": _d3, "D4": _d4, "D6": _d6}


def judge(expected: Entry, got: Entry, before: History, companions: bool) -> tuple[str, list[str]]:
    """What is wrong with one observation, or "", and the numbers of the permitted differences that were met. Without
    companions there are none to permit."""
    if expected == got:
        return "", []
    if (expected.actor, expected.call, expected.given) != (got.actor, got.call, got.given):
        return f"TCP went {expected}, now {got}", []
    names = [name for name, holds in PERMITTED.items() if companions and holds(expected, got, before)]
    return ("" if names else f"{got}, by TCP {expected.seen}"), names


def compare(tcp: History, san: History, companions: bool) -> tuple[list[str], list[str]]:
    """The differences that are not permitted, one line each, and the numbers of the permitted ones that were met."""
    problems, used = [], []
    for index, (expected, got) in enumerate(zip(tcp, san, strict=False)):
        problem, names = judge(expected, got, san[:index], companions)
        used += names
        if problem:
            problems.append(f"{index}: {problem}")
        if problem.startswith("TCP went"):
            break
    if not problems and len(tcp) != len(san):
        problems.append(f"TCP made {len(tcp)} observations, now {len(san)}")
    return problems, used
