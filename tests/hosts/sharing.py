"""What the programs of tests/behaviour/test_sharing_listeners.py share; as a program: a worker that serves the listener
of a given number, on which it listens itself if given a backlog. Every connection is answered with the process id,
the way to wait, and both addresses."""

import os
import select
import socket
import sys

PYTHON = "/usr/bin/python3"
_made = {}


def wait(listener, way):
    """Until somebody comes; "accept" leaves that to accept()."""
    fd = listener.fileno()
    if way == "poll":
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
    elif way == "select":
        select.select([fd], [], [])
    elif way in ("epoll", "exclusive"):
        if way not in _made:
            _made[way] = select.epoll()
            _made[way].register(fd, select.EPOLLIN | (select.EPOLLEXCLUSIVE if way == "exclusive" else 0))
        _made[way].poll()


def serve(listener, way="accept"):
    while True:
        wait(listener, way)
        try:
            end, peer = listener.accept()
        except BlockingIOError:
            continue
        own = end.getsockname()
        end.sendall(f"{os.getpid()} {way} {peer[0]}:{peer[1]} {own[0]}:{own[1]}".encode())
        end.close()


def listen(port, backlog=16):
    """An inheritable listener; bound only, with a backlog of 0."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    if backlog:
        listener.listen(backlog)
    listener.set_inheritable(True)
    return listener


def worker(fd, way):
    return [PYTHON, __file__, str(fd), way]


def plain():
    """The environment without a trace of the switch."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and "INTERPOSER" not in name}


def ready():
    os.write(1, b"ready\n")


if __name__ == "__main__":
    inherited = socket.socket(fileno=int(sys.argv[1]))
    if len(sys.argv) > 3:
        inherited.listen(int(sys.argv[3]))
    ready()
    serve(inherited, sys.argv[2])
