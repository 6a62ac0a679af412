"""The line of every key and table of a TOML text, which tomllib does not tell.

Works on text that tomllib has accepted, so it needs no error handling of its own. A path is a tuple of keys and of
indexes into arrays: ("process", 0, "rule", 1, "local").
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right

Path = tuple[str | int, ...]


def lines_of(text: str) -> dict[Path, int]:
    """Maps the path of each key, table and array element to its line, counted from 1."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.newlines = [i for i, character in enumerate(text) if character == "\n"]
        self.arrays: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while True:
            self.skip_blank()
            if self.at >= len(self.text):
                return self.lines
            start = self.at
            if self.text.startswith("[[", self.at):
                self.at += 2
                path = self.resolve(self.keys())
                self.at += 2
                count = self.arrays.get(path, 0)
                self.arrays[path] = count + 1
                table = (*path, count)
                self.note(table, start)
                self.lines.setdefault(path, self.line(start))
            elif self.text[self.at] == "[":
                self.at += 1
                table = self.resolve(self.keys())
                self.at += 1
                self.note(table, start)
            else:
                self.pair(table)

    def line(self, offset: int) -> int:
        return bisect_right(self.newlines, offset - 1) + 1

    def note(self, path: Path, offset: int) -> None:
        self.lines[path] = self.line(offset)

    def resolve(self, keys: list[str]) -> Path:
        """A header's path: a key that names an array of tables means its latest element."""
        path: Path = ()
        for position, key in enumerate(keys):
            path = (*path, key)
            if position < len(keys) - 1 and path in self.arrays:
                path = (*path, self.arrays[path] - 1)
        return path

    def skip_blank(self, newlines: bool = True) -> None:
        blank = " \t\n" if newlines else " \t"
        while self.at < len(self.text):
            if self.text[self.at] in blank:
                self.at += 1
            elif self.text[self.at] == "#" and newlines:
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def keys(self) -> list[str]:
        found = []
        while True:
            self.skip_blank(newlines=False)
            found.append(self.key())
            self.skip_blank(newlines=False)
            if self.text[self.at] != ".":
                return found
            self.at += 1

    def key(self) -> str:
        start = self.at
        if self.text[self.at] in "\"'":
            self.string()
            return str(tomllib.loads("k = " + self.text[start : self.at])["k"])
        while self.text[self.at].isalnum() or self.text[self.at] in "_-":
            self.at += 1
        return self.text[start : self.at]

    def pair(self, table: Path) -> None:
        start = self.at
        path = table
        for key in self.keys():
            path = (*path, key)
            self.lines.setdefault(path, self.line(start))
        self.at += 1
        self.skip_blank(newlines=False)
        self.value(path)

    def value(self, path: Path) -> None:
        character = self.text[self.at]
        if character in "\"'":
            self.string()
        elif character == "[":
            self.at += 1
            index = 0
            while self.more("]"):
                self.note((*path, index), self.at)
                self.value((*path, index))
                index += 1
        elif character == "{":
            self.at += 1
            while self.more("}"):
                self.pair(path)
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def more(self, closing: str) -> bool:
        """Whether another element follows; leaves the position at it, or after the closing bracket."""
        self.skip_blank()
        if self.text[self.at] == ",":
            self.at += 1
            self.skip_blank()
        if self.text[self.at] == closing:
            self.at += 1
            return False
        return True

    def string(self) -> None:
        quote = self.text[self.at]
        if self.text.startswith(quote * 3, self.at):
            self.at += 3
            while not self.text.startswith(quote * 3, self.at):
                self.at += 2 if self.text[self.at] == "\\" and quote == '"' else 1
            # Up to two quotes may stand right before the closing three.
            while self.text.startswith(quote * 4, self.at):
                self.at += 1
            self.at += 3
            return
        self.at += 1
        while self.text[self.at] != quote:
            self.at += 2 if self.text[self.at] == "\\" and quote == '"' else 1
        self.at += 1
