"""The environment of an interposed program.

Imports nothing beyond what a starting interpreter has loaded, because every `sanrun` runs it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE_PARENT = os.path.dirname(PACKAGE)
LIBRARY = f"{PACKAGE}/libinterposer.so"
REMEDY = "build it (tools/build) or install interposer again"
ENGINE = f"{PACKAGE}/libinterposer-engine.so"


class Unusable(Exception):
    """The library cannot be preloaded; the message says why and what to do."""


def library_head(path: str = LIBRARY) -> bytes:
    """The first bytes of the library, which name its architecture. Raises Unusable."""
    # The loader splits LD_PRELOAD at both and knows no escape.
    if " " in path or ":" in path:
        raise Unusable(
            f"the library's path {path!r} has a space or a colon in it, which LD_PRELOAD cannot hold; "
            "install interposer elsewhere"
        )
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Unusable(f"cannot open the library {path}: {error.strerror}; {REMEDY}") from None
    try:
        head = os.read(fd, 64)
    finally:
        os.close(fd)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        raise Unusable(f"{path} is not a library; {REMEDY}")
    return head


def prepend(preload: str, library: str) -> str:
    """LD_PRELOAD with `library` first and once; the other entries stay, in order."""
    name = os.path.basename(library)
    others = [entry for entry in preload.replace(":", " ").split() if os.path.basename(entry) != name]
    return ":".join([library, *others])


def additions(environ: Mapping[str, str], *, table: str, log: str, library: str = LIBRARY) -> dict[str, str]:
    """The variables to set for a program whose compiled table stands at `table`."""
    result = {"LD_PRELOAD": prepend(environ.get("LD_PRELOAD", ""), library), "INTERPOSER_TABLE": table}
    if log:
        result["INTERPOSER_LOG"] = log
    return result
