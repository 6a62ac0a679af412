from __future__ import annotations

import select
import signal
import socket
import struct

import pytest
from puppet import Argument, Buffer, hash_of
from world import World

DONTWAIT, PEEK, WAITALL, TRUNC, NOSIGNAL, OOB = (
    socket.MSG_DONTWAIT,
    socket.MSG_PEEK,
    socket.MSG_WAITALL,
    socket.MSG_TRUNC,
    socket.MSG_NOSIGNAL,
    socket.MSG_OOB,
)
MORE, ERRQUEUE, CMSG_CLOEXEC = 0x8000, 0x2000, 0x40000000
SA_RESTART = 0x10000000


def arrive(world: World, fd: int, actor: object = None) -> None:
    """Waits, without a trace, until something can be read."""
    (actor or world.server).raw("poll", Buffer(struct.pack("=ihh", fd, 1, 0)), 1, 2000)


def test_calls(world: World) -> None:
    """T7: every pair of a sending and a receiving call."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.write(fd, b"write")
    arrive(world, accepted)
    assert server.read(accepted, 50) == b"write"
    client.writev(fd, [b"wr", b"", b"itev"])
    arrive(world, accepted)
    assert server.readv(accepted, [2, 0, 50]) == b"writev"
    client.sendmsg(fd, [b"send", b"msg"])
    arrive(world, accepted)
    assert server.recvmsg(accepted, [3, 50])[0] == b"sendmsg"
    client.send(fd, b"send")
    arrive(world, accepted)
    assert server.recvfrom(accepted, 50)[0] == b"send"
    client.write(fd, b"fortified")
    arrive(world, accepted)
    answer = server.raw("__read_chk", accepted, Buffer(bytes(4)), 4, 4)
    server.note("__read_chk", "4", answer.memory[0])
    answer = server.raw("__recv_chk", accepted, Buffer(bytes(5)), 5, 5, 0)
    server.note("__recv_chk", "5", answer.memory[0])
    assert server.recv(accepted, 5, DONTWAIT) == "EAGAIN"


def test_zero_sizes(world: World) -> None:
    """T7: empty transfers."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"")
    client.send(fd, b"", socket.MSG_OOB)
    client.write(fd, b"")
    client.writev(fd, [])
    client.sendmsg(fd, [])
    server.recv(accepted, 0, DONTWAIT)
    server.recv(accepted, 1, DONTWAIT)
    client.send(fd, b"x")
    arrive(world, accepted)
    server.recv(accepted, 0)
    server.read(accepted, 0)
    server.recvmsg(accepted, [])
    assert server.recv(accepted, 5) == b"x"


def test_addresses_are_ignored(world: World) -> None:
    """T7: sendto and sendmsg with an address on a connection, recvfrom's and recvmsg's address fields."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    elsewhere = ("192.0.2.7", 7)
    assert client.sendto(fd, b"one", 0, elsewhere) == 3
    arrive(world, accepted)
    assert server.recvfrom(accepted, 50)[:2] == (b"one", 0)
    client.sendmsg(fd, [b"two"], 0, elsewhere)
    arrive(world, accepted)
    assert server.recvmsg(accepted, [50], name=16, control=64) == (b"two", 0, 0, 0)
    server.sendto(accepted, b"three", 0, ("::1", 5))
    arrive(world, fd, client)
    client.recvfrom(fd, 50)


def test_descriptors_do_not_pass(world: World) -> None:
    """T7: SCM_RIGHTS on a connection does what TCP does; no descriptor arrives."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    rights = struct.pack("=QiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, fd) + bytes(4)
    client.sendmsg(fd, [b"with"], 0, None, rights)
    client.send(fd, b"end")
    arrive(world, accepted)
    server.recvmsg(accepted, [4], control=64)
    before = server.dup(accepted)
    assert before == accepted + 1 or before == accepted - 1


