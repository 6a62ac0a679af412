"""sanrun as its users meet it: a prefix that changes nothing but the transport, and that fails in clear words."""

from __future__ import annotations

import compileall
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from interposer.policy.table import Table

PYTHON = sys.executable
SANRUN = str(Path(PYTHON).parent / "sanrun")
PACKAGE = Path(__file__).resolve().parents[2] / "interposer"
LIBRARY = str(PACKAGE / "libinterposer.so")
NOBODY = 65534

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which no policy and no run-time file of this machine's user counts."""
    run = tmp_path / "run"
    run.mkdir()
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "XDG_RUNTIME_DIR": str(run),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }


@pytest.fixture
def sanrun(environ: dict[str, str]) -> Run:
    """Runs sanrun with these words; keyword arguments are environment variables."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SANRUN, *words], env={**environ, **variables}, capture_output=True, text=True, timeout=30, check=False
        )

    return run


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Builds a C source with the given compiler and flags."""
    place = tmp_path_factory.mktemp("compiled")

    def build(name: str, source: str, *command: str) -> str:
        output = place / name
        if not output.exists():
            (place / f"{name}.c").write_text(source)
            subprocess.run([*command, "-o", output, place / f"{name}.c"], check=True, timeout=60)
        return str(output)

    return build


def without_sanrun(*words: str, env: Mapping[str, str]) -> str:
    return subprocess.run(list(words), env=dict(env), capture_output=True, text=True, timeout=30, check=True).stdout


# What the program gets


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status_is_the_programs(sanrun: Run, status: int) -> None:
    """X8: sanrun is gone by the time the program ends."""
    assert sanrun("sh", "-c", f"exit {status}").returncode == status


def test_death_by_signal_is_the_programs(sanrun: Run) -> None:
    """X8: a killed program looks killed."""
    assert sanrun("sh", "-c", "kill -KILL $$").returncode == -signal.SIGKILL


def test_pid_is_the_programs(environ: dict[str, str]) -> None:
    """X8: who starts sanrun can signal the program."""
    words = [SANRUN, "sh", "-c", "echo $$; exec sleep 30"]
    process = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_signal_dispositions_are_the_defaults(sanrun: Run, environ: dict[str, str]) -> None:
    """X8: Python ignores SIGPIPE and SIGXFSZ, and that must not reach the program."""
    look = ("grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status")
    assert sanrun(*look).stdout == without_sanrun(*look, env=environ)


@pytest.mark.parametrize("name", ["PIPE", "XFSZ", "INT", "HUP"])
def test_ignored_signals_stay_ignored(environ: dict[str, str], name: str) -> None:
    """X8: as under nohup, and as services under systemd, which ignores SIGPIPE for them."""
    look = f"trap '' {name}; exec $PREFIX grep ^SigIgn /proc/self/status"
    plain = without_sanrun("sh", "-c", look, env=environ)
    assert without_sanrun("sh", "-c", look, env={**environ, "PREFIX": SANRUN}) == plain
    assert int(plain.split()[1], 16) >> (signal.Signals[f"SIG{name}"] - 1) & 1


def test_python_variables_are_for_the_program_alone(sanrun: Run, tmp_path: Path) -> None:
    """X8: a PYTHONHOME for the program must not break sanrun, nor a PYTHONPATH shadow its modules."""
    (tmp_path / "zlib.py").write_text("raise SystemExit('shadowed')\n")
    result = sanrun("sh", "-c", "echo $PYTHONPATH $PYTHONHOME", PYTHONPATH=str(tmp_path), PYTHONHOME="/no/such")
    assert (result.stdout, result.stderr) == (f"{tmp_path} /no/such\n", "")


def test_an_inner_sanrun_decides_how_strict(sanrun: Run) -> None:
    """X7: --require holds for what the program starts, but not for what another sanrun in it starts."""
    look = ("sh", "-c", "echo $INTERPOSER_REQUIRE")
    assert sanrun("--require", *look).stdout == "1\n"
    assert sanrun("--require", "--", str(SANRUN), *look).stdout == "\n"


