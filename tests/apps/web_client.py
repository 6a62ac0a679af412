"""Fetches URL COUNT times by http.client, which keeps its connection where the server does. The first answer is read
when a line comes on stdin, so that a test can look at the connection. Prints its worker, and JSON: how many connections
were made, and the SHA-256 of each body. The server must see each connection under its own address.

usage: web_client.py URL COUNT
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import urllib.parse


def main(url: str, count: int) -> None:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    own = set()
    hashes = []
    for number in range(count):
        connection.request("GET", parts.path)
        address = "{}:{}".format(*connection.sock.getsockname())
        own.add(address)
        with connection.getresponse() as response:
            assert response.status == 200, response.status
            assert response.headers["X-Peer"] == address, (response.headers["X-Peer"], address)
            if number == 0:
                print("connected", response.headers["X-Worker"], flush=True)
                sys.stdin.readline()
            hashes.append(hashlib.sha256(response.read()).hexdigest())
    connection.close()
    print(json.dumps({"connections": len(own), "hashes": hashes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
