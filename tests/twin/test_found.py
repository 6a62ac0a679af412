"""Programs that the generator found to differ once, in the form in which it printed them."""

from __future__ import annotations

import pytest
from lockstep import parse, replay

FOUND = {
    "T2, T3: aliases of a listener in an epoll that has two descriptors": """
        server.socket(2, 1, 0)
        server.listen(3, 8)
        server.learn(3, 'p1')
        server.epoll_create()
        server.dup(3)
        server.dup(4)
        server.epoll_ctl(4, 1, 5, 1)
        server.epoll_ctl(6, 1, 3, 1)
    """,
    "T2, T4: a listener that is in an epoll already, by another process": """
        client.epoll_create()
        client.socket(2, 1, 0)
        client.bind(4, ('127.0.0.1', 0))
        client.listen(4, 8)
        client.learn(4, 'p1')
        client.fork('client1')
        client.epoll_ctl(3, 1, 4, 1)
        client1.epoll_ctl(3, 1, 4, 1)
    """,
    "T3, T4: O_NONBLOCK of a listener, set by a child": """
        client.socket(2, 1, 0)
        client.listen(3, 8)
        client.fork('client1')
        client1.fcntl(3, 4, 2048)
        client.fcntl(3, 3, 0)
    """,
    "T2, T4: poll() of a listener that a child has shut down": """
        client.socket(2, 1, 0)
        client.listen(3, 8)
        client.learn(3, 'p1')
        client.fork('client1')
        client1.shutdown(3, 0)
        client.poll([(3, 8197)], 0, 'poll')
        client.poll([(3, 0)], 0, 'poll')
    """,
    "T2, T4: select() on a listener that the program before exec shares with who has shut it down": """
        server.socket(2, 1, 0)
        server.bind(3, ('127.0.0.1', 0))
        server.listen(3, 8)
        server.learn(3, 'p1')
        server.fork('server1')
        server.exec()
        server1.shutdown(3, 0)
        server.select(4, [3], [3], [3])
        server.poll([(3, 8197)], 0, 'poll')
    """,
    "T2, T4: select() on a listener that a child shuts down after its exec": """
        server.socket(2, 1, 0)
        server.bind(3, ('127.0.0.1', 0))
        server.listen(3, 8)
        server.learn(3, 'p1')
        server.fork('server1')
        server1.exec()
        server1.shutdown(3, 0)
        server.select(4, [3], [3], [3])
        server.poll([(3, 8197)], 0, 'poll')
    """,
    "T12: shutdown() of a listener with a wrong word": """
        client.socket(2, 1, 0)
        client.listen(3, 8)
        client.shutdown(3, 7)
    """,
    "T12: shutdown() of a listener by two": """
        client.socket(2, 1, 0)
        client.listen(3, 8)
        client.fork('client1')
        client.shutdown(3, 0)
        client1.shutdown(3, 0)
    """,
    "T9: shutdown() after the listener with the connection in its queue has gone": """
        server.socket(2, 1, 0)
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.close(3)
        server.arrives(3, 0, 8192)
        server.getpeername(3)
        server.shutdown(3, 1)
    """,
    "T4: connect() again in the program that inherits the connection": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        client.socket(2, 1, 0)
        client.connect(4, ('127.0.0.1', 'p1'))
        client.queued(4, 'client', 3)
        client.accept(3)
        client.exec()
        client.connect(4, ('127.0.0.1', 'p1'))
    """,
    "T6: IPV6_V6ONLY of an accepted connection": """
        server.socket(10, 1, 0)
        server.bind(3, ('::', 0))
        server.listen(3, 8)
        server.learn(3, 'p1')
        client.socket(10, 1, 0)
        client.connect(3, ('::1', 'p1'))
        client.queued(3, 'server', 3)
        server.accept(3)
        server.getsockopt(4, 41, 26, 4)
    """,
    "T4, T9: recv() in a child after the parent's SHUT_RD": """
        server.socket(2, 1, 0)
        server.bind(3, ('127.0.0.1', 0))
        server.listen(3, 8)
        server.learn(3, 'p1')
        client.socket(2, 1, 0)
        client.connect(3, ('127.0.0.1', 'p1'))
        client.queued(3, 'server', 3)
        server.accept(3)
        client.fork('client1')
        client.shutdown(3, 0)
        client1.recv(3, 1, 0)
    """,
    "T12: close() of a descriptor that is known to an epoll that has gone": """
        server.socket(2, 1, 0)
        server.epoll_create()
        server.epoll_ctl(4, 1, 3, 1)
        server.close(4)
        server.dup(3)
        server.close(3)
    """,
    "T3, T12: EPOLL_CTL_MOD of a listener's alias where only another alias is registered": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        client.dup(3)
        client.epoll_create()
        client.epoll_ctl(5, 1, 3, 1)
        client.epoll_ctl(5, 3, 4, 1)
        client.epoll_ctl(5, 2, 4, 1)
    """,
    "S26, T4: a connection of an AF_INET6 socket to a mapped address, through exec": """
        server.socket(10, 1, 0)
        server.bind(3, ('::ffff:127.0.0.1', 0))
        server.listen(3, 8)
        server.learn(3, 'p2')
        client.socket(10, 2049, 0)
        client.connect(3, ('::ffff:127.0.0.1', 'p2'))
        client.arrives(3, 0, 4)
        client.queued(3, 'server', 3)
        server.accept(3, 0)
        server.taken(4, 'p2')
        client.exec()
        client.dup3(3, 4, 524288)
        client.send(3, fill(100, 0), 0)
        client.getpeername(4, 5)
        client.getpeername(3, 28)
        server.exec()
        server.getpeername(4, 28)
        server.getsockname(4, 28)
    """,
    "S26, T4: an IPv4 client of a listener for both families, through exec": """
        server.socket(10, 1, 0)
        server.bind(3, ('::', 0))
        server.listen(3, 8)
        server.learn(3, 'p2')
        client.socket(2, 1, 0)
        client.connect(3, ('127.0.0.1', 'p2'))
        client.arrives(3, 0, 4)
        client.queued(3, 'server', 3)
        server.accept(3, 0)
        server.taken(4, 'p2')
        client.exec()
        client.getpeername(3, 28)
        server.exec()
        server.getpeername(4, 28)
    """,
    "T4, T9: SHUT_WR, then exec, and the peer has closed": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.accept(3, 0)
        server.shutdown(3, 1)
        client.arrives(4, 0, 8192)
        client.close(4)
        server.arrives(3, 0, 8192)
        server.exec()
        server.send(3, fill(10, 0), 16384)
        server.getpeername(3, 16)
        server.shutdown(3, 1)
    """,
    "T2, T4, T9: hang-ups after SHUT_WR, then exec": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.accept(3, 0)
        server.shutdown(3, 1)
        client.arrives(4, 0, 8192)
        server.exec()
        server.send(3, fill(10, 0), 16384)
        server.poll([(3, 8197)], 0, 'poll')
        client.close(4)
        server.arrives(3, 0, 8192)
        server.poll([(3, 8197)], 0, 'poll')
    """,
    "T4, T9: recv() after SHUT_RD, then exec": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.accept(3, 0)
        server.shutdown(3, 0)
        server.exec()
        server.recv(3, 10, 0)
        server.poll([(3, 8197)], 0, 'poll')
    """,
    "T4, T9: SHUT_WR by a child, and the peer has closed": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.accept(3, 0)
        server.fork('server1')
        server1.shutdown(3, 1)
        client.arrives(4, 0, 8192)
        client.close(4)
        server.arrives(3, 0, 8192)
        server.send(3, fill(10, 0), 16384)
        server.getpeername(3, 16)
        server.poll([(3, 8197)], 0, 'poll')
    """,
    "T2, T4, T9: poll() for nothing but errors after SHUT_WR by a child, and the peer has closed": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.accept(3, 0)
        server.fork('server1')
        server1.shutdown(3, 1)
        client.arrives(4, 0, 8192)
        client.close(4)
        server.arrives(3, 0, 8192)
        server.poll([(3, 0)], 0, 'poll')
    """,
    "T9, S23: connect(AF_UNSPEC) ends a listener, and who waits there is reset": """
        client.socket(2, 1, 0)
        client.bind(3, ('127.0.0.1', 0))
        client.listen(3, 8)
        client.learn(3, 'p1')
        server.socket(2, 1, 0)
        server.connect(3, ('127.0.0.1', 'p1'))
        server.queued(3, 'client', 3)
        client.disconnect(3)
        server.arrives(3, 0, 8192)
        server.recv(3, 1, 0)
        client.poll([(3, 8197)], 0, 'poll')
        server.socket(2, 1, 0)
        server.connect(4, ('127.0.0.1', 'p1'))
        client.listen(3, 8)
    """,
    "T2, T4: an epoll that watches a listener, through exec": """
        client.epoll_create()
        client.socket(2, 1, 0)
        client.bind(4, ('127.0.0.1', 0))
        client.listen(4, 8)
        client.learn(4, 'p1')
        client.epoll_ctl(3, 1, 4, 1)
        client.exec()
        client.epoll_ctl(3, 1, 4, 1)
    """,
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    """S26, T2, T3, T4, T6, T9, T12: it sees the same in all four worlds now."""
    replay(parse(FOUND[name]))
