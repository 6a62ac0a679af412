"""`sanrun [options] [--] CMD [ARG...]`: checks policy and program, sets the environment and becomes CMD.

The way of a start with a cached policy imports only small modules; everything else is imported where it is needed.
"""

from __future__ import annotations

import os
import stat
import sys

from interposer.launch import elf, environment, runtime, table_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127

WITH_VALUE = {
    "--policy": "FILE",
    "--provider": "LIST",
    "--log": "FILE",
}
FLAGS = ("--require", "--dry-run", "--verbose", "--version", "--help")
SHORT = {"-v": "--verbose", "-h": "--help"}

USAGE = """\
usage: sanrun [options] [--] CMD [ARG...]

Runs CMD with its TCP connections on faster transports where the policy and the
machine allow it. CMD keeps this process: pid, signals and exit status are its own.

  --policy FILE    read this policy; else $INTERPOSER_POLICY, else
                   $XDG_CONFIG_HOME/interposer/policy.toml, else
                   /etc/interposer/policy.toml, each with policy.d/*.toml beside it
  --provider LIST  use these providers, comma-separated and in this order, instead of
                   those that the policy names; "tcp" alone means none
  --require        no SAN, no connection: whatever cannot be on a SAN fails
  --dry-run        print what would be set and which rules apply, and stop
  --log FILE       append what the library notices to FILE
  -v, --verbose    say what is done, and the policy's warnings
  --version        print the version
  -h, --help       print this

exit status: CMD's own; 125 sanrun failed, 126 CMD cannot be executed, 127 not found
INTERPOSER=off in the environment runs CMD as if sanrun were not there.
"""


_SHORTAGES = (12, 23, 24)  # ENOMEM, ENFILE, EMFILE; the module errno is not loaded yet


