"""The environment of an interposed program, and the cache of compiled tables."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from interposer.launch import environment, runtime, table_cache

LIBRARY = "/opt/interposer/libinterposer.so"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", LIBRARY),
        ("/a.so", f"{LIBRARY}:/a.so"),
        ("/a.so:/b.so", f"{LIBRARY}:/a.so:/b.so"),
        ("/a.so /b.so", f"{LIBRARY}:/a.so:/b.so"),
        (LIBRARY, LIBRARY),
        (f"/a.so:{LIBRARY}", f"{LIBRARY}:/a.so"),
        ("/other/libinterposer.so:/a.so", f"{LIBRARY}:/a.so"),
        ("libfaketime.so.1", f"{LIBRARY}:libfaketime.so.1"),
    ],
)
def test_preload_is_first_once_and_drops_nobody(before: str, after: str) -> None:
    """O4, X8: other preloads stay, in order; ours stands there once, however often sanrun is nested."""
    assert environment.prepend(before, LIBRARY) == after


def test_additions_are_all_that_changes() -> None:
    """X7, X8: three variables, and one more under --require."""
    given = {"PATH": "/bin", "LD_PRELOAD": "/a.so"}
    assert environment.additions(given, table="/t", log="", library=LIBRARY) == {
        "LD_PRELOAD": f"{LIBRARY}:/a.so",
        "INTERPOSER_TABLE": "/t",
    }
    assert environment.additions(given, table="/t", log="/l", library=LIBRARY)["INTERPOSER_LOG"] == "/l"
    strict = environment.additions(given, table="/t", log="", library=LIBRARY, require=True)
    assert strict["INTERPOSER_REQUIRE"] == "1" and len(strict) == 3


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF", b"not a library" * 10])
def test_missing_or_broken_library(tmp_path: Path, content: bytes | None) -> None:
    """O4: said before the start, with what to do."""
    path = tmp_path / "libinterposer.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(environment.Unusable, match="tools/build"):
        environment.library_head(str(path))


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    run = tmp_path / "run"
    run.mkdir()
    return {"XDG_RUNTIME_DIR": str(run), "XDG_CONFIG_HOME": str(tmp_path / "config"), "HOME": str(tmp_path)}


@pytest.mark.parametrize("name", ["with space", "with:colon"])
def test_library_path_that_the_loader_would_split(environ: dict[str, str], tmp_path: Path, name: str) -> None:
    """O4, X3, X5: the loader would look for the parts. It gets a link in the run-time directory, which is put right,
    and none where another user could put one in its place."""
    library = tmp_path / name / "libinterposer.so"
    library.parent.mkdir()
    library.write_bytes(b"")
    link = environment.loadable(environ, make=False, library=str(library))
    assert not os.path.lexists(link)
    assert environment.loadable(environ, library=str(library)) == link
    assert " " not in link and ":" not in link and os.path.samefile(link, library)
    os.unlink(link)
    os.symlink("elsewhere", link)
    assert environment.loadable(environ, library=str(library)) == link
    assert os.path.samefile(link, library)
    assert environment.loadable(environ, library=LIBRARY) == LIBRARY
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(environment.Unusable, match="space or a colon"):
        environment.loadable({"XDG_RUNTIME_DIR": str(shared)}, library=str(library))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text("version = 1\n")
    return path


def fetch(policy: Path, environ: dict[str, str], *providers: str, require: bool = False) -> table_cache.Cached:
    return table_cache.fetch(table_cache.choose(str(policy), environ, providers, require), environ)


def made(cached: table_cache.Cached) -> int:
    return os.stat(cached.path).st_ino


def test_unchanged_policy_is_compiled_once(policy: Path, environ: dict[str, str]) -> None:
    """P1: the second start takes the first one's table."""
    first = made(fetch(policy, environ))
    assert made(fetch(policy, environ)) == first


def test_changed_policy_replaces_its_table(policy: Path, environ: dict[str, str]) -> None:
    """P6: under the same name, so that running programs find it."""
    before = fetch(policy, environ)
    policy.write_text('version = 1\n[defaults]\notherwise = "error"\n')
    after = fetch(policy, environ)
    assert after.path == before.path
    assert after.data != before.data


def test_drop_in_counts_as_a_change(policy: Path, environ: dict[str, str]) -> None:
    """P4, P6: policy.d beside the file is part of the policy."""
    before = fetch(policy, environ)
    (policy.parent / "policy.d").mkdir()
    (policy.parent / "policy.d" / "more.toml").write_text('version = 1\n[[rule]]\nrole = "connect"\nuse = "tcp"\n')
    after = fetch(policy, environ)
    assert after.path == before.path
    assert after.data != before.data


def test_changed_function_counts_as_a_change(policy: Path, environ: dict[str, str]) -> None:
    """P5, P6: the modules that a policy names are part of it; one that vanished is an error again."""
    policy.write_text('version = 1\n[[rule]]\nrole = "both"\nuse = "python:site_policy:decide"\n')
    module = policy.parent / "site_policy.py"
    module.write_text("def decide(request):\n    return 'tcp'\n")
    first = made(fetch(policy, environ))
    assert made(fetch(policy, environ)) == first
    module.write_text("def decide(request):\n    return 'unix' # now\n")
    assert made(fetch(policy, environ)) != first
    module.unlink()
    with pytest.raises(table_cache.PolicyError):
        fetch(policy, environ)