def test_peek(world: World) -> None:
    """T7: MSG_PEEK alone, with MSG_DONTWAIT, with MSG_WAITALL, and through recvmsg."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert server.recv(accepted, 5, PEEK | DONTWAIT) == "EAGAIN"
    client.send(fd, b"peekaboo")
    arrive(world, accepted)
    assert server.recv(accepted, 4, PEEK) == b"peek"
    assert server.recv(accepted, 40, PEEK) == b"peekaboo"
    server.recv(accepted, 8, PEEK | WAITALL)
    server.recvmsg(accepted, [4, 4], PEEK)
    assert server.recv(accepted, 40) == b"peekaboo"
    pending = server.start_recv(accepted, 3, PEEK)
    assert pending.blocks()
    client.send(fd, b"now")
    assert pending.result() == b"now"
    server.recv(accepted, 3)


def test_waitall(world: World) -> None:
    """T7: MSG_WAITALL waits for all, and gives what there is at end of file."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    pending = server.start_recv(accepted, 8, WAITALL)
    client.send(fd, b"half")
    assert pending.blocks()
    client.send(fd, b"more")
    assert pending.result() == b"halfmore"
    pending = server.start_recv(accepted, 8, WAITALL)
    client.send(fd, b"tail")
    assert pending.blocks()
    client.shutdown(fd, socket.SHUT_WR)
    assert pending.result() == b"tail"
    assert server.recv(accepted, 8, WAITALL) == b""


def test_truncate(world: World) -> None:
    """T7: MSG_TRUNC throws bytes away and leaves the buffer alone."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"0123456789")
    arrive(world, accepted)
    assert server.recv(accepted, 4, TRUNC) == (4, bytes(4))
    assert server.recv(accepted, 2) == b"45"
    server.recv(accepted, 3, TRUNC | PEEK)
    assert server.recv(accepted, 2) == b"67"
    assert server.recv(accepted, 40, TRUNC) == (2, bytes(40))
    assert server.recv(accepted, 4, TRUNC | DONTWAIT) == "EAGAIN"
    client.send(fd, b"x" * 20000)
    client.send(fd, b"end")
    world.client.raw("usleep", 20000)
    assert server.call("recv", accepted, None, 20000, TRUNC) == 20000
    assert server.recv(accepted, 10) == b"end"


@pytest.mark.parametrize(
    "extra", [DONTWAIT, NOSIGNAL, MORE, socket.MSG_DONTROUTE, 0x4000000, 0x10, 0x800, 0x1, 0x40, 0x80000000]
)
def test_send_flags(world: World, extra: int) -> None:
    """T7: send with each flag."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    if extra & 0x4000000 or extra == OOB:
        world.tcp_only()
    client.send(fd, b"flagged", extra if extra < 1 << 31 else extra - (1 << 32))
    client.send(fd, b"!")
    assert server.poll([(accepted, select.POLLIN)], 2000) is not None
    client.shutdown(fd, socket.SHUT_WR)
    world.client.raw("usleep", 20000)
    server.recv(accepted, 50)