class Failure(Exception):
    """Nothing was started; `status` is the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class Options:
    """The command line, taken apart."""

    __slots__ = ("command", "dry_run", "log", "policy", "providers", "require", "show", "verbose")

    def __init__(self) -> None:
        self.policy: str | None = None
        self.providers: list[str] = []
        self.log = ""
        self.require = False
        self.dry_run = False
        self.verbose = False
        self.show = ""
        self.command: list[str] = []


def parse(arguments: Sequence[str]) -> Options:
    """Raises Failure. Options end at `--` or at the first word that is none."""
    options = Options()
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            position -= 1
            break
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if name in WITH_VALUE:
            if not equals:
                if position == len(arguments):
                    raise Failure(f"{name} wants a value: {name} {WITH_VALUE[name]}")
                value = arguments[position]
                position += 1
            if not value:
                raise Failure(f"{name} wants a value that is not empty: {name} {WITH_VALUE[name]}")
            _set_value(options, name, value)
        elif name in FLAGS and not equals:
            _set_flag(options, name)
        elif name in FLAGS:
            raise Failure(f"{name} takes no value")
        else:
            raise Failure(f"unknown option {word}{_nearest(name)}; sanrun --help lists all")
    if options.require and options.providers == ["tcp"]:
        raise Failure("--provider tcp contradicts --require, by which nothing may be on TCP; omit one of them")
    options.command = list(arguments[position:])
    return options


def _set_value(options: Options, name: str, value: str) -> None:
    if name == "--policy":
        options.policy = value
    elif name == "--log":
        options.log = os.path.abspath(value)
    else:
        from interposer.providers import NAMES

        options.providers = [word.strip() for word in value.split(",")]
        if options.providers == ["tcp"]:
            return
        if "tcp" in options.providers:
            raise Failure("--provider: tcp stands alone; it is what remains where no provider can be used, so omit it")
        for word in options.providers:
            if word not in NAMES:
                nearest = _nearest(word, NAMES)
                known = ", ".join(NAMES)
                raise Failure(f"--provider: unknown provider {word!r}{nearest}; known are: {known}, or tcp alone")


def _set_flag(options: Options, name: str) -> None:
    if name == "--require":
        options.require = True
    elif name == "--dry-run":
        options.dry_run = True
    elif name == "--verbose":
        options.verbose = True
    else:
        options.show = options.show or name


def _nearest(word: str, valid: Sequence[str] | Mapping[str, object] = (*WITH_VALUE, *FLAGS, *SHORT)) -> str:
    from difflib import get_close_matches

    found = get_close_matches(word, list(valid), 1)
    return f", perhaps you mean {found[0]}" if found else ""


def main(*ignored: str) -> NoReturn:
    """Becomes the command, or exits with 125, 126 or 127. `ignored`: signals that the caller had ignored, among those
    that Python ignores by itself."""
    try:
        options = parse(sys.argv[1:])
        if options.show == "--help":
            _print(USAGE)
        elif options.show == "--version":
            from interposer import __version__

            _print(f"sanrun {__version__}\n")
        elif not options.command:
            raise Failure("no command; usage: sanrun [options] [--] CMD [ARG...], and sanrun --help says more")
        else:
            _start(options, ignored)
    except Failure as failure:
        _say(str(failure))
        sys.exit(failure.status)
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno not in _SHORTAGES:
            sys.excepthook(*sys.exc_info())
        _say(f"not enough is left to start the program: {str(error) or 'out of memory'}; raise the limits (ulimit -a)")
        sys.exit(FAILED)
    except Exception:
        sys.excepthook(*sys.exc_info())  # a bug of ours must not look like an exit status of the command
        sys.exit(FAILED)
    sys.exit(0)


def _start(options: Options, ignored: Sequence[str]) -> None:
    environ = _environment()
    off = environ.get("INTERPOSER") == "off"
    try:
        path = elf.find(options.command[0], environ)
        program = elf.inspect(path, None if off else environment.library_head())
    except elf.NotFound as error:
        raise Failure(str(error), NOT_FOUND) from None
    except elf.NotExecutable as error:
        raise Failure(str(error), NOT_EXECUTABLE) from None
    except environment.Unusable as error:
        raise Failure(str(error)) from None
    if off and not options.dry_run:
        _become(program, options.command, environ, ignored)
    if program.obstacle and options.require:
        raise Failure(f"{path} cannot be interposed: {program.obstacle}; without --require it runs on plain TCP")
    table = _table(options, environ)
    log = _usable_log(options.log, options.dry_run)
    library = _library(environ, options.dry_run)
    additions = environment.additions(environ, table=table.path, log=log, library=library, require=options.require)
    for warning in table.warnings:
        _say(f"warning: {warning}")
    if options.dry_run:
        from interposer.cli import dry_run

        _print(dry_run.report(program, options.command, environ, additions, table.data))
        return
    if program.obstacle:
        children = ", what it starts may still be interposed" if program.ignores else ""
        _say(f"{path} cannot be interposed: {program.obstacle}; it runs on plain TCP{children}")
    if program.obstacle and not program.ignores:
        _become(program, options.command, environ, ignored)
    _helper(table, log or environ.get("INTERPOSER_LOG", ""), options.require)
    if options.verbose:
        for name, value in additions.items():
            _say(f"{name}={value}")
    environ.pop(environment.REQUIRE, None)  # of a sanrun around this one
    environ.update(additions)
    _become(program, options.command, environ, ignored)


def _environment() -> dict[str, str]:
    """The environment as it was given to us: in the C locale Python adds an LC_CTYPE (PEP 538)."""
    environ = dict(os.environ)
    if environ.get("LC_CTYPE", "").upper().endswith("UTF-8"):
        try:
            with open("/proc/self/environ", "rb", buffering=0) as file:
                given = file.readall()
        except OSError:
            return environ
        if b"\0LC_CTYPE=" not in b"\0" + given:
            del environ["LC_CTYPE"]
    return environ


def _table(options: Options, environ: Mapping[str, str]) -> table_cache.Cached:
    try:
        choice = table_cache.choose(options.policy, environ, options.providers, options.require)
        if options.dry_run:
            return table_cache.preview(choice, environ)
        return table_cache.fetch(choice, environ, fresh=options.verbose)
    except table_cache.PolicyError as error:
        raise Failure("\n".join(str(problem) for problem in error.problems)) from None
    except (runtime.Refused, table_cache.NoEngine) as error:
        raise Failure(str(error)) from None


def _library(environ: Mapping[str, str], dry_run: bool) -> str:
    try:
        return environment.loadable(environ, make=not dry_run)
    except (environment.Unusable, runtime.Refused) as error:
        raise Failure(str(error)) from None


def _helper(table: table_cache.Cached, log: str, require: bool) -> None:
    if not table_cache.wants_helper(table.data):
        return
    from interposer.launch import helper

    try:
        helper.spawn(table.path, table_cache.helper_address(table.path), log or None)
    except OSError as error:
        message = f"the policy's helper process did not start: {error}"
        if require:
            raise Failure(message) from None
        _say(f"{message}; programs that cannot embed Python stay on TCP where a rule asks a function")


def _usable_log(path: str, dry_run: bool) -> str:
    """The file that the option means, made if need be: the library and the helper follow no symbolic link."""
    if not path:
        return ""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise Failure(f"--log: {path} is not a regular file; name another file")
        path = os.path.realpath(path)
        if not dry_run:
            os.close(os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        elif not os.access(path if os.path.exists(path) else os.path.dirname(path), os.W_OK):
            raise Failure(f"--log: cannot write {path}; name another file")
    except OSError as error:
        raise Failure(f"--log: cannot write {path}: {error.strerror}; name another file") from None
    return path


def _become(
    program: elf.Program, command: Sequence[str], environ: Mapping[str, str], ignored: Sequence[str]
) -> NoReturn:
    import _signal  # what `signal` wraps, without its enumerations

    for name in ("SIGPIPE", "SIGXFSZ"):
        if name not in ignored:
            _signal.signal(getattr(_signal, name), _signal.SIG_DFL)
    path, arguments = program.path, list(command)
    if program.shell:
        path, arguments = "/bin/sh", ["sh", program.path, *command[1:]]
    try:
        os.execve(path, arguments, environ)
    except OSError as error:
        raise Failure(f"cannot execute {path}: {error.strerror}", NOT_EXECUTABLE) from None


def _print(text: str) -> None:
    if sys.stdout is None:
        return
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _say(f"cannot write the output: {error.strerror}")
        os._exit(FAILED)  # at a normal exit Python would try to write the rest once more


def _say(text: str) -> None:
    lines = text.split("\n")
    if not all(line.isprintable() for line in lines):
        from interposer.cli.output import clean

        lines = [clean(line) for line in lines]
    try:
        sys.stderr.write("".join(f"sanrun: {line}\n" for line in lines))
    except (OSError, AttributeError):
        pass  # a closed stderr is no reason to stop