def test_environment_gains_ours_and_loses_nothing(sanrun: Run, environ: dict[str, str]) -> None:
    """X8: exported shell functions, and no LC_CTYPE that Python invents in the C locale."""
    given = {**environ, "BASH_FUNC_f%%": "() { :; }", "ODD": "a=b\nc", "EMPTY": ""}
    del given["LANG"]
    before = set(without_sanrun("env", "-0", env=given).split("\0"))
    after = subprocess.run([SANRUN, "env", "-0"], env=given, capture_output=True, text=True, timeout=30, check=True)
    gained = set(after.stdout.split("\0")) - before
    assert before <= set(after.stdout.split("\0"))
    assert {variable.partition("=")[0] for variable in gained} == {"LD_PRELOAD", "INTERPOSER_TABLE"}


def test_arguments_arrive_byte_for_byte(environ: dict[str, str]) -> None:
    """X8: in the C locale, with bytes that are no UTF-8, with words that look like options."""
    words = [b"\xff\xfe", "ä".encode(), b"", b"--help", b"a b", b"--"]
    for locale in ("C", "C.UTF-8"):
        result = subprocess.run(
            [SANRUN.encode(), b"--", b"printf", b"%s\\0", *words],
            env={**environ, "LC_ALL": locale}, capture_output=True, timeout=30, check=True,
        )  # fmt: skip
        assert result.stdout.split(b"\0")[:-1] == words


