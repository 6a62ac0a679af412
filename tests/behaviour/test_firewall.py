"""Packet filters, control groups and sandboxes that forbid connections, in a network name space of the test's own."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from puppet import Actor, Address, Buffer, switched_environment
from world import LOOPBACK, World, companion_name

from interposer.diag import stats

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make rules and users")
CLONE_NEWNET = 0x40000000
SECOND = 1.0
USER = 60001
USERS = {"root": 0, "user": USER}
IN_PROGRESS = os.O_NONBLOCK
libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20, stdout=subprocess.DEVNULL)


def nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=20)


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    """The test, and what it starts, in a network name space that has a loopback and no rules."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    assert libc.unshare(CLONE_NEWNET) == 0
    try:
        run("ip", "link", "set", "lo", "up")
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


def become(actor: Actor, user: int) -> None:
    if user:
        assert actor.raw("setresgid", user, user, user).value == 0
        assert actor.raw("setresuid", user, user, user).value == 0


def attempt(world: World, address: Address) -> tuple[int | str, bool]:
    """What a connect says that may not wait, and whether a companion carries it."""
    client = world.client
    fd = client.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM | IN_PROGRESS)
    said = client.connect(fd, address)
    carried = bool(companion_name(client, fd))
    client.close(fd)
    return said, carried


def becomes(world: World, address: Address, carried: bool) -> int | str:
    """S25's second: until then the new state shows, and stays. What connect() says then."""
    begin = time.monotonic()
    while attempt(world, address)[1] != carried:
        assert time.monotonic() - begin < SECOND + 0.5, "after a second a connection is still not as wanted"
        time.sleep(0.1)                # each takes a place in the backlog
    said, still = attempt(world, address)
    assert still == carried
    return said


def reasons(actor: Actor) -> dict[str, int]:
    return dict(stats.process(actor.pid).reasons)


TABLE = "add table {family} t; add chain {family} t c {{ type filter hook {hook} priority 0; }}\n"


def rule(what: str, family: str = "inet", hook: str = "output") -> str:
    return TABLE.format(family=family, hook=hook) + f"add rule {family} t c {what}\n"


@pytest.mark.parametrize("user", USERS)
def test_a_rule_comes_and_goes(san: World, user: str) -> None:
    """X9, O1: a rule means TCP from the next second on, and the SAN again a second after it has gone."""
    listener, address = san.listener(backlog=64)
    become(san.client, USERS[user])
    san.join(listener, address)
    nft(rule("counter" if user == "root" else "drop"))
    becomes(san, address, False)
    assert reasons(san.client)["FIREWALL"]
    nft("delete table inet t\n")
    becomes(san, address, True)


@pytest.mark.parametrize("hook", ["input", "output", "prerouting", "postrouting"])
def test_any_rule(san: World, hook: str) -> None:
    """X9, O1: for who may know the rules, any that sees the machine's own packets means TCP."""
    _, address = san.listener()
    nft(rule("counter", hook=hook))
    assert attempt(san, address) == ("EINPROGRESS", False)
    assert reasons(san.client) == {"FIREWALL": 1}


def test_policy_without_rules(san: World) -> None:
    """X9: a chain that drops what no rule accepts is a rule."""
    _, address = san.listener()
    nft("add table inet t; add chain inet t c { type filter hook output priority 0; policy drop; }\n")
    assert attempt(san, address) == ("EINPROGRESS", False)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    ("command", "host"),
    [
        ("iptables-legacy", LOOPBACK),
        ("ip6tables-legacy", "::1"),
        ("iptables-nft", LOOPBACK),
        ("ip6tables-nft", "::1"),
    ],
)
def test_iptables(san: World, command: str, host: str, user: str) -> None:
    """X9, O1: what iptables refuses to TCP is refused, to root and to a user who may not read the rules. An empty
    table refuses nothing."""
    _, address = san.listener(host=host, backlog=64)
    become(san.client, USERS[user])
    rule = ["-p", "tcp", "--dport", str(address[1]), "-j", "REJECT", "--reject-with", "tcp-reset"]
    run(command, "-A", "INPUT", *rule)
    assert attempt(san, address) == ("EINPROGRESS", False)
    fd = san.client.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    assert san.client.connect(fd, address) == "ECONNREFUSED"
    assert reasons(san.client) == {"FIREWALL": 2}
    run(command, "-D", "INPUT", *rule)
    becomes(san, address, True)


