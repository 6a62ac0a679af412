"""One application for WSGI and ASGI servers. /pid tells which process answers; other paths are files of the current
directory, sent in pieces. Headers tell more: X-Peer the client's address as the server sees it, X-Worker its own
process."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 16
Headers = list[tuple[str, str]]


def answer(path: str) -> tuple[int, int, Iterator[bytes]]:
    """Status, length and pieces of the body."""
    if path == "/pid":
        body = b"%d\n" % os.getpid()
    else:
        file = Path(path.lstrip("/"))
        if not file.is_file():
            return 404, 0, iter(())
        body = file.read_bytes()
    return 200, len(body), (body[place : place + PIECE] for place in range(0, len(body), PIECE))


def wsgi(environ: dict[str, Any], start_response: Callable[[str, Headers], Any]) -> Iterable[bytes]:
    status, length, pieces = answer(environ["PATH_INFO"])
    peer = f"{environ['REMOTE_ADDR']}:{environ['REMOTE_PORT']}"
    headers = [("Content-Length", str(length)), ("X-Peer", peer), ("X-Worker", str(os.getpid()))]
    start_response(f"{status} answer", headers)
    return pieces


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    assert scope["type"] == "http"
    status, length, pieces = answer(scope["path"])
    peer = "{}:{}".format(*scope["client"])
    headers = [(b"content-length", str(length).encode()), (b"x-peer", peer.encode())]
    headers.append((b"x-worker", b"%d" % os.getpid()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
