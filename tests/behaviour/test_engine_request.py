"""What a user's function is given and what its decision changes, in programs under sanrun: asked in the program itself
and in the helper process."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from puppet import SANRUN, Actor, Stage, plain_environment
from world import companion_name

from interposer.diag import stats

ENGINES = ("embedded", "helper", "reactive")
ONE = 1
PRELUDE = "import json\nfrom interposer.policy import Decision, Option, Process, Request\n"


class Scene:
    """A server, whose connections may be on the SAN, and a client that asks a function for each of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        self.log = folder / "log"
        environment = {**plain_environment(), "XDG_RUNTIME_DIR": str(folder / "run"), "WORD": "yes"}
        self.stage = Stage({"client": environment, "server": environment})
        self.server = self.stage.start("server", "server", [str(SANRUN)])
        self.listener = self.server.socket()
        assert self.server.bind(self.listener, ("127.0.0.1", 0)) == 0
        assert self.server.listen(self.listener, 64) == 0
        self.port = int(self.server.getsockname(self.listener)[1])

    def client(
        self, engine: str, body: str, prefix: Sequence[str] = (), role: str = "connect", sections: str = ""
    ) -> Actor:
        """A program whose rule asks decide(request) with this body."""
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (self.folder / "site_policy.py").write_text(f"{PRELUDE}def decide(request: Request):\n{lines}")
        policy = self.folder / "policy.toml"
        policy.write_text(
            f'version = 1\n[defaults]\ntimeout_ms = 3000\nengine = "{engine}"\n{sections}'
            f'[[rule]]\nrole = "{role}"\nuse = "python:site_policy:decide"\n'
        )
        words = [str(SANRUN), "--policy", str(policy), "--log", str(self.log), *prefix]
        return self.stage.start("client", "client", words)

    def connect(self, client: Actor, options: Sequence[tuple[int, int, int]] = ()) -> int:
        fd = client.socket()
        for option in options:
            assert client.setsockopt(fd, *option) == 0
        assert client.connect(fd, ("127.0.0.1", self.port)) == 0
        return int(fd)

    def on_san(self, client: Actor, options: Sequence[tuple[int, int, int]] = ()) -> bool:
        """Whether a new connection with these options is on the SAN."""
        return companion_name(client, self.connect(client, options)).startswith("@san1/C")

    def printed(self) -> list[str]:
        """What functions printed, by the log; each line ends with it."""
        return [line[line.index("SAID ") + 5 :] for line in self.log.read_text().splitlines() if "SAID " in line]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    try:
        yield made
    finally:
        said = made.stage.close()
    assert said == ""


NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, ONE)
KEEPALIVE = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, ONE)


@pytest.mark.parametrize("engine", ENGINES)
def test_options_reach_the_function(scene: Scene, engine: str) -> None:
    """P5, S13: the options set so far decide; each set of them is asked about once, and has its own answer."""
    client = scene.client(
        engine,
        'print("SAID", json.dumps([[option.name, int(option)] for option in request.options]))\n'
        'return "unix" if request.option("TCP_NODELAY") else "tcp"',
    )
    for _ in range(2):
        assert not scene.on_san(client)
        assert scene.on_san(client, [NODELAY])
        assert not scene.on_san(client, [KEEPALIVE])
        assert scene.on_san(client, [KEEPALIVE, NODELAY])
    said = [json.loads(line) for line in scene.printed()]
    assert said == [[], [["TCP_NODELAY", 1]], [["SO_KEEPALIVE", 1]], [["SO_KEEPALIVE", 1], ["TCP_NODELAY", 1]]]


