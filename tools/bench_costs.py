"""Rows of tools/bench without a second side of their own: what the switch costs where it moves nothing, what a decision
costs, and what starting costs."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bench_machine as machine
from bench_report import Samples
from bench_run import SAN, TCP_SIDE, Bench, ask, memory_of, shared
from programs import SANRUN, WAIT, Failed, Policy, Program

BY_PORT = "".join(
    f'\n[[rule]]\nrole = "connect"\nremote = "127.0.0.1:{port}"\nuse = "tcp"\n' for port in range(1, 1001)
)
BY_PREFIX = "".join(
    f'\n[[rule]]\nrole = "connect"\nremote = "10.{n // 250}.{n % 250}.0/24"\nuse = "tcp"\n' for n in range(1000)
)
FUNCTION = """\
def decide(request):
    return ["unix"] if request.role == "connect" else "tcp"
"""
ASKING = SAN + '\n[[rule]]\nrole = "connect"\nremote = "127.0.0.0/8"\nuse = "python:site_policy:decide"\n'

DATA_CALLS = ("read", "readv", "recv", "recvfrom", "recvmsg", "write", "writev", "send", "sendto", "sendmsg")
OTHER_CALLS = (
    "poll", "ppoll", "select", "epoll_wait", "epoll_ctl", "socket", "bind", "listen", "connect", "accept", "accept4",
    "close", "shutdown", "getsockname", "getpeername", "setsockopt", "getsockopt", "fcntl", "ioctl", "dup",
)  # fmt: skip
COUNTED_CALLS = ("read", "write", "connect", "accept")
ACTION_TCP, ACTION_SAN = 1, 2


# ---- what the switch costs where it moves nothing


@shared
def count_instructions(bench: Bench) -> dict[str, tuple[float, float, dict[str, float]]]:
    """By call: instructions without and with the switch, and where the difference is. Under callgrind, so exact."""
    count = 20
    program = [str(machine.host("bench_calls")), "instructions", str(count)]
    plain, switched = bench.apps.environment(), bench.preloaded(bench.on_tcp)
    sides = []
    for number, environment in enumerate((plain, switched)):
        place = bench.apps.directory / f"callgrind-{number}"
        place.mkdir(exist_ok=True)
        options = ["-q", "--tool=callgrind", "--collect-atstart=no", "--compress-strings=no", "--compress-pos=no"]
        command = ["valgrind", *options, f"--callgrind-out-file={place}/out", *program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise Failed(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
        expect_interposed(done.stdout, number == 1)
        sides.append(dict(read_callgrind(path) for path in place.glob("out.*")))
    without, with_switch = sides
    if not {"nothing", *DATA_CALLS, *OTHER_CALLS} <= without.keys() & with_switch.keys():
        raise Failed("callgrind wrote no figures for some calls")
    out = {}
    for call in without:
        figures = [(sum(side[call].values()) - sum(side["nothing"].values())) / count for side in sides]
        differences = Counter(with_switch[call])
        differences.subtract(without[call])
        where = {name: cost / count for name, cost in differences.most_common() if cost}
        out[call] = (figures[0], figures[1], where)
    return out


def expect_interposed(said: str, expected: bool) -> None:
    if not said.startswith(f"interposed {expected:d}\n"):
        raise Failed(f"the switch was {'not ' if expected else ''}there: {said[:100]!r}")


def read_callgrind(path: Path) -> tuple[str, Counter[str]]:
    """What one dump is for, and the instructions of each function itself."""
    purpose, function, is_call = "", "", False
    costs: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            purpose = line.rpartition(": ")[2]
        elif line.startswith("fn="):
            function = line[3:]
        elif line.startswith("calls="):
            is_call = True  # the next line has the cost of the called function
        elif re.fullmatch(r"\d+ \d+", line):
            if not is_call:
                costs[function] += int(line.split()[1])
            is_call = False
    return purpose, costs


@shared
def count_system_calls(bench: Bench) -> dict[str, tuple[float, float]]:
    """By call: system calls without and with the switch."""
    count = 40
    program = str(machine.host("bench_calls"))
    sides = []
    for policy in (None, bench.on_tcp):
        command = [program, "trace", str(count)]
        if policy:
            command = [str(SANRUN), "--policy", str(policy.path), "--", *command]
        text = bench.apps.run([program, "counter", *command], None).decode()
        expect_interposed(text, policy is not None)
        total: Counter[str] = Counter()
        for line in text.splitlines()[1:]:
            call, _, times = line.split()
            total[call] += int(times)
        sides.append(total)
    return {call: (sides[0][call] / count, sides[1][call] / count) for call in sides[0] | sides[1]}


def measure_instructions(bench: Bench, call: str) -> Samples:
    plain, switched, where = count_instructions(bench)[call]
    return Samples([switched], [plain], {"call": call, "exact": True, "functions": where})


def measure_system_calls(bench: Bench, call: str) -> Samples:
    plain, switched = count_system_calls(bench)[call]
    return Samples([switched], [plain], {"call": call, "exact": True})


# ---- deciding


def deciding(bench: Bench, policy: Policy, words: tuple[str, ...]) -> Program:
    table = bench.environment_under(policy)["INTERPOSER_TABLE"]
    with bench.behind("env", f"INTERPOSER_TABLE={table}", *words):
        return bench.apps.start([str(machine.host("bench_decide", library=True))], None, pipes=True)


def one_cpu() -> tuple[str, ...]:
    return machine.on_cpu(min(os.sched_getaffinity(0)))


def measure_decision(bench: Bench, name: str, rules: str, address: str, port: int) -> Samples:
    policy = bench.apps.policy(name, SAN + rules)
    count = 20_000 if bench.quick else 500_000
    program = deciding(bench, policy, one_cpu())
    expected = [str(ACTION_TCP), "999"] if rules else [str(ACTION_SAN), "-1"]
    ask(program, f"decide {address} {port} {count // 10}")

    def measure() -> float:
        figure, *decision = ask(program, f"decide {address} {port} {count}")
        if decision != expected:
            raise Failed(f"the decision was {decision} instead of {expected}")
        return float(figure)

    samples = bench.alone(measure)
    bench.stop(program)
    return samples


@dataclass(frozen=True)
class Engine:
    start_ms: list[float]
    memory_kib: list[float]
    upcall_us: list[float]


def start_engines(bench: Bench, words: tuple[str, ...]) -> Engine:
    policy = bench.apps.policy("asking", ASKING, FUNCTION)
    starts: list[float] = []
    memory: list[float] = []
    upcalls: list[float] = []
    for turn in range(bench.pairs):
        bench.progress.say(f"{bench.row}: {turn + 1} of {bench.pairs}", detail=True)
        program = deciding(bench, policy, words)
        ask(program, "decide 10.0.0.1 80 1")  # no function is asked about that
        before = memory_of(program.pid, "Rss")
        for count, figures in ((1, starts), (2_000 if bench.quick else 10_000, upcalls)):
            figure, *decision = ask(program, f"ask {count}")
            if decision != [str(ACTION_SAN), "0"]:
                raise Failed(f"the function's answer was {decision}; log:\n{bench.apps.logged()}")
            figures.append(float(figure))
            if count == 1:
                memory.append((memory_of(program.pid, "Rss") - before) / 1024)
        bench.stop(program)
    return Engine([us / 1000 for us in starts], memory, upcalls)


@shared
def engines(bench: Bench) -> Engine:
    return start_engines(bench, ())


def measure_upcall(bench: Bench, cpus: int) -> Samples:
    """The function runs in a thread of its own, so it matters whether there is a CPU for it."""
    return Samples((engines(bench) if cpus == 2 else start_engines(bench, one_cpu())).upcall_us)


def measure_engine_start(bench: Bench) -> Samples:
    return Samples(engines(bench).start_ms)


def measure_engine_memory(bench: Bench) -> Samples:
    return Samples(engines(bench).memory_kib)


# ---- starting


def time_of(command: list[str], environment: Mapping[str, str], times: int) -> float:
    """Milliseconds from the start of a program to its end."""
    start = time.perf_counter()
    for _ in range(times):
        pid = os.posix_spawn(command[0], command, environment)
        ended = os.pidfd_open(pid)
        if not select.select([ended], [], [], WAIT)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(ended)
        _, status = os.waitpid(pid, 0)
        if status:
            raise Failed(f"{' '.join(command)}: status {status}")
    return (time.perf_counter() - start) * 1000 / times


def measure_start(bench: Bench, launcher: bool) -> Samples:
    true = ["/bin/true"]
    plain, switched = bench.apps.environment(), bench.preloaded(bench.san)
    times = (20 if launcher else 200) // (10 if bench.quick else 1)

    def measure(side: str) -> float:
        if side == TCP_SIDE:
            return time_of(true, plain, times)
        if launcher:
            return time_of([str(SANRUN), "--policy", str(bench.san.path), "--", *true], plain, times)
        return time_of(true, switched, times)

    return bench.in_turn(measure)
