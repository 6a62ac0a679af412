"""awkward_python.py PORT WAY...: connects in each WAY that a Python program may use, and prints what carried it: U or
T, by the kernel's list of AF_UNIX sockets, and by the word of the server at PORT. For any CPython from 2.7 on."""
# ruff: noqa: UP010, UP031, UP036  (for Python 2)

from __future__ import print_function

import os
import select
import socket
import subprocess
import sys
import threading

PATIENCE = 20
LOOPBACK = "127.0.0.1"


def carrier(fd):
    inode = os.readlink("/proc/self/fd/%d" % fd)[len("socket:[") : -1]
    with open("/proc/self/net/unix", "rb") as sockets:
        return "U" if any(line.split()[6:7] == [inode.encode()] for line in sockets) else "T"


def letter_from(connection):
    connection.settimeout(PATIENCE)
    letter = connection.recv(1).decode()
    return letter if letter == carrier(connection.fileno()) else "X"


def talk(port):
    connection = socket.create_connection((LOOPBACK, port), PATIENCE)
    try:
        return letter_from(connection)
    finally:
        connection.close()


def plain(port):
    return talk(port)


def non_blocking(port):
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex((LOOPBACK, port))
    writable = select.select([], [connection], [], PATIENCE)[1]
    assert writable and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    readable = select.select([connection], [], [], PATIENCE)[0]
    assert readable
    assert connection.getpeername() == (LOOPBACK, port)
    letter = letter_from(connection)
    connection.close()
    return letter


def threads(port):
    letters = []
    running = [threading.Thread(target=lambda: letters.append(talk(port))) for _ in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(PATIENCE)
    return "".join(letters)


def http(port):
    """A server and a client in one process; the server answers with the letter of its own end."""
    try:
        from http.server import BaseHTTPRequestHandler, HTTPServer
        from urllib.request import urlopen
    except ImportError:
        from BaseHTTPServer import BaseHTTPRequestHandler, HTTPServer
        from urllib2 import urlopen

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(carrier(self.connection.fileno()).encode() * 100000)

        def log_message(self, *ignored):
            pass

    server = HTTPServer((LOOPBACK, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        answer = urlopen("http://%s:%d/" % server.server_address, timeout=PATIENCE).read().decode()
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()
    return answer[:1] if answer == answer[:1] * 100000 else "X"


def coroutines(port):
    import awkward_coroutines

    return awkward_coroutines.letters(port, carrier)


def fork(port):
    """A child made by fork alone, and its child."""
    ends = os.pipe()
    for _ in range(2):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            break
        os.write(ends[1], talk(port).encode())
    else:
        os._exit(0)
    if os.getpid() != MAIN:
        os._exit(0)
    os.close(ends[1])
    letters = os.read(ends[0], 10).decode()
    os.close(ends[0])
    return letters


def _processes(port, method):
    import multiprocessing

    context = multiprocessing.get_context(method) if method else multiprocessing
    pool = context.Pool(2)
    try:
        return "".join(pool.map_async(talk, [port] * 4).get(PATIENCE))
    finally:
        pool.close()
        pool.join()


def processes_by_fork(port):
    return _processes(port, "fork" if sys.version_info[0] > 2 else None)


def processes_by_spawn(port):
    return _processes(port, "spawn")


def pass_descriptors(port):
    """Another program gets a connection by its number, and makes one of its own."""
    connection = socket.create_connection((LOOPBACK, port), PATIENCE)
    number = connection.fileno()
    words = [sys.executable, __file__, str(port), "inherited:%d" % number, "plain"]
    if sys.version_info[0] > 2:
        child = subprocess.Popen(words, pass_fds=[number], stdout=subprocess.PIPE)
    else:
        child = subprocess.Popen(words, close_fds=False, stdout=subprocess.PIPE)
    connection.close()
    said = child.communicate()[0].decode().split()
    return "".join(said[1::2]) if child.returncode == 0 else "status %d" % child.returncode


def standard_input(port):
    """A connection as the standard input of another program, which has no library of sockets."""
    connection = socket.create_connection((LOOPBACK, port), PATIENCE)
    connection.setblocking(True)
    letter = subprocess.check_output(["head", "-c", "1"], stdin=connection.fileno()).decode()
    connection.close()
    return letter


WAYS = {
    "plain": plain,
    "non-blocking": non_blocking,
    "threads": threads,
    "http": http,
    "asyncio": coroutines,
    "fork": fork,
    "multiprocessing-fork": processes_by_fork,
    "multiprocessing-spawn": processes_by_spawn,
    "pass-fds": pass_descriptors,
    "stdin": standard_input,
}
MAIN = os.getpid()


def main():
    port = int(sys.argv[1])
    for way in sys.argv[2:]:
        if way.startswith("inherited:"):
            connection = socket.fromfd(int(way.partition(":")[2]), socket.AF_INET, socket.SOCK_STREAM)
            print("inherited", letter_from(connection))
        else:
            print(way, WAYS[way](port))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
