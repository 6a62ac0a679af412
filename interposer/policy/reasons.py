"""Why a connection or a listener stayed on TCP: native/reasons.def, the one list, as Python constants.

`reasons.POLICY_TCP` is a number; BY_NUMBER and BY_SYMBOL give the whole reason. Imported inside other people's
processes, so the list is read with string methods.
"""

from __future__ import annotations


class Reason:
    """A stable number and symbol, a sentence that says why, and a hint that says what to do."""

    __slots__ = ("hint", "number", "sentence", "symbol")

    def __init__(self, number: int, symbol: str, sentence: str, hint: str) -> None:
        self.number = number
        self.symbol = symbol
        self.sentence = sentence
        self.hint = hint


def parse(text: str) -> list[Reason]:
    """The REASON(number, symbol, "sentence", "hint") lines of a text."""
    found = []
    for line in text.split("\n"):
        if not line.startswith("REASON("):
            continue
        number, symbol, rest = line[7:].split(",", 2)
        # A quoted quote is the only escape in the list.
        _, sentence, _, hint, _ = rest.replace('\\"', "\0").split('"')
        found.append(Reason(int(number), symbol.strip(), sentence.replace("\0", '"'), hint.replace("\0", '"')))
    return found


def _read() -> list[Reason]:
    path = __file__[: __file__.rindex("/policy/")] + "/native/reasons.def"
    with open(path, encoding="utf-8") as source:
        return parse(source.read())


BY_NUMBER = {reason.number: reason for reason in _read()}
BY_SYMBOL = {reason.symbol: reason for reason in BY_NUMBER.values()}


def __getattr__(name: str) -> int:
    try:
        return BY_SYMBOL[name].number
    except KeyError:
        raise AttributeError(f"no reason is called {name}") from None
