"""The permitted differences D1 to D7 of a companion from TCP: this list, and no other. Each is a predicate over what
TCP showed, what the companion showed, and what went before. D5 (timing, sizes of partial transfers, SIOCOUTQ, counters
in TCP_INFO) and D7 (a program without the switch sees AF_UNIX) concern values that no scenario compares.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence

from puppet import Entry

History = Sequence[Entry]
SENDING = {"send", "write", "sendto", "sendmsg", "writev", "sendfile"}
DUPLICATING = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC)
Predicate = Callable[[Entry, Entry, History], bool]


def _without(events: list[tuple[int, str]], word: str) -> list[tuple[int, str]]:
    return [(data, "|".join(part for part in names.split("|") if part != word)) for data, names in events]


def _registered(actor: str, epfd: str, data: int, before: History) -> list[str]:
    """What was asked for at last, under any number of the epoll."""
    made = 0
    epolls: dict[tuple[str, str], int] = {}
    asked: dict[int, str] = {}

    def epoll(actor: str, number: str) -> int:
        """Where the actor did not make it, it came by a fork that the history may not show."""
        others = (each for (_, other), each in reversed(epolls.items()) if other == number)
        return epolls.get((actor, number)) or next(others, 0)

    for entry in before:
        given = entry.given.split(", ")
        if entry.call in ("dup", "dup2", "dup3") or (entry.call == "fcntl" and int(given[1]) in DUPLICATING):
            epolls[entry.actor, entry.seen] = epoll(entry.actor, given[0])
        elif entry.call == "epoll_create1":
            epolls[entry.actor, entry.seen] = made = made + 1
        elif entry.call == "epoll_ctl" and entry.seen == "0" and given[4] == str(data):
            asked[epoll(entry.actor, given[0])] = given[3]
    return asked.get(epoll(actor, epfd), "").split("|")


def _same_events(tcp: Entry, san: Entry, before: History, edges: bool) -> bool:
    """But for hang-ups, and for more edges where those are permitted."""
    if san.call != "epoll_wait" or not isinstance(tcp.fact, list) or not isinstance(san.fact, list):
        return False
    epfd, shown = san.given.split(", ")[0], list(tcp.fact)
    for event in san.fact:
        asked, bare = _registered(san.actor, epfd, event[0], before), _without([event], "HUP")[0]
        permitted = event != bare and ("IN" in event[1].split("|") or "IN" not in asked)
        if shown and (event == shown[0] or (permitted and bare == shown[0])):
            shown.pop(0)
        elif not (permitted and not bare[1]) and not (edges and {"ET", "OUT"} <= set(asked)):
            return False
    return not shown


def _d1(tcp: Entry, san: Entry, before: History) -> bool:
    """epoll adds HUP beside IN|RDHUP, or beside what was asked for where neither was."""
    return _same_events(tcp, san, before, edges=False)


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
    """Where an edge-triggered OUT was asked for, an event more than TCP shows."""
    return _same_events(tcp, san, before, edges=True)


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
