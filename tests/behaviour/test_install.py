"""Installs a copy of the tree as users do, into fresh virtual environments, and uses what was installed there."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import installing
import pytest
from installing import DEBIAN, ROOT, Environment, Interpreter, run

sys.path[:0] = [str(ROOT / "tests/apps"), str(ROOT / "tools")]

import looks  # noqa: E402
import programs  # noqa: E402
import servers  # noqa: E402
from programs import LOOPBACK, Policy, Programs  # noqa: E402

PLAIN = 'version = 1\n[defaults]\nproviders = ["unix"]\n'
FUNCTION = PLAIN + '[[rule]]\nrole = "both"\nuse = "python:site_policy:decide"\n'
DECIDE = 'def decide(request):\n    return "unix"\n'
NOBODY = 65534
HIDE = """\
#!/bin/sh
exec unshare --mount sh -c 'mount -t tmpfs none /mnt && mkdir /mnt/upper /mnt/work &&
mount -t overlay -o lowerdir={libraries},upperdir=/mnt/upper,workdir=/mnt/work overlay {libraries} &&
rm {libraries}/libpython3.* && exec "$@"' sh {sanrun} "$@"
"""
BUILD_ONLY = {"interposer/build.py", "interposer/policy/build_engine.py"}

FOUND = installing.interpreters()
OTHERS = [found for found in FOUND if found.path != DEBIAN]
ABSENT = [version for version in installing.KNOWN if version not in {found.version[:2] for found in OTHERS}]
others = pytest.mark.parametrize(
    "interpreter",
    [
        *(pytest.param(found, id=str(found), marks=pytest.mark.long) for found in OTHERS),
        *(pytest.param(None, id=".".join(map(str, version)),
                       marks=pytest.mark.skip(reason=f"no Python {version[0]}.{version[1]} beside Debian's: not run"))
          for version in ABSENT),
    ],
)  # fmt: skip


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that every user can look into."""
    directory = Path(tempfile.mkdtemp(prefix="interposer-install-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def tree(place: Path) -> Path:
    return installing.copy_of_the_tree(place / "tree")


@pytest.fixture(scope="session")
def sdist(place: Path, tree: Path) -> Path:
    run([sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", place / "dist", tree])
    (found,) = (place / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="session")
def maker(place: Path) -> Environment:
    """With what a build requires."""
    environment = Environment(DEBIAN, place / "maker")
    environment.pip("install", *installing.BUILD_REQUIREMENTS)
    return environment


@pytest.fixture(scope="session")
def wheel(place: Path, sdist: Path, maker: Environment) -> Path:
    """Built from the source distribution, by Debian's Python."""
    maker.pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", place / "wheels", sdist)
    (found,) = (place / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(place: Path, wheel: Path) -> Environment:
    """The wheel, in Debian's Python."""
    environment = Environment(DEBIAN, place / "installed")
    environment.pip("install", wheel)
    return environment


@pytest.fixture
def apps() -> Iterator[Programs]:
    """X5: after each test nothing that it started is alive."""
    started = Programs()
    yield started
    left = started.close()
    started.remove()
    assert left == []


@pytest.fixture
def site(apps: Programs) -> Path:
    """A directory with a file that no socket buffers hold."""
    directory = apps.directory / "site"
    directory.mkdir()
    (directory / "large").write_bytes(os.urandom(programs.HOLD_SIZE))
    return directory


def steer(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are started by this installation, and the Python among them is its own."""
    monkeypatch.setattr(programs, "SANRUN", environment.command("sanrun"))
    monkeypatch.setattr(programs, "SANCTL", environment.command("sanctl"))
    monkeypatch.setattr(servers, "PYTHON", str(environment.command("python3")))


def use(environment: Environment, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of an installation work, and programs meet on the SAN, with a policy without code and with a
    function."""
    sanrun, sanctl = environment.command("sanrun"), environment.command("sanctl")
    assert run([sanrun, "--version"]).startswith("sanrun ")
    for command in (sanrun, sanctl):
        assert "usage: " in run([command, "--help"])
    assert run([sanrun, "true"]) == ""
    assert run([sanrun, "sh", "-c", "exit 3"], status=3) == ""
    steer(environment, monkeypatch)
    meet(apps, apps.policy("plain", PLAIN), site)
    meet(apps, apps.policy("function", FUNCTION, DECIDE), site, helper=not environment.libpython)


def meet(apps: Programs, policy: Policy, site: Path, *, helper: bool = False) -> None:
    """curl and Python's HTTP server are on the SAN, and Python decides where the policy wants it: inside of curl,
    unless there is only the `helper`."""
    port = apps.port()
    server = servers.http_server(apps, policy, port, site)
    client = apps.start(["curl", "--silent", "--fail", f"http://{LOOPBACK}:{port}/large"], policy, pipes=True)
    looks.on_san(port, client, server)
    looks.engine(client, policy, python=helper)
    looks.engine(server, policy, python=True)
    assert client.finish() == (site / "large").read_bytes()
    assert ("apt install libpython3" in server.said()) is (helper and policy.asks), server.said()


def remove(environment: Environment) -> None:
    """Uninstalled, nothing of the installation is left."""
    environment.pip("uninstall", "--yes", "interposer")
    left = [name for name in environment.files() if "interposer" in name or "sanrun" in name or "sanctl" in name]
    assert left == []


def test_source_distribution(tree: Path, sdist: Path) -> None:
    """It holds all that a build reads, the licence and the README, and neither tests nor what was built."""
    run(["tar", "-xzf", sdist, "-C", sdist.parent])
    base = sdist.parent / sdist.name.removesuffix(".tar.gz")
    held = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    sources = {str(path.relative_to(tree)) for path in (tree / "interposer").rglob("*")
               if path.suffix in (".c", ".h", ".def", ".py", ".typed")}
    wanted = sources | {"shim.c", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    made = {"PKG-INFO", "setup.cfg"}
    assert held - {name for name in held if name.startswith("interposer.egg-info/")} == wanted | made


def test_wheel(tree: Path, wheel: Path) -> None:
    """P1: the wheel holds the package and its two libraries, no source of theirs, and neither links libpython."""
    modules = {str(path.relative_to(tree)) for path in (tree / "interposer").rglob("*.py")}
    built = {"interposer/libinterposer.so", "interposer/libinterposer-engine.so"}
    wanted = modules - BUILD_ONLY | built | {"interposer/py.typed", "interposer/native/reasons.def"}
    held = installing.names_in_wheel(wheel)
    base = "-".join(wheel.name.split("-")[:2])
    metadata = {f"{base}.dist-info/{name}" for name in
                ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")}
    assert held == wanted | metadata | {f"{base}.data/scripts/sanrun"}
    version, abi, platform = wheel.stem.split("-")[2:]
    debian = FOUND[0].version
    assert version == abi == f"cp{debian[0]}{debian[1]}"
    assert platform == f"linux_{os.uname().machine}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "extracted")
    assert installing.needed(wheel.parent / "extracted/interposer/libinterposer.so") == {"libc.so.6"}
    assert not installing.needed_python(wheel.parent / "extracted/interposer/libinterposer-engine.so")


def test_wheel_is_used(installed: Environment, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P8, O2: source distribution, wheel, installation, in Debian's Python."""
    use(installed, apps, site, monkeypatch)


def test_other_user(installed: Environment, place: Path) -> None:
    """X3: a user who may write nothing there uses the installation, on the SAN."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: not run")
    (place / "nobody").mkdir()
    os.chown(place / "nobody", NOBODY, NOBODY)
    code = (
        "import http.server, threading, subprocess, sys, json\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "url = f'http://127.0.0.1:{server.server_port}/'\n"
        "subprocess.run([sys.argv[1], 'curl', '--silent', '--fail', '--output', '/dev/null', url], check=True)\n"
        "stats = subprocess.run([sys.argv[2], 'stats', '--json'], check=True, capture_output=True).stdout\n"
        "print(json.dumps([each['connections'] for each in json.loads(stats)['processes']]))\n"
    )
    sanrun, sanctl = str(installed.command("sanrun")), str(installed.command("sanctl"))
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    words += [sanrun, DEBIAN, "-c", code, sanrun, sanctl]
    before = installed.files()
    own = str(place / "nobody")
    said = run(words, variables={"XDG_RUNTIME_DIR": own, "HOME": own}, cwd=place)
    assert json.loads(said.splitlines()[-1]) == [{"tcp": 0, "unix": 1}], said
    assert installed.files() == before


def test_no_libpython(
    installed: Environment, apps: Programs, site: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O4, P8: where the package with libpython is missing, sanrun says so, and a program that would load it asks the
    helper process."""
    if os.geteuid() != 0:
        pytest.skip("only root can hide libpython: not run")
    libraries = Path(installed.libpython).parent
    wrapper = place / "sanrun-without-libpython"
    wrapper.write_text(HIDE.format(libraries=libraries, sanrun=installed.command("sanrun")))
    wrapper.chmod(0o755)
    steer(installed, monkeypatch)
    monkeypatch.setattr(programs, "SANRUN", wrapper)
    meet(apps, apps.policy("plain", PLAIN), site, helper=True)
    meet(apps, apps.policy("function", FUNCTION, DECIDE), site, helper=True)


def test_path_with_a_space(place: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X3, P1, O2: `pip install .` from a place with a space into one, where LD_PRELOAD could not name the library."""
    environment = Environment(DEBIAN, place / "a place" / "environment")
    environment.pip("install", installing.copy_of_the_tree(place / "a place" / "the tree"))
    use(environment, apps, site, monkeypatch)
    remove(environment)


def test_editable(place: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P8, O2: an editable installation runs what stands in the tree."""
    tree = installing.copy_of_the_tree(place / "edited")
    environment = Environment(DEBIAN, place / "editable")
    environment.pip("install", "--editable", tree)
    use(environment, apps, site, monkeypatch)
    with (tree / "interposer/__init__.py").open("a") as file:
        file.write('__version__ = "12.34"\n')
    assert run([environment.command("sanrun"), "--version"]) == "sanrun 12.34\n"
    remove(environment)


def test_no_compiler(place: Path, maker: Environment) -> None:
    """Without gcc, or without the headers of Python, an installation says what is missing and what to do."""
    (place / "no-programs").mkdir()
    tree = installing.copy_of_the_tree(place / "no-compiler")
    words = ["install", "--no-build-isolation", "--no-deps", tree]
    said = maker.pip(*words, status=1, PATH=str(place / "no-programs"))
    assert "error: cannot run gcc" in said and "apt install gcc" in said, said
    if os.geteuid() == 0:
        headers = run([maker.command("python3"), "-c", "import sysconfig; print(sysconfig.get_path('include'))"])
        hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {headers.strip()} && exec "$@"', "sh"]
        said = run([*hidden, maker.command("python3"), "-m", "pip", *words], status=1)
        assert "error: " in said and "Python.h does not exist" in said and "python3-dev" in said, said


@others
def test_other_interpreters(
    interpreter: Interpreter, place: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P8, O2: `pip install .` in each other Python of this machine, and its uninstallation."""
    name = "-".join(map(str, interpreter.version))
    environment = Environment(interpreter.path, place / f"environment-{name}")
    environment.pip("install", installing.copy_of_the_tree(place / f"tree-{name}"))
    assert not installing.needed_python(environment.package() / "libinterposer-engine.so")
    use(environment, apps, site, monkeypatch)
    remove(environment)


@others
def test_other_interpreters_editable(
    interpreter: Interpreter, place: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P8, O2: the same, editable."""
    name = "editable-" + "-".join(map(str, interpreter.version))
    environment = Environment(interpreter.path, place / f"environment-{name}")
    environment.pip("install", "--editable", installing.copy_of_the_tree(place / f"tree-{name}"))
    use(environment, apps, site, monkeypatch)
    remove(environment)


@others
def test_other_interpreters_by_wheel(
    interpreter: Interpreter, place: Path, sdist: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P8, O2: source distribution, wheel, installation."""
    name = "wheel-" + "-".join(map(str, interpreter.version))
    environment = Environment(interpreter.path, place / f"environment-{name}")
    environment.pip("wheel", "--no-deps", "--wheel-dir", place / name, sdist)
    (wheel,) = (place / name).glob("*.whl")
    environment.pip("install", wheel)
    use(environment, apps, site, monkeypatch)
    remove(environment)


@pytest.mark.long
def test_oldest_requirements(place: Path, apps: Programs, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest versions that pyproject.toml allows do."""
    environment = Environment(DEBIAN, place / "oldest")
    oldest = [requirement.replace(">=", "==") for requirement in installing.BUILD_REQUIREMENTS]
    environment.pip("install", *oldest, *(name.replace(">=", "==") for name in installing.DEPENDENCIES))
    environment.pip("install", "--no-build-isolation", "--no-deps", installing.copy_of_the_tree(place / "oldest-tree"))
    use(environment, apps, site, monkeypatch)
    remove(environment)


def test_uninstalled(installed: Environment) -> None:
    """Nothing of an installation from a wheel is left. The last test, because it takes away what others use."""
    remove(installed)
