"""A server and a client on asyncio streams. The client sends bytes, half-closes, and gets their hash and the bytes
themselves back; it starts each half when told by a line on its stdin, so that a test can look at the connection.

usage: asyncio_peer.py serve PORT | asyncio_peer.py fetch PORT SIZE
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys

HOST = "127.0.0.1"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read()
    writer.write(hashlib.sha256(data).digest() + data)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def serve(port: int) -> None:
    server = await asyncio.start_server(answer, HOST, port)
    await server.serve_forever()


async def told() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def fetch(port: int, size: int) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    data = os.urandom(size)
    writer.write(data)
    await told()
    await writer.drain()
    writer.write_eof()
    body = await reader.read()
    assert writer.get_extra_info("peername") == (HOST, port)
    assert body == hashlib.sha256(data).digest() + data
    print("same", len(body))
    writer.close()
    await writer.wait_closed()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2])))
    else:
        asyncio.run(fetch(int(sys.argv[2]), int(sys.argv[3])))