def test_no_descriptor_is_left_open(sanrun: Run) -> None:
    """X8: the program's first descriptor is 3, as always."""
    assert sanrun("ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]


def test_options_end_where_the_command_begins(sanrun: Run) -> None:
    """X8: the command's options are its own."""
    assert sanrun("printf", "%s", "--version").stdout == "--version"
    assert sanrun("-v", "--", "printf", "%s", "--require").stdout == "--require"


def interposed(*words: str) -> tuple[str, ...]:
    """A command that runs `words` with the maps of the last one as output."""
    return (*words, "grep -q libinterposer.so /proc/self/maps && echo in")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_children_of_shells_are_interposed(sanrun: Run, shell: str) -> None:
    """X8, P3: prefixing works through shells."""
    assert sanrun(*interposed(shell, "-c")).stdout == "in\n"


@pytest.mark.parametrize("first_line", ["#!/bin/sh\n", "#!/usr/bin/env sh\n", ""])
def test_scripts_are_interposed(sanrun: Run, tmp_path: Path, first_line: str) -> None:
    """X8, P3: with and without an interpreter line, found by path and by PATH."""
    script = tmp_path / "script"
    script.write_text(f"{first_line}grep -q libinterposer.so /proc/self/maps && echo in $1\n")
    script.chmod(0o755)
    assert sanrun(str(script), "x").stdout == "in x\n"
    assert sanrun("script", "y", PATH=f"{tmp_path}:/usr/bin:/bin").stdout == "in y\n"


def test_other_preloads_stack(sanrun: Run, compiled: Callable[..., str]) -> None:
    """X8: what was in LD_PRELOAD still works, through a nested sanrun too."""
    other = compiled("other.so", "int getuid(void) { return 4242; }\n", "gcc", "-shared", "-fPIC")
    assert sanrun("id", "-ru", LD_PRELOAD=other).stdout == "4242\n"
    nested = sanrun(SANRUN, "sh", "-c", "id -ru; echo $LD_PRELOAD", LD_PRELOAD=other)
    assert nested.stdout == f"4242\n{LIBRARY}:{other}\n"


def test_kill_switch_runs_the_program_plainly(sanrun: Run) -> None:
    """X7: no policy is read, nothing is set, whatever else is wrong."""
    result = sanrun("--policy", "/no/such/file", "env", INTERPOSER="off", XDG_RUNTIME_DIR="/no/such/place")
    assert (result.returncode, result.stderr) == (0, "")
    assert "LD_PRELOAD" not in result.stdout
    assert "INTERPOSER_TABLE" not in result.stdout


def test_log_reaches_the_program_as_an_absolute_path(sanrun: Run, tmp_path: Path) -> None:
    """O3: what the library notices goes to the log, never to the program's output."""
    log = tmp_path / "log"
    assert sanrun("--log", str(log), "sh", "-c", "echo $INTERPOSER_LOG").stdout == f"{log}\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_log_through_a_symbolic_link(sanrun: Run, tmp_path: Path) -> None:
    """O3: the library follows none, so it is given the file itself."""
    log, link = tmp_path / "log", tmp_path / "link"
    link.symlink_to(log)
    assert sanrun("--log", str(link), "sh", "-c", "echo $INTERPOSER_LOG").stdout == f"{log}\n"
    assert log.exists()


def test_log_that_is_no_file(sanrun: Run, tmp_path: Path) -> None:
    """O3, O4: a pipe or a device cannot be the log."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", "/dev/stderr", str(tmp_path / "pipe"), str(tmp_path)):
        result = sanrun("--log", path, "echo", "started")
        assert (result.returncode, result.stdout) == (125, "")
        assert f"--log: {path} is not a regular file" in result.stderr


def test_helper_that_cannot_start_is_told(sanrun: Run, policy: Callable[[str], str], tmp_path: Path) -> None:
    """O4: not swallowed by the process that failed; with --require nothing is started."""
    path = policy('version = 1\n[defaults]\nengine = "reactive"\n')
    (tmp_path / "link").symlink_to("log")
    words = ("--policy", path, "echo", "started")
    result = sanrun(*words, INTERPOSER_LOG=str(tmp_path / "link"))
    assert (result.returncode, result.stdout) == (0, "started\n")
    assert "helper process did not start: [Errno 40]" in result.stderr
    assert sanrun("--require", *words, INTERPOSER_LOG=str(tmp_path / "link")).returncode == 125


def test_helper_of_a_caller_that_ignores_its_children(environ: dict[str, str], policy: Callable[[str], str]) -> None:
    """P8, O4: the kernel then reaps what sanrun forks."""
    path = policy('version = 1\n[defaults]\nengine = "reactive"\n')
    result = subprocess.run(
        [SANRUN, "--policy", path, "echo", "started"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "started\n", "")


def test_version_and_help(sanrun: Run) -> None:
    """O4: on stdout, with success."""
    assert sanrun("--version").stdout.startswith("sanrun 0.")
    for word in ("--help", "-h"):
        result = sanrun(word)
        assert (result.returncode, result.stderr) == (0, "")
        assert "usage: sanrun" in result.stdout


def test_output_that_cannot_be_written(environ: dict[str, str]) -> None:
    """O4: one line and 125."""
    for word in ("--help", "--version"):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [SANRUN, word], env=environ, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False
            )
        assert result.returncode == 125
        assert result.stderr == "sanrun: cannot write the output: No space left on device\n"


def test_dry_run_shows_and_starts_nothing(sanrun: Run, policy: Callable[[str], str], tmp_path: Path) -> None:
    """P3, O4: which sections and rules apply, with their places; other programs' sections do not."""
    path = policy(
        'version = 1\n[[process]]\nexe = "touch"\n  [[process.rule]]\n  role = "listen"\n  use = ["unix"]\n'
        '[[process]]\nexe = "other"\n  [[process.rule]]\n  role = "listen"\n  use = "tcp"\n'
        '[[rule]]\nrole = "connect"\nremote = "10.0.0.0/8"\nuse = "tcp"\n'
    )
    result = sanrun("--policy", path, "--dry-run", "touch", str(tmp_path / "touched"))
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "touched").exists()
    assert f"LD_PRELOAD={LIBRARY}" in result.stdout
    assert f"{path}:4: listen -> unix" in result.stdout
    assert f"{path}:9" not in result.stdout
    assert f"{path}:12: connect -> tcp" in result.stdout
    assert "packet filters: where some act, TCP\n" in result.stdout


def test_dry_run_shows_who_ignores_packet_filters(sanrun: Run, policy: Callable[[str], str]) -> None:
    """X9, P3: the section of another program counts for it alone."""
    path = policy('version = 1\n[[process]]\nexe = "true"\nignore_firewall = true\n')
    assert "packet filters: ignored\n" in sanrun("--policy", path, "--dry-run", "true").stdout
    assert "packet filters: where some act, TCP\n" in sanrun("--policy", path, "--dry-run", "false").stdout