@pytest.mark.parametrize(
    "what",
    [
        "tcp dport {port} drop",
        "tcp dport {port} reject with tcp reset",
        "meta skuid {user} drop",
        "ip daddr 127.0.0.1 drop",
        "tcp flags syn drop",
        "ct state new drop",
    ],
)
def test_rules_that_a_user_is_not_told(san: World, what: str) -> None:
    """X9, O1: what stops a user's connection keeps it off the SAN, although he may not read the rules."""
    _, address = san.listener()
    become(san.client, USER)
    nft(rule(what.format(port=address[1], user=USER)))
    assert attempt(san, address) == ("EINPROGRESS", False)
    assert reasons(san.client) == {"FIREWALL": 1}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("rules", ["", TABLE.format(family="inet", hook="output"), rule("counter", hook="forward")])
def test_harmless(san: World, rules: str, user: str) -> None:
    """X9: without rules, with an empty chain, or with rules for what is forwarded, the SAN is used."""
    listener, address = san.listener()
    become(san.client, USERS[user])
    nft(rules)
    san.join(listener, address)


@pytest.mark.parametrize("user", USERS)
def test_other_family(san: World, user: str) -> None:
    """X9: a rule for IPv6 alone leaves IPv4 on the SAN."""
    listener, address = san.listener()
    become(san.client, USERS[user])
    nft(rule("drop", family="ip6"))
    san.join(listener, address)


@pytest.mark.parametrize("user", USERS)
def test_translation(san: World, user: str) -> None:
    """X9: address translation that leaves the loopback alone (a container host's) is harmless; one that leads elsewhere
    leads there."""
    listener, address = san.listener(backlog=64)
    other, elsewhere = san.listener(san.client, backlog=64)
    become(san.client, USERS[user])
    table = "add table ip n; add chain ip n c { type nat hook output priority -100; }\n"
    nft(table + "add rule ip n c meta l4proto tcp ip daddr != 127.0.0.0/8 fib daddr type local redirect to :1\n")
    san.join(listener, address)
    nft(f"add rule ip n c tcp dport {address[1]} redirect to :{elsewhere[1]}\n")
    becomes(san, address, False)
    fd = san.client.socket()
    assert san.client.connect(fd, address) == 0
    san.client.send(fd, b"elsewhere")
    seen = set()
    for _ in range(4):                 # those that were tried first have been closed
        accepted, _ = san.client.accept(other)
        seen.add(san.client.recv(accepted, 20))
        if b"elsewhere" in seen:
            break
    assert b"elsewhere" in seen


def test_nobody_sees_the_question(san: World) -> None:
    """X9, T14: a server accepts as many connections as a user's client makes, though its way was tried before."""
    listener, address = san.listener(kind=os.O_NONBLOCK, backlog=64)
    become(san.client, USER)
    for _ in range(3):
        assert attempt(san, address)[1]
        assert not isinstance(san.server.accept(listener), str)
    assert san.server.accept(listener) == "EAGAIN"
    shown = subprocess.run(["ss", "-Htan", "state", "syn-recv", "state", "syn-sent"], capture_output=True, check=True)
    assert not shown.stdout