@pytest.mark.parametrize("name", ["ENGINE", "PASSWD"])
def test_what_else_a_table_names_counts_as_a_change(
    policy: Path, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """P3, O4: users are looked up when a policy is compiled, and a missing engine is told at every start."""
    file = tmp_path / "file"
    file.write_text("1")
    monkeypatch.setattr(table_cache, name, str(file))
    policy.write_text('version = 1\n[defaults]\nengine = "startup"\n')
    first = made(fetch(policy, environ))
    assert made(fetch(policy, environ)) == first
    file.write_text("more")
    assert made(fetch(policy, environ)) != first
    file.unlink()
    if name == "ENGINE":
        with pytest.raises(table_cache.NoEngine):
            fetch(policy, environ)


def test_options_have_tables_of_their_own(policy: Path, environ: dict[str, str]) -> None:
    """X7: --require and --provider of one program do not reach another's table."""
    tables = [fetch(policy, environ), fetch(policy, environ, "tcp"), fetch(policy, environ, require=True)]
    assert len({table.path for table in tables}) == 3


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:130] + b"\xff" + data[131:]]
)
def test_damaged_table_is_compiled_again(policy: Path, environ: dict[str, str], damage: object) -> None:
    """X3: a corrupt run-time file is not used."""
    good = fetch(policy, environ)
    Path(good.path).write_bytes(damage(good.data))  # type: ignore[operator]
    fetch(policy, environ)
    assert len(Path(good.path).read_bytes()) == len(good.data)
    assert runtime.read(good.path) is not None
    assert table_cache.layout.sound(Path(good.path).read_bytes())


def test_helper_is_wanted_only_where_code_can_run(policy: Path, environ: dict[str, str]) -> None:
    """P8: a policy that can never ask a function starts no helper."""
    (policy.parent / "site_policy.py").write_text("def decide(request):\n    return 'tcp'\n")
    rule = '[[rule]]\nrole = "both"\nuse = "python:site_policy:decide"\n'
    off = '[defaults]\nengine = "off"\n'
    section = '[[process]]\nexe = "a"\nengine = "{}"\n'
    for body, wanted in {
        "": False,
        '[defaults]\nengine = "helper"\n': False,
        section.format("startup"): False,
        '[defaults]\nengine = "reactive"\n': True,
        section.format("reactive"): True,
        rule: True,
        off + rule: False,
        off + section.format("off") + rule: False,
        off + section.format("helper") + rule: True,
    }.items():
        policy.write_text("version = 1\n" + body)
        assert table_cache.wants_helper(fetch(policy, environ).data) == wanted, body
    policy.write_text("version = 1\n" + rule)
    assert not table_cache.wants_helper(fetch(policy, environ, "tcp").data), "no function is asked"


@pytest.mark.parametrize("name", ["policy.toml", "a b\n%0A%.toml"])
def test_table_knows_what_it_was_made_of(tmp_path: Path, environ: dict[str, str], name: str) -> None:
    """P6: enough to make it anew; a table of another installation, or a damaged one, is nobody's."""
    path = tmp_path / name
    path.write_text("version = 1\n")
    cached = fetch(path, environ, "unix", require=True)
    assert table_cache.origin(cached.data) == (str(path), True, ["unix"], True)
    assert table_cache.origin(fetch(path, environ).data) == (str(path), True, [], False)
    assert table_cache.origin(cached.data[:-1]) is None
    assert table_cache.origin(b"") is None
    other = cached.data.replace(table_cache.ENGINE.encode(), b"/" + b"x" * (len(table_cache.ENGINE) - 1))
    size = table_cache.layout.HEADER.size
    other = other[:16] + zlib.crc32(other[size:]).to_bytes(4, sys.byteorder) + other[20:]
    assert table_cache.layout.sound(other) and table_cache.origin(other) is None


def test_found_and_named_policies_do_not_take_turns(tmp_path: Path, environ: dict[str, str]) -> None:
    """P1: a policy has one table where it was found and one where it was named, and neither is compiled in turns."""
    path = tmp_path / "config" / "interposer" / "policy.toml"
    path.parent.mkdir(parents=True)
    path.write_text("version = 1\n")
    found = table_cache.fetch(table_cache.choose(None, environ, [], False), environ)
    assert table_cache.origin(found.data) == (str(path), False, [], False)
    assert fetch(path, environ).path != found.path
    assert made(table_cache.fetch(table_cache.choose(None, environ, [], False), environ)) == made(found)


def test_cached_start_imports_little(policy: Path, environ: dict[str, str]) -> None:
    """P1: 25 ms are the budget of a start, and each of these modules takes several."""
    fetch(policy, environ)
    program = (
        "import sys; from interposer.cli import sanrun; from interposer.launch import table_cache as t\n"
        "import os; t.fetch(t.choose(sys.argv[1], os.environ, [], False), os.environ)\n"
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program, str(policy)],
        env=environ, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    loaded = set(result.stdout.split())
    expensive = {"argparse", "collections", "dataclasses", "enum", "functools", "hashlib", "inspect", "json"}
    expensive |= {"re", "signal", "subprocess", "tomllib", "typing", "cffi", "psutil", "pyroute2"}
    assert loaded & expensive == set()