def test_dry_run_shows_the_engine_and_why(sanrun: Run, policy: Callable[[str], str], tmp_path: Path) -> None:
    """P8, O4: where Python would run, and what says so."""
    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    rule = '[[rule]]\nrole = "connect"\nuse = "python:site_policy:decide"\n'
    path = policy("version = 1\n" + rule)
    (tmp_path / "bin").mkdir()
    shutil.copy("/bin/true", tmp_path / "bin" / "postgres")
    postgres = str(tmp_path / "bin" / "postgres")
    assert "\nengine: embedded, by [defaults]\n" in sanrun("--policy", path, "--dry-run", "true").stdout
    assert "\nengine: helper, by the built-in list" in sanrun("--policy", path, "--dry-run", postgres).stdout
    path = policy('version = 1\n[[process]]\nexe = "postgres"\nengine = "startup"\n' + rule)
    assert f"\nengine: startup, by {path}:2\n" in sanrun("--policy", path, "--dry-run", postgres).stdout


def test_dry_run_makes_nothing(sanrun: Run, tmp_path: Path) -> None:
    """O4: neither a log nor a run-time directory."""
    before = sorted(tmp_path.rglob("*"))
    result = sanrun("--dry-run", "--log", str(tmp_path / "log"), "true")
    assert result.returncode == 0, result.stderr
    assert f"INTERPOSER_LOG={tmp_path}/log" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert sanrun("--dry-run", "--log", "/no/such/place/log", "true").returncode == 125


# What cannot be interposed

LOOK = """\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(void) {
    const char *preload = getenv("LD_PRELOAD");
    puts(preload && strstr(preload, "interposer") ? "set" : "unset");
}
"""


def expect_obstacle(sanrun: Run, program: str, words: str, preload: str) -> None:
    result = sanrun(program)
    assert (result.returncode, result.stdout) == (0, f"{preload}\n")
    assert words in result.stderr
    assert "runs on plain TCP" in result.stderr
    strict = sanrun("--require", program)
    assert (strict.returncode, strict.stdout) == (125, "")
    assert words in strict.stderr


def test_static_program(sanrun: Run, compiled: Callable[..., str]) -> None:
    """O4, T14: said before the start; its children may still be interposed."""
    expect_obstacle(sanrun, compiled("static", LOOK, "gcc", "-static"), "statically linked", "set")


def test_musl_program(sanrun: Run, compiled: Callable[..., str]) -> None:
    """O4, T14: said before the start; a glibc preload never reaches its loader."""
    expect_obstacle(sanrun, compiled("musl", LOOK, "musl-gcc"), "musl", "unset")


@pytest.mark.parametrize(("mode", "word"), [(0o4755, "setuid"), (0o2755, "setgid")])
def test_privileged_program(sanrun: Run, compiled: Callable[..., str], tmp_path: Path, mode: int, word: str) -> None:
    """X3, O4: not even for root, whom the loader would let preload into one."""
    path = tmp_path / word
    shutil.copy(compiled("look", LOOK, "gcc"), path)
    path.chmod(mode)
    expect_obstacle(sanrun, str(path), word, "unset")


@pytest.mark.skipif(os.geteuid() != 0, reason="setcap needs root")
def test_program_with_capabilities(sanrun: Run, compiled: Callable[..., str], tmp_path: Path) -> None:
    """X3, O4: file capabilities count as privilege."""
    path = tmp_path / "capable"
    shutil.copy(compiled("look", LOOK, "gcc"), path)
    subprocess.run(["/sbin/setcap", "cap_net_bind_service+ep", path], check=True, timeout=10)
    expect_obstacle(sanrun, str(path), "file capabilities", "unset")


def test_program_of_another_architecture(sanrun: Run, tmp_path: Path) -> None:
    """O4: said before the start, which the kernel then refuses."""
    path = tmp_path / "foreign"
    image = bytearray(Path("/bin/true").read_bytes())
    image[18:20] = (183).to_bytes(2, "little")
    path.write_bytes(image)
    path.chmod(0o755)
    result = sanrun(str(path))
    assert result.returncode == 126
    assert "aarch64, not x86-64" in result.stderr
    assert sanrun("--require", str(path)).returncode == 125


