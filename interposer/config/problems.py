"""What can be wrong with a policy, and the exception that carries all of it.

Plain classes: locate.py needs them on the launcher's fast path, where the table is cached and nothing else is imported.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Problem:
    """One error or warning: where it is, what is wrong and what was expected, and what to do about it.

    `line` is 0 where the problem concerns a file as a whole, and `file` is "" where it concerns none.
    """

    __slots__ = ("file", "hint", "line", "message")

    def __init__(self, file: str, line: int, message: str, hint: str = "") -> None:
        self.file = file
        self.line = line
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{place}{self.message}" + (f"; {self.hint}" if self.hint else "")

    def __repr__(self) -> str:
        return f"Problem({str(self)!r})"


class PolicyError(Exception):
    """The policy cannot be used; `problems` lists every reason, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)
