"""The environment of an interposed program.

Imports nothing beyond what a starting interpreter has loaded, because every `sanrun` runs it.
"""

from __future__ import annotations

import os

from interposer.launch import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE_PARENT = os.path.dirname(PACKAGE)
LIBRARY = f"{PACKAGE}/libinterposer.so"
REMEDY = "build it (tools/build) or install interposer again"
REQUIRE = "INTERPOSER_REQUIRE"
ENGINE = f"{PACKAGE}/libinterposer-engine.so"


class Unusable(Exception):
    """The library cannot be preloaded; the message says why and what to do."""


def library_head(path: str = LIBRARY) -> bytes:
    """The first bytes of the library, which name its architecture. Raises Unusable."""
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


def loadable(environ: Mapping[str, str], *, make: bool = True, library: str = LIBRARY) -> str:
    """A path of the library that LD_PRELOAD can hold: its own, or a link in the run-time directory, made if need be
    unless not `make`. Raises Unusable, and what the run-time directory raises."""
    if _fits(library):
        return library
    directory = runtime.directory(environ, make=make)
    place = f"{directory}/library-{runtime.digest(library)}"
    # Whatever comes to stand there is loaded into programs, so nobody else may be able to replace the directory.
    if not _fits(place) or runtime.replaceable(directory):
        raise Unusable(
            f"the library's path {library!r} has a space or a colon in it, which LD_PRELOAD cannot hold; install "
            "interposer elsewhere, or set XDG_RUNTIME_DIR to a directory of yours where a link to it can stand"
        )
    link = f"{place}/{os.path.basename(library)}"
    if make:
        runtime.link(link, library)
    return link


def _fits(path: str) -> bool:
    return " " not in path and ":" not in path  # the loader splits at both and knows no escape


def prepend(preload: str, library: str) -> str:
    """LD_PRELOAD with `library` first and once; the other entries stay, in order."""
    name = os.path.basename(library)
    others = [entry for entry in preload.replace(":", " ").split() if os.path.basename(entry) != name]
    return ":".join([library, *others])


def additions(
    environ: Mapping[str, str], *, table: str, log: str, library: str, require: bool = False
) -> dict[str, str]:
    """The variables to set for a program whose compiled table stands at `table`. `require` is said beside the
    table, so that it holds where the table cannot be read."""
    result = {"LD_PRELOAD": prepend(environ.get("LD_PRELOAD", ""), library), "INTERPOSER_TABLE": table}
    if log:
        result["INTERPOSER_LOG"] = log
    if require:
        result[REQUIRE] = "1"
    return result