LISTEN = """\
#include <arpa/inet.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0), served = 0;
    if (bind(fd, (struct sockaddr *)&any, sizeof any) || listen(fd, 1))
        return 1;
    for (int i = 0; i < 65536; i++) {
        char path[64], link[PATH_MAX] = "";
        snprintf(path, sizeof path, "/proc/self/fd/%d", i);
        if (readlink(path, link, sizeof link - 1) > 0 && strstr(link, "memfd:interposer"))
            served = 1;
    }
    puts(served ? "interposed" : "plain");
}
"""
"""Listens, and says whether the switch keeps its statistics in this process."""


def test_child_of_a_shell_that_is_as_it_should_be(sanrun: Run, compiled: Callable[..., str]) -> None:
    """P3, X8: the counterpart of the next three tests."""
    assert sanrun("sh", "-c", compiled("listen", LISTEN, "gcc")).stdout == "interposed\n"


def test_musl_child_of_a_shell(sanrun: Run, compiled: Callable[..., str]) -> None:
    """T14: it inherits a preload that sanrun would have kept from it, loads it, and is left whole."""
    result = sanrun("sh", "-c", compiled("listen-musl", LISTEN, "musl-gcc"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "plain\n", "")


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_privileged_child_of_a_shell(sanrun: Run, compiled: Callable[..., str], tmp_path: Path, mode: int) -> None:
    """X3: root's loader does preload into it, and the switch stays off."""
    path = tmp_path / "privileged"
    shutil.copy(compiled("listen", LISTEN, "gcc"), path)
    path.chmod(mode)
    assert sanrun("sh", "-c", str(path)).stdout == "plain\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="setcap needs root")
def test_child_with_capabilities_of_a_shell(sanrun: Run, compiled: Callable[..., str], tmp_path: Path) -> None:
    """X3: the same for file capabilities."""
    path = tmp_path / "capable"
    shutil.copy(compiled("listen", LISTEN, "gcc"), path)
    subprocess.run(["/sbin/setcap", "cap_net_bind_service+ep", path], check=True, timeout=10)
    assert sanrun("sh", "-c", str(path)).stdout == "plain\n"


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no command"),
        (("--",), "no command"),
        (("--polcy", "x", "true"), "perhaps you mean --policy"),
        (("--require=yes", "true"), "--require takes no value"),
        (("--policy",), "--policy wants a value"),
        (("--log=", "true"), "--log wants a value"),
        (("-x", "true"), "unknown option -x"),
        (("--provider", "unxi", "true"), "perhaps you mean unix"),
        (("--provider", "unix,tcp", "true"), "tcp stands alone"),
        (("--provider", "tcp", "--require", "true"), "--provider tcp contradicts --require"),
        (("--policy", "/no/such/policy.toml", "true"), "/no/such/policy.toml"),
        (("--log", "/no/such/place/log", "true"), "--log: cannot write /no/such/place/log"),
    ],
)
def test_bad_options(sanrun: Run, words: tuple[str, ...], message: str) -> None:
    """O4: nothing is started, 125, and the word that was meant."""
    result = sanrun(*words)
    assert (result.returncode, result.stdout) == (125, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_policy_lists_every_problem(sanrun: Run, policy: Callable[[str], str]) -> None:
    """P4: each with file, line and the nearest valid word; the program does not start."""
    path = policy('version = 1\n[defaults]\nprovders = ["unix"]\n[[rule]]\nrole = "listn"\nuse = "tcp"\n')
    result = sanrun("--policy", path, "echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert f"{path}:3: " in result.stderr
    assert "providers" in result.stderr
    assert f"{path}:5: " in result.stderr
    assert "listen" in result.stderr


def test_problems_cannot_steer_the_terminal(sanrun: Run, policy: Callable[[str], str]) -> None:
    """P4: what a policy says is spelled out."""
    path = policy('version = 1\n[[rule]]\nrole = "\\u001b[31m"\nuse = "tcp"\n"\\u001b]0;x\\u0007" = 1\n')
    result = sanrun("--policy", path, "echo", "started")
    assert result.returncode == 125
    assert "\x1b" not in result.stderr
    check = subprocess.run(
        [str(Path(SANRUN).with_name("sanctl")), "check", path], capture_output=True, text=True, timeout=30, check=False
    )
    assert (check.returncode, "\x1b" in check.stdout) == (1, False)
    assert "\\x1b]0;x\\x07" in check.stdout


def test_policy_warnings_come_once_and_when_asked_for(sanrun: Run, policy: Callable[[str], str]) -> None:
    """P4: at the first start after a change, and with -v."""
    path = policy(
        'version = 1\n[[rule]]\nrole = "connect"\nremote = "10.0.0.0/8:80"\nuse = "tcp"\n'
        '[[rule]]\nrole = "connect"\nremote = "10.1.0.0/16"\nuse = ["unix"]\n'
    )
    assert f"warning: {path}:" in sanrun("--policy", path, "true").stderr
    assert sanrun("--policy", path, "true").stderr == ""
    assert f"warning: {path}:" in sanrun("-v", "--policy", path, "true").stderr


def test_policy_is_found_by_variable_and_by_place(sanrun: Run, policy: Callable[[str], str], tmp_path: Path) -> None:
    """P4: $INTERPOSER_POLICY, then $XDG_CONFIG_HOME; never the working directory."""
    path = policy('version = 1\n[[rule]]\nrole = "both"\nuse = "tcp"\n')
    assert f"{path}:2:" in sanrun("--dry-run", "true", INTERPOSER_POLICY=path).stdout
    assert f"{path}:2:" not in sanrun("--dry-run", "true").stdout
    place = tmp_path / "config" / "interposer"
    place.mkdir(parents=True)
    shutil.copy(path, place)
    assert f"{place}/policy.toml:2:" in sanrun("--dry-run", "true").stdout


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("no-such-program", 127, "no-such-program: not found in PATH"),
        ("/no/such/program", 127, "/no/such/program: no such file"),
        ("", 127, "empty"),
        ("/tmp", 126, "/tmp is a directory"),
        ("/etc/passwd", 126, "not executable"),
    ],
)
def test_programs_that_cannot_run(sanrun: Run, program: str, status: int, message: str) -> None:
    """O4: 126 and 127 as shells have it."""
    result = sanrun("--", program)
    assert result.returncode == status
    assert message in result.stderr