@pytest.mark.parametrize("engine", ENGINES)
def test_listeners_options(scene: Scene, engine: str) -> None:
    """P5: a listener's too; an option that was set twice is there once, with its last value."""
    client = scene.client(engine, 'print("SAID", request)\nreturn "tcp"', role="listen")
    fd = client.socket(socket.AF_INET6)
    for value in (0, 1):
        assert client.setsockopt(fd, socket.SOL_SOCKET, socket.SO_REUSEADDR, value) == 0
    assert client.setsockopt(fd, socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno") == 0
    assert client.bind(fd, ("::1", 0)) == 0
    port = client.getsockname(fd)[1]
    assert client.listen(fd) == 0
    (said,) = scene.printed()
    assert said.startswith(f"Request(role='listen', family='v6', local=('::1', {port}), remote=None, ")
    reuse = "Option(name='SO_REUSEADDR', level=1, number=2, value=b'\\x01\\x00\\x00\\x00')"
    assert said.endswith(f"options=({reuse}, Option(name='TCP_CONGESTION', level=6, number=13, value=b'reno')))")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_function_prints_is_logged_whole(scene: Scene, engine: str) -> None:
    """P5: however long a line is; a request with a process of many arguments is."""
    client = scene.client(engine, 'print("SAID", "x" * 9000 + "y")\nreturn "tcp"')
    scene.connect(client)
    assert scene.printed() == ["x" * 9000 + "y"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_process_is_the_one_that_asks(scene: Scene, engine: str) -> None:
    """P3, P5: a child that executes another program is asked about as that program, with its environment."""
    client = scene.client(
        engine,
        "process = request.process\n"
        'print("SAID", json.dumps([process.exe, process.name, process.arguments, process.environment.get("WORD"),\n'
        '    process.environment.get("CHILD"), process.cgroups, process.user, request.rule]))\n'
        'return "tcp"',
        ["/bin/sh", "-c", 'CHILD=1 exec "$@"', "sh"],
    )
    scene.connect(client)
    (said,) = [json.loads(line) for line in scene.printed()]
    exe = os.readlink(f"/proc/{client.pid}/exe")
    words = Path(f"/proc/{client.pid}/cmdline").read_text().split("\0")[:-1]
    cgroups = [line.split(":", 2)[2] for line in Path(f"/proc/{client.pid}/cgroup").read_text().splitlines()]
    name = Path(f"/proc/{client.pid}/comm").read_text().rstrip("\n")
    assert said == [exe, name, words, "yes", "1", cgroups, os.geteuid(), f"{scene.folder}/policy.toml:5"]


@pytest.mark.parametrize("engine", ENGINES)
def test_how_long_an_answer_is_remembered(scene: Scene, engine: str) -> None:
    """P1, P5: until the policy changes unless the function says otherwise; 0 asks for every connection."""
    client = scene.client(
        engine,
        'remember = {None: None, 1: 0, 2: 0.4}[int(request.option("SO_PRIORITY") or 0) or None]\n'
        'print("SAID", remember)\nreturn Decision("unix", remember=remember)',
    )

    def asked(priority: int) -> int:
        before = len(scene.printed())
        assert scene.on_san(client, [(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)] if priority else [])
        return len(scene.printed()) - before

    assert [asked(0) for _ in range(4)] == [1, 0, 0, 0]
    assert [asked(1) for _ in range(3)] == [1, 1, 1]
    begin = time.monotonic()
    assert asked(2) == 1
    counts = [asked(2) for _ in range(3)]
    if time.monotonic() - begin < 0.4:
        assert counts == [0, 0, 0]
    time.sleep(0.45)  # its answer has ended
    assert asked(2) == 1
    assert asked(0) == 0


def buffers(actor: Actor, fd: int) -> tuple[int, int]:
    """SO_SNDBUF and SO_RCVBUF of what the kernel has under a descriptor of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(actor.pid)
    copy = libc.syscall(438, pidfd, fd, 0)  # pidfd_getfd
    assert copy >= 0, os.strerror(ctypes.get_errno())
    os.close(pidfd)
    with socket.socket(fileno=copy) as sock:
        assert sock.family == socket.AF_UNIX
        return tuple(sock.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_SNDBUF, socket.SO_RCVBUF))  # type: ignore


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_are_the_decisions(scene: Scene, engine: str) -> None:
    """P5: the companion gets the buffers that the function wants, the first time and from memory."""
    client = scene.client(engine, 'return Decision("unix", send_buffer=40000, receive_buffer=50000)')
    for _ in range(2):
        fd = scene.connect(client)
        assert buffers(client, fd) == (80000, 100000)  # the kernel doubles what it is told


@pytest.mark.parametrize("engine", ENGINES)
def test_more_options_than_are_recorded(scene: Scene, engine: str) -> None:
    """P5: at most 16 reach the function."""
    client = scene.client(engine, 'print("SAID", len(request.options))\nreturn "unix"')
    numbers = (1, 2, 5, 6, 7, 8, 9, 10, 12, 15, 18, 29, 35, 40, 42, 45, 46, 49)
    scene.connect(client, [(socket.SOL_SOCKET, number, ONE) for number in numbers[:17]])
    assert scene.printed() == ["16"]


def test_the_engine_is_where_the_policy_says(scene: Scene) -> None:
    """P8: `helper` asks the helper, the others Python in the program."""
    for engine in ENGINES:
        client = scene.client(engine, 'return "unix"')
        assert scene.on_san(client)
        assert stats.process(client.pid).engine == ("helper" if engine == "helper" else "ready")


def test_sections_choose_the_engine(scene: Scene) -> None:
    """P3, P8: each section its own; `startup` has Python ready before main, `off` stays on TCP and says why."""
    sections = "".join(
        f'[[process]]\nenv = "MODE={mode}"\nengine = "{mode}"\n' for mode in ("helper", "startup", "reactive", "off")
    )
    for mode, state in {"helper": "helper", "startup": "ready", "reactive": "ready", "off": "not started"}.items():
        client = scene.client("embedded", 'return "unix"', ["env", f"MODE={mode}"], sections=sections)
        before = Path(f"/proc/{client.pid}/maps").read_text()
        assert ("libpython" in before) == (mode == "startup")
        assert scene.on_san(client) == (mode != "off")
        seen = stats.process(client.pid)
        assert (seen.engine, list(seen.reasons)) == (state, ["ENGINE_OFF"] if mode == "off" else [])
    client = scene.client("off", 'return "unix"', ["env", "MODE=on"], sections=sections)
    assert not scene.on_san(client)


def test_helper_is_started_where_a_function_can_be_asked(scene: Scene) -> None:
    """P8, X5: not for rules without code, nor where Python is off; and it is gone when its programs are."""

    def helpers() -> int:
        found = 0
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (place / "comm").read_text() == "sanrun-helper\n":
                    found += str(scene.folder).encode() in (place / "cmdline").read_bytes()
        return found

    client = scene.client("helper", 'return "unix"')
    assert helpers() == 1
    client.kill()
    deadline = time.monotonic() + 10
    while helpers():
        assert time.monotonic() < deadline
    scene.client("off", 'return "unix"')
    assert helpers() == 0
    policy = scene.folder / "plain.toml"
    policy.write_text('version = 1\n[defaults]\nengine = "helper"\n')
    plain = scene.stage.start("plain", "client", [str(SANRUN), "--policy", str(policy)])
    assert scene.on_san(plain) and helpers() == 0


def test_programs_that_may_load_python_ask_the_helper(scene: Scene) -> None:
    """P8: a program of the built-in list uses the helper without being told; under another name it embeds."""
    puppet = scene.stage.program
    for name, engine in (("postgres", "helper"), ("postgrest", "ready")):
        program = scene.folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_bytes(Path(puppet).read_bytes())
        program.chmod(0o755)
        scene.stage.program = program
        client = scene.client("embedded", 'return "unix"')
        assert scene.on_san(client)
        assert stats.process(client.pid).engine == engine