@pytest.mark.parametrize("place", ["defaults", "process"])
@pytest.mark.parametrize("user", USERS)
def test_ignored(san: World, tmp_path: Path, user: str, place: str) -> None:
    """X9, P3: ignore_firewall = true in the policy, or for the program: the SAN carries what a rule refuses."""
    policy = tmp_path / "policy.toml"
    head = "[defaults]" if place == "defaults" else '[[process]]\nname = "puppet"'
    policy.write_text(f"version = 1\n{head}\nignore_firewall = true\n")
    side = switched_environment("--policy", str(policy))
    san.stage.environments = {"client": side, "server": side}
    listener, address = san.listener()
    become(san.client, USERS[user])
    nft(rule(f"tcp dport {address[1]} drop"))
    san.join(listener, address)


@pytest.mark.parametrize("user", USERS)
def test_strict(san: World, user: str) -> None:
    """X7, X9: under --require what a rule keeps off the SAN is refused, and not left to TCP."""
    san.stage.environments = {**san.stage.environments, "client": switched_environment("--require")}
    listener, address = san.listener()
    become(san.client, USERS[user])
    san.join(listener, address)
    _, other = san.listener()
    nft(rule(f"tcp dport {other[1]} ct state new drop"))
    begin = time.monotonic()
    while attempt(san, other)[0] != "ECONNREFUSED":
        assert time.monotonic() - begin < SECOND + 0.5
        time.sleep(0.1)
    assert reasons(san.client)["FIREWALL"]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
def test_routing_rules(san: World, host: str, user: str) -> None:
    """X9: what a routing rule prohibits is not done by the SAN. That the machine's own addresses do not come first is
    harmless alone."""
    listener, address = san.listener(host=host)
    family = "-6" if ":" in host else "-4"
    become(san.client, USERS[user])
    run("ip", family, "rule", "add", "pref", "100", "lookup", "local")
    run("ip", family, "rule", "del", "pref", "0")
    san.join(listener, address)
    run("ip", family, "rule", "add", "pref", "50", "ipproto", "tcp", "dport", str(address[1]), "prohibit")
    assert becomes(san, address, False) == "EACCES"


# ---- control groups

INGRESS, EGRESS, CONNECT4 = 0, 1, 10
CGROUP_SKB, CGROUP_SOCK_ADDR = 8, 18


def _bpf(command: int, attributes: bytes) -> int:
    area = ctypes.create_string_buffer(attributes.ljust(128, b"\0"))
    result = int(libc.syscall(321, command, area, 128))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result


def program(kind: int, attach: int, answer: int) -> int:
    """A program that answers the same to everything."""
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, answer, 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQIIQII16sII", kind, 2, ctypes.addressof(code), ctypes.addressof(licence),
                             0, 0, 0, 0, 0, b"", 0, attach)  # fmt: skip
    return _bpf(5, attributes)