def test_script_with_a_missing_interpreter(sanrun: Run, tmp_path: Path) -> None:
    """O4: the kernel would say that the script does not exist."""
    path = tmp_path / "script"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    result = sanrun(str(path))
    assert result.returncode == 127
    assert "/no/such/interpreter" in result.stderr


def spoil_by_link(run: Path) -> None:
    (run / "interposer").symlink_to("/tmp")


def spoil_by_mode(run: Path) -> None:
    (run / "interposer").mkdir()
    (run / "interposer").chmod(0o777)


def spoil_by_absence(run: Path) -> None:
    run.rmdir()


@pytest.mark.parametrize("spoil", [spoil_by_link, spoil_by_mode, spoil_by_absence])
def test_unusable_run_time_directory(sanrun: Run, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """X3, O4: refused with place and remedy."""
    spoil(tmp_path / "run")
    result = sanrun("echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert str(tmp_path / "run" / "interposer") in result.stderr
    assert "XDG_RUNTIME_DIR" in result.stderr or "chmod" in result.stderr


@pytest.fixture
def copied(tmp_path: Path, environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs sanrun from a copy of the package's Python files in `place`, where nothing is built."""

    def run(place: str, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
        parent = tmp_path / place
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "native")
        shutil.copytree(PACKAGE, parent / "interposer", ignore=ignore, dirs_exist_ok=True)
        start = f"{before}\nfrom interposer.cli.sanrun import main\nmain()"
        return subprocess.run(
            [PYTHON, "-c", start, *words], env={**environ, "PYTHONPATH": str(parent)}, cwd="/",
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    return run


def test_missing_library(copied: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """O4: names the file that is missing, and how to get it."""
    result = copied("bare", "true")
    assert result.returncode == 125
    assert f"{tmp_path}/bare/interposer/libinterposer.so" in result.stderr
    assert "tools/build" in result.stderr


def test_missing_libpython(environ: dict[str, str], policy: Callable[[str], str], tmp_path: Path) -> None:
    """O4: told, with what to do, when a policy is compiled that asks Python; noticed when it has been installed."""
    start = "import sys\nfrom interposer.launch import libpython\n"
    start += f"libpython.candidates = lambda: ['{tmp_path}/libpython.so']\n"
    start += "libpython._from_loader_cache = lambda names: ''\nfrom interposer.cli.sanrun import main\nmain()"

    def told(path: str, *options: str) -> bool:
        words = [PYTHON, "-c", start, "--policy", path, *options, "true"]
        result = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr
        return "apt install libpython3" in result.stderr

    (tmp_path / "site_policy.py").write_text("def decide(request):\n    return 'unix'\n")
    function = '[[rule]]\nrole = "both"\nuse = "python:site_policy:decide"\n'
    assert not told(policy("version = 1\n"))
    assert not told(policy('version = 1\n[defaults]\nengine = "helper"\n' + function))
    assert told(policy("version = 1\n" + function))
    reactive = policy('version = 1\n[defaults]\nengine = "reactive"\n')
    assert told(reactive)
    assert not told(reactive)
    (table,) = (tmp_path / "run/interposer").glob("table-*")
    assert not Table(table.read_bytes()).libpython
    assert told(reactive, "--verbose")
    (tmp_path / "libpython.so").write_bytes(b"")
    assert not told(reactive)
    assert Table(table.read_bytes()).libpython == f"{tmp_path}/libpython.so"


# Cost


def test_library_needs_libc_only() -> None:
    """X8: every program started under sanrun pays for what the library links."""
    dynamic = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True, timeout=10).stdout
    assert [line.split()[-1] for line in dynamic.splitlines() if "(NEEDED)" in line] == ["[libc.so.6]"]


def test_warm_start_imports_little(environ: dict[str, str], policy: Callable[[str], str], tmp_path: Path) -> None:
    """X8: `sanrun true` with a policy file that is compiled already reads no more than these modules, to cost at most
    25 ms over `true` (tools/bench measures it as start-sanrun)."""
    words = [SANRUN, "--policy", policy("version = 1\n"), "/bin/true"]
    compileall.compile_dir(PACKAGE, quiet=1)  # as an installation does
    subprocess.run(words, env=environ, check=True, timeout=30)
    traced = ["strace", "-f", "-e", "trace=openat", "-o", tmp_path / "calls", *words]
    subprocess.run(traced, env=environ, check=True, timeout=30)
    opened = re.findall(r'"([^"]+)/__pycache__/(\w+)[.][^"]*[.]pyc", [^)]*[)] = \d', (tmp_path / "calls").read_text())
    own = {f"{folder}/{name}".removeprefix(f"{PACKAGE}/") for folder, name in opened if folder.startswith(str(PACKAGE))}
    others = {name for folder, name in opened if "/site-packages" not in folder and not folder.startswith(str(PACKAGE))}
    assert own == {
        "__init__", "cli/__init__", "cli/sanrun", "config/__init__", "config/locate", "config/problems",
        "launch/__init__", "launch/elf", "launch/environment", "launch/runtime", "launch/table_cache",
        "policy/__init__", "policy/table",
    }  # fmt: skip
    assert others - {"__init__", "aliases", "utf_8", "sitecustomize"} <= {"__future__", "struct"}   # Python's own start


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        (resource.RLIMIT_NOFILE, 4, "file descriptors"),
        (resource.RLIMIT_DATA, 3000 << 10, "memory"),
        (resource.RLIMIT_AS, 10000 << 10, "memory"),
        (resource.RLIMIT_DATA, 4400 << 10, "memory"),
    ],
)
def test_limits_too_low_for_the_launcher(
    environ: dict[str, str], policy: Callable[[str], str], limit: int, value: int, said: str
) -> None:
    """O4, X6: one line that says what is short, and 125: before Python starts and while it reads the policy."""
    result = subprocess.run(
        [SANRUN, "--policy", policy("version = 1\n"), "true"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=lambda: resource.setrlimit(limit, (value, resource.getrlimit(limit)[1])),
    )
    assert result.returncode == 125, result.stderr
    assert result.stderr.startswith("sanrun: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