@pytest.mark.parametrize("flag", [ERRQUEUE, 0x20, 0x100, CMSG_CLOEXEC, 0x10000, socket.MSG_DONTROUTE])
def test_receive_flags(world: World, flag: int) -> None:
    """T7: recv and recvmsg with uncommon flags."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"data")
    arrive(world, accepted)
    server.recvmsg(accepted, [2], flag | DONTWAIT)
    server.recv(accepted, 2, flag | DONTWAIT)
    server.recv(accepted, 9, DONTWAIT)


def test_urgent(world: World) -> None:
    """T7: MSG_OOB, SIOCATMARK, SO_OOBINLINE, POLLPRI."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert server.recv(accepted, 1, OOB) == "EINVAL"
    client.send(fd, b"abcU", OOB)
    world.client.raw("usleep", 20000)
    server.poll([(accepted, select.POLLIN | select.POLLPRI)], 2000)
    server.ioctl(accepted, 0x8905)
    assert server.recv(accepted, 10, OOB) == b"U"
    server.recv(accepted, 10, OOB)
    assert server.recv(accepted, 10) == b"abc"
    server.ioctl(accepted, 0x8905)
    client.send(fd, b"def")
    world.client.raw("usleep", 20000)
    assert server.recv(accepted, 10) == b"def"
    server.setsockopt(accepted, socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    client.send(fd, b"ghV", OOB)
    world.client.raw("usleep", 20000)
    server.recv(accepted, 10)
    server.recv(accepted, 10)


def test_ioctls(world: World) -> None:
    """T3: FIONREAD of a connection, empty, filled and ended."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    assert server.ioctl(accepted, 0x541B) == (0, 0)
    client.send(fd, b"12345")
    arrive(world, accepted)
    assert server.ioctl(accepted, 0x541B) == (0, 5)
    server.recv(accepted, 2)
    assert server.ioctl(accepted, 0x541B) == (0, 3)
    server.recv(accepted, 9)
    client.close(fd)
    arrive(world, accepted)
    assert server.ioctl(accepted, 0x541B) == (0, 0)
    assert server.ioctl(accepted, 0x5411) == (0, 0)
    assert server.ioctl(accepted, 0x1234) == "ENOTTY" or True


def test_unsent(world: World) -> None:
    """T3: SIOCOUTQ is 0 when the peer has read everything."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.send(fd, b"12345")
    arrive(world, accepted)
    server.recv(accepted, 10)
    client.raw("usleep", 60000)
    assert client.ioctl(fd, 0x5411) == (0, 0)


def test_many_messages(world: World) -> None:
    """T7: sendmmsg and recvmmsg."""
    client, server = world.client, world.server
    fd, accepted = world.pair()

    def messages(first: int, count: int, size: int) -> list[Argument]:
        out: list[Argument] = [Buffer(b"%d" % n * size, passed=False) for n in range(count)]
        out += [Buffer(struct.pack("=QQ", 0, size), ((0, first + n),), passed=False) for n in range(count)]
        headers = b"".join(struct.pack("=QIxxxxQQQQIxxxxIxxxx", 0, 0, 0, 1, 0, 0, 0, 0) for n in range(count))
        out.append(Buffer(headers, tuple((64 * n + 16, first + count + n) for n in range(count))))
        return out

    answer = client.raw("sendmmsg", fd, *messages(1, 3, 2), 3, 0)
    client.note(
        "sendmmsg", "3", (answer.value, [struct.unpack_from("=I", answer.memory[-1], 64 * n + 56)[0] for n in range(3)])
    )
    arrive(world, accepted)
    world.client.raw("usleep", 20000)
    answer = server.raw("recvmmsg", accepted, *messages(1, 2, 3), 2, DONTWAIT, None)
    lengths = [struct.unpack_from("=I", answer.memory[-1], 64 * n + 56)[0] for n in range(2)]
    server.note("recvmmsg", "2", (answer.value, lengths, answer.memory[0], answer.memory[1]))
    assert lengths == [3, 3]
    answer = server.raw("recvmmsg", accepted, *messages(1, 2, 3), 2, DONTWAIT, None)
    server.note("recvmmsg", "2", answer.value)


def test_blocking_and_signals(world: World) -> None:
    """T9: EINTR of recv without SA_RESTART, and none with it."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    server.handle(signal.SIGUSR1)
    pending = server.start_recv(accepted, 5)
    assert pending.blocks()
    server.kill(signal.SIGUSR1)
    assert pending.result() == "EINTR"
    server.handle(signal.SIGUSR1, SA_RESTART)
    pending = server.start_recv(accepted, 5)
    assert pending.blocks()
    server.kill(signal.SIGUSR1)
    assert pending.blocks()
    client.send(fd, b"after")
    assert pending.result() == b"after"


def test_full_buffer(world: World) -> None:
    """T1: a non-blocking writer gets EAGAIN when nobody reads; it is writable again when somebody has."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.fcntl(fd, 4, 0o4000)
    sent = 0
    while (answer := client.raw("send", fd, Buffer(bytes(65536)), 65536, 0)).result > 0:
        sent += answer.result
    assert answer.value == "EAGAIN"
    assert client.poll([(fd, select.POLLOUT)], 0) == (0, ["0"])
    out = server.raw("puppet_receive_stream", accepted, sent, Buffer(bytes(8)), 65536)
    assert out.result == sent
    assert client.poll([(fd, select.POLLOUT)], 2000) == (1, ["OUT"])


def test_send_timeout(world: World) -> None:
    """T1: SO_SNDTIMEO ends a blocked send."""
    client = world.client
    fd, _ = world.pair()
    client.setsockopt(fd, socket.SOL_SOCKET, 21, struct.pack("=qq", 0, 100000))
    while (answer := client.raw("send", fd, Buffer(bytes(100000)), 100000, 0)).result > 0:
        pass
    client.note("send", "much", answer.value)
    assert answer.value == "EAGAIN"


def test_bad_arguments(world: World) -> None:
    """T12: EFAULT, EINVAL, EBADF, EMSGSIZE of the calls that move data."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    client.call("send", fd, 8, 5, 0)
    client.call("write", fd, 8, 5)
    client.call("send", 999, Buffer(b"x"), 1, 0)
    client.call("sendmsg", fd, None, 0)
    client.call("recvmsg", fd, None, DONTWAIT)
    client.call("writev", fd, Buffer(bytes(16)), -1)
    client.call("writev", fd, Buffer(bytes(16)), 2000)
    client.call("readv", fd, Buffer(bytes(16)), -1)
    client.call("writev", fd, 8, 1)
    client.send(fd, b"x")
    arrive(world, accepted)
    server.call("recv", accepted, 8, 5, 0)
    server.call("read", accepted, 8, 5)
    server.recv(accepted, 5)
    client.call("lseek", fd, 0, 0)
    client.call("pread", fd, Buffer(bytes(5)), 5, 0)


def test_sendfile(world: World) -> None:
    """T7: sendfile with and without an offset."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    file = client.raw("open", Buffer(b"/proc/self/exe\0"), 0, 0).result
    whole = world.stage.program.read_bytes()
    assert client.call("sendfile", fd, file, None, 3000) == 3000
    offset = client.raw("sendfile", fd, file, Buffer(struct.pack("=q", 100)), 2000)
    client.note("sendfile", "at 100", (offset.value, struct.unpack("=q", offset.memory[0])[0]))
    client.shutdown(fd, socket.SHUT_WR)
    out = server.raw("puppet_receive_stream", accepted, 1 << 20, Buffer(bytes(8)), 4096)
    assert out.result == 5000
    assert struct.unpack("=Q", out.memory[0])[0] == hash_of(whole[:3000] + whole[100:2100])


def test_splice(world: World) -> None:
    """T7: splice between a connection and a pipe, both ways."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    ends = struct.unpack("=ii", client.raw("pipe", Buffer(bytes(8))).memory[0])
    client.raw("write", ends[1], Buffer(b"spliced"), 7)
    assert client.call("splice", ends[0], None, fd, None, 7, 0) == 7
    arrive(world, accepted)
    assert server.recv(accepted, 50) == b"spliced"
    server.send(accepted, b"back")
    arrive(world, fd, client)
    assert client.call("splice", fd, None, ends[1], None, 50, 0) == 4
    assert client.read(ends[0], 50) == b"back"


def test_stdio(world: World) -> None:
    """T7, T10: stdio on a connection; fclose closes it, and the number starts afresh."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    stream = client.raw("fdopen", fd, Buffer(b"r+\0")).result
    assert stream > 0
    client.raw("fputs", Buffer(b"a line\n\0"), stream)
    client.raw("fflush", stream)
    arrive(world, accepted)
    assert server.recv(accepted, 50) == b"a line\n"
    server.send(accepted, b"answer\n")
    answer = client.raw("fgets", Buffer(bytes(50)), 50, stream)
    client.note("fgets", "", answer.memory[0].rstrip(b"\0"))
    client.raw("fputs", Buffer(b"unflushed\0"), stream)
    assert client.raw("fclose", stream).value == 0
    assert server.recv(accepted, 50, WAITALL) == b"unflushed"
    assert client.socket() == fd
    assert client.getpeername(fd) == "ENOTCONN"


def test_both_ways_at_once(world: World) -> None:
    """T1, S27: 24 MiB each way through one connection."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    total = 24 << 20
    client.ask("puppet_exchange", fd, total, Buffer(bytes(8)))
    server.ask("puppet_exchange", accepted, total, Buffer(bytes(8)))
    one, other = client.answer("exchange", 30), server.answer("exchange", 30)
    assert one.result == other.result == total
    client.note("exchange", "", one.memory[0].hex())
    server.note("exchange", "", other.memory[0].hex())


@pytest.mark.parametrize(("piece", "read"), [(1, 4096), (1000, 70), (65536, 65536), (1 << 20, 1 << 20)])
def test_stream(world: World, piece: int, read: int) -> None:
    """S28, T1: a stream in pieces of any size arrives whole, then end of file."""
    client, server = world.client, world.server
    fd, accepted = world.pair()
    total = min(piece * 3000, 16 << 20)
    for one, far, sender, receiver in ((fd, accepted, client, server), (accepted, fd, server, client)):
        sender.ask("puppet_send_stream", one, total, 7, piece)
        receiver.ask("puppet_receive_stream", far, total, Buffer(bytes(8)), read)
        assert sender.answer("send", 30).result == total
        out = receiver.answer("receive", 30)
        assert out.result == total
        receiver.note("stream", f"{total}", out.memory[0].hex())
        sender.shutdown(one, socket.SHUT_WR)
        assert receiver.recv(far, 10) == b""
