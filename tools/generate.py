"""The parts of README.md that come from declarations in the code: hooked functions, reason codes, socket options."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interposer.build import hook_names  # noqa: E402
from interposer.policy import reasons  # noqa: E402


def hooks() -> str:
    names = sorted(hook_names(), key=lambda name: name.lstrip("_"))
    return ", ".join(f"`{name}`" for name in names) + "."


def reason_table() -> str:
    rows = ["| | symbol | why the connection or listener is on TCP | what to do |", "|--:|---|---|---|"]
    for reason in reasons.BY_NUMBER.values():
        rows.append(f"| {reason.number} | `{reason.symbol}` | {reason.sentence} | {reason.hint} |")
    return "\n".join(rows)


TREATMENTS = {
    "COMPANION": "the companion's own: told and asked",
    "BUFFER": "told to the companion, answered as TCP does",
    "RECORD": "kept within TCP's bounds, and read back: only packets would show it",
    "SHADOW": "set on a hidden TCP socket, which answers",
    "JOINED": "the same, connected to itself, because the answer depends on being connected",
    "ANSWERED": "answered by the switch",
    "STAYS": "set before the connection: TCP (`OPTION`), for somebody relies on its packets; later: as above",
    "REFUSED": "set before the connection: TCP (`OPTION`); later: refused, as by a kernel without it",
}


def option_table() -> str:
    text = (ROOT / "interposer/native/options.def").read_text()
    found = re.findall(r"^OPTION\(\w+, \d+, (\w+), (\w+), ", text, re.MULTILINE)
    found += re.findall(r"^IOCTL\(\w+, (\w+), (\w+)\)", text, re.MULTILINE)
    rows = ["| on a SAN connection | options and ioctls |", "|---|---|"]
    for treatment, words in TREATMENTS.items():
        names = dict.fromkeys(name for name, how in found if how == treatment)
        listed = "all others that TCP takes" if treatment == "SHADOW" else ", ".join(names)
        rows.append(f"| {words} | {listed} |")
    return "\n".join(rows)


PARTS = {"hooks": hooks, "reasons": reason_table, "options": option_table}


def generate(text: str) -> str:
    """The text with every generated part made anew. Raises KeyError for a mark that names no part."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = generate(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md is out of date: run tools/generate", file=sys.stderr)
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