@contextmanager
def group(*programs: tuple[int, int, int]) -> Iterator[Path]:
    """A control group with these programs attached, as systemd does for IPAddressDeny=."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    if not mounts:
        pytest.skip("the machine has no unified control groups")
    place = Path(mounts[0], f"test-firewall-{os.getpid()}")
    place.mkdir()
    with ExitStack() as stack:
        stack.callback(place.rmdir)
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        for kind, attach, answer in programs:
            loaded = program(kind, attach, answer)
            _bpf(8, struct.pack("=IIII", folder, loaded, attach, 0))
            os.close(loaded)
        home = Path("/proc/self/cgroup").read_text().rpartition("\n0::/")[2].strip()
        try:
            yield place
        finally:
            for pid in (place / "cgroup.procs").read_text().split():
                Path(mounts[0], home, "cgroup.procs").write_text(pid)


def enter(actor: Actor, place: Path) -> None:
    (place / "cgroup.procs").write_text(str(actor.pid))


DENIED = {
    "egress": ((CGROUP_SKB, EGRESS, 0), "EINPROGRESS"),
    "ingress": ((CGROUP_SKB, INGRESS, 0), "EINPROGRESS"),
    "connect": ((CGROUP_SOCK_ADDR, CONNECT4, 0), "EPERM"),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("denied", ["egress", "connect"])
def test_group_of_the_client(san: World, denied: str, user: str) -> None:
    """X9, O1: a control group that may send nothing, or may not connect, does neither by the SAN."""
    denial, said = DENIED[denied]
    _, address = san.listener()
    with group(denial) as place:
        enter(san.client, place)
        become(san.client, USERS[user])
        assert attempt(san, address) == (said, False)
        assert reasons(san.client) == {"FIREWALL": 1}


@pytest.mark.parametrize("user", USERS)
def test_group_of_the_server(san: World, user: str) -> None:
    """X9, O1: a control group that may neither send nor receive (IPAddressDeny=any) has no companion listener."""
    with group(DENIED["egress"][0], DENIED["ingress"][0]) as place:
        enter(san.server, place)
        become(san.server, USERS[user])
        _, address = san.listener()
        assert reasons(san.server) == {"FIREWALL": 1}
        assert attempt(san, address) == ("EINPROGRESS", False)


@pytest.mark.parametrize("user", USERS)
def test_group_that_counts(san: World, user: str) -> None:
    """X9: programs that let everything pass (IPAccounting=) change nothing."""
    with group((CGROUP_SKB, EGRESS, 1), (CGROUP_SKB, INGRESS, 1)) as place:
        enter(san.client, place)
        enter(san.server, place)
        become(san.client, USERS[user])
        listener, address = san.listener()
        san.join(listener, address)


# ---- sandboxes

PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446
CONNECT_TCP = 2


def restrict(actor: Actor) -> None:
    """Gives up TCP connections, for this program and those that it starts."""
    ruleset = actor.raw("syscall", LANDLOCK_CREATE, Buffer(struct.pack("=QQ", 0, CONNECT_TCP)), 16, 0).result
    if ruleset < 0:
        pytest.skip("the kernel has no Landlock for connections")
    assert actor.raw("syscall", LANDLOCK_RESTRICT, ruleset, 0).result == 0


@pytest.mark.parametrize("before", ["at once", "connected before"])
@pytest.mark.parametrize("user", USERS)
def test_landlock(san: World, user: str, before: str) -> None:
    """X9: a program that gave up TCP connections (Landlock) gets none by the SAN, whatever it had a moment ago."""
    client = san.client
    _, address = san.listener()
    become(client, USERS[user])
    if before != "at once":
        assert attempt(san, address) == ("EINPROGRESS", True)
    assert client.raw("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).value == 0
    restrict(client)
    assert attempt(san, address) == ("EACCES", False)


@pytest.mark.parametrize("inherited", [False, True])
def test_landlock_of_root(san: World, inherited: bool) -> None:
    """X9: the same for root, who needs no PR_SET_NO_NEW_PRIVS for it, and for the program that root starts then."""
    _, address = san.listener()
    client = san.client
    restrict(client)
    if inherited:
        client = client.exec("after")
    fd = client.socket(socket.AF_INET, socket.SOCK_STREAM | IN_PROGRESS)
    assert client.connect(fd, address) == "EACCES"
    assert not companion_name(client, fd)


@pytest.mark.parametrize("option", [(socket.SOL_SOCKET, 25, b"lo\0"), (socket.SOL_SOCKET, 36, 7), (0, 19, 1)])
@pytest.mark.parametrize("side", ["client", "server"])
def test_options(san: World, option: tuple[int, int, int | bytes], side: str) -> None:
    """X9, O1: a socket that is bound to a device, marked or transparent stays on TCP."""
    server = san.server.socket()
    fd = san.client.socket()
    actor, marked = (san.client, fd) if side == "client" else (san.server, server)
    assert actor.setsockopt(marked, *option) == 0
    assert san.server.bind(server, (LOOPBACK, san.port())) == 0
    assert san.server.listen(server) == 0
    assert san.client.connect(fd, san.server.getsockname(server)) == 0
    assert not companion_name(san.client, fd)
    assert reasons(actor) == {"OPTION": 1}
