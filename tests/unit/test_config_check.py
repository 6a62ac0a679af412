# ruff: noqa: E501
"""What is wrong with a policy as a whole: rules that can never match, overlaps, functions that are not there."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from interposer import config
from interposer.config import check
from interposer.config.model import LoadedPolicy
from interposer.policy.engine import glob_matches


def load(folder: Path, body: str, *, name: str = "policy.toml") -> LoadedPolicy:
    path = folder / name
    path.write_text("version = 1\n" + body)
    path.chmod(0o644)
    return config.load(str(path), {})


def rules(*lines: str) -> str:
    """Each rule on one line of the file, from line 2 on."""
    return "rule = [" + ",".join("{" + line + "}" for line in lines).replace("},{", "},\n{") + "]\n"


def errors(folder: Path, body: str) -> list[str]:
    with pytest.raises(config.PolicyError) as caught:
        load(folder, body)
    return [str(problem).removeprefix(f"{folder}/policy.toml:") for problem in caught.value.problems]


def warnings(folder: Path, body: str) -> list[str]:
    return [str(problem).removeprefix(f"{folder}/policy.toml:") for problem in load(folder, body).warnings]


ALL_TCP = 'use = "tcp"'
SHADOWED = [
    (rules(ALL_TCP, 'local = "127.0.0.1:80"'), "3: the rule can never match: the rule at line 2 already decides"),
    (rules('local = "10.0.0.0/8"', 'local = "10.1.0.0/16:80"'), "3: the rule can never match: the rule at line 2"),
    (rules('local = "*:80-90"', 'local = "10.0.0.1:85"'), "3: the rule can never match"),
    (rules('role = "connect", remote = "10.0.0.0/8"', 'role = "connect", remote = "10.1.2.3"'), "3: the rule can never"),
    # Only together do the earlier rules cover it.
    (rules('local = "*:1-100"', 'local = "*:101-200"', 'local = "*:50-150"'), "4: the rule can never match: the rules at "
     "line 2 and line 3 already decide all that it matches; move it up, or remove it"),
    (rules('local = "10.0.0.0/9"', 'local = "10.128.0.0/9"', 'local = "10.0.0.0/8"'), "4: the rule can never match"),
    (rules('role = "listen", local = "*:80"', 'role = "connect", local = "*:80"', 'role = "both", local = "*:80"'),
     "4: the rule can never match"),
    (rules('local = "0.0.0.0/0"', 'local = "[::]/0"', 'local = "*:80"'), "4: the rule can never match"),
    # A list is covered when each of its elements is.
    (rules('local = ["10.0.0.1", "10.0.0.2"]', 'local = ["10.0.0.2:80", "10.0.0.1:80"]'), "3: the rule can never match"),
    # Families that cannot meet.
    (rules('role = "connect", local = "10.0.0.1", remote = "[::1]"'), "2: the rule can never match: local and remote are of "
     "different families"),
    # A v4-mapped address is an IPv4 address.
    (rules('local = "0.0.0.0/0"', 'local = "[::ffff:10.0.0.1]:80"'), "3: the rule can never match"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), SHADOWED, ids=range(len(SHADOWED)))
def test_shadowed_rule(tmp_path: Path, body: str, message: str) -> None:
    """P4: A rule that can never match is an error that names the rules before it."""
    (found,) = errors(tmp_path, body)
    assert found.startswith(message), found


REACHABLE = [
    # The exception before the rule.
    rules('local = "10.1.0.0/16", use = "tcp"', 'local = "10.0.0.0/8"'),
    rules('local = "10.0.0.0/8"', 'role = "connect"'),
    rules('role = "listen", use = "tcp"', 'role = "both"'),
    rules('local = "0.0.0.0/0", use = "tcp"', 'local = "[::]/0"'),
    rules('local = "*:80"', 'local = "*:81"'),
    rules('local = "*:1-65535", use = "tcp"', 'role = "connect", remote = "10.0.0.1"'),
    rules('role = "connect", remote = "10.0.0.1", local = "10.0.0.2"', 'role = "connect", remote = "10.0.0.1"'),
    rules('local = "10.0.0.1"', 'local = ["10.0.0.1", "10.0.0.2"]'),
]


@pytest.mark.parametrize("body", REACHABLE, ids=range(len(REACHABLE)))
def test_reachable_rule(tmp_path: Path, body: str) -> None:
    """P4: A rule that some request reaches is no error."""
    load(tmp_path, body)


def test_partial_overlap(tmp_path: Path) -> None:
    """P4: Rules that overlap without one holding the other, with different outcomes, are a warning."""
    body = rules('local = "*:80-90", use = "tcp"', 'local = "*:85-95"')
    assert warnings(tmp_path, body) == [
        "3: overlaps the rule at line 2, which decides otherwise and wins where both match; make one narrower if that is not "
        "meant"
    ]
    # The same outcome is no news, nor is the exception before the rule.
    assert warnings(tmp_path, rules('local = "*:80-90"', 'local = "*:85-95"')) == []
    assert warnings(tmp_path, rules('local = "*:85", use = "tcp"', 'local = "*:80-90"')) == []
    assert warnings(tmp_path, rules('local = "*:80-90", otherwise = "error"', 'local = "*:85-95"'))


def section(condition: str, *lines: str) -> str:
    return f"[[process]]\n{condition}\n" + "".join(f"[[process.rule]]\n{line}\n" for line in lines)


def test_shadowing_across_sections(tmp_path: Path) -> None:
    """P3, P4: A section hides rules of a later one only if it applies wherever that does."""
    general, special = 'exe = "a"', 'exe = "a"\nuser = 0'
    (found,) = errors(tmp_path, section(general, ALL_TCP) + section(special, 'local = "*:80"'))
    assert found.startswith("9: the rule can never match: the rule at line 4")
    load(tmp_path, section(special, ALL_TCP) + section(general, 'local = "*:80"'))
    load(tmp_path, section('exe = "b"', ALL_TCP) + section(general, 'local = "*:80"') + '[[rule]]\nuse = "unix"\n')


COVERED = [
    ('exe = "redis-*"', 'exe = "redis-server"'),
    ('exe = "*"', 'user = 0'),
    ('name = "**"', 'exe = "a"'),
    ('exe = "nginx"', 'exe = "/usr/*/nginx"'),
    ('exe = "/usr/*"', 'exe = "/usr/*/nginx"'),
    ('arg = "--port=*"', 'arg = ["-v", "--port=6379"]'),
    ('env = "REGION"', 'env = "REGION=north"'),
    ('env = "REGION=n*"', 'env = "REGION=no?th"'),
    ('user = 0', 'user = "root"'),
    ('name = "?*"', 'name = "?a*"'),
]
NOT_COVERED = [
    ('exe = "redis-server"', 'exe = "redis-*"'),
    ('exe = "redis-?"', 'exe = "redis-*"'),
    ('exe = "/usr/bin/nginx"', 'exe = "nginx"'),
    ('exe = "nginx"', 'exe = "/usr/*"'),
    ('exe = "n*"', 'exe = "/usr/n*"'),
    ('exe = "n?"', 'exe = "/usr/n?"'),
    ('env = "REGION=*"', 'env = "REGION"'),
    ('env = "REGION"', 'env = "REGIONS"'),
    ('cgroup = "*"', 'user = 0'),
    ('arg = "*"', 'exe = "a"'),
    ('name = "a"', 'exe = "a"'),
    ('user = 0', 'user = 1'),
]


@pytest.mark.parametrize(("general", "special"), COVERED + NOT_COVERED)
def test_one_section_applies_wherever_another_does(tmp_path: Path, general: str, special: str) -> None:
    """P3, P4: Globs are compared as globs, so that a rule that a wider section hides is found."""
    body = section(general, ALL_TCP) + section(special, 'local = "*:80"')
    if (general, special) in COVERED:
        (found,) = errors(tmp_path, body)
        assert found.startswith("8: the rule can never match: the rule at line 4"), found
    else:
        load(tmp_path, body)


def test_section_that_applies_to_all_hides_global_rules(tmp_path: Path) -> None:
    """P4: So does not one that may not apply."""
    (found,) = errors(tmp_path, section('exe = "*"', ALL_TCP) + '[[rule]]\nlocal = "*:80"\n')
    assert found.startswith("6: the rule can never match: the rule at line 4")
    load(tmp_path, section('cgroup = "*"', ALL_TCP) + '[[rule]]\nlocal = "*:80"\n')


def test_covering_globs_match_all_that_the_covered_match() -> None:
    """P4: No reachable rule is called shadowed: 20,000 pairs of random globs against all short texts."""
    random_ = random.Random(3)
    texts = ["".join(letters) for length in range(6) for letters in itertools.product("ab", repeat=length)]
    covered = 0
    for _ in range(20_000):
        wide, narrow = ("".join(random_.choices("ab*?", k=random_.randrange(5))) for _ in range(2))
        if check._glob_covers(wide, narrow):
            covered += 1
            for text in texts:
                matches = glob_matches(narrow.encode(), text.encode())
                assert not matches or glob_matches(wide.encode(), text.encode()), (wide, narrow, text)
    assert covered > 2_000


def test_engine_that_is_never_used(tmp_path: Path) -> None:
    """P4, P8: Of several sections that apply the first one's engine holds; another's is a warning."""
    body = '[[process]]\nexe = "*"\nengine = "off"\n[[process]]\nexe = "a"\nengine = "helper"\n'
    assert warnings(tmp_path, body) == [
        "5: this engine is never used: the [[process]] at line 2 sets one for all that this applies to; move the section up, "
        "or remove its engine"
    ]
    swapped = '[[process]]\nexe = "a"\nengine = "helper"\n[[process]]\nexe = "*"\nengine = "off"\n'
    assert warnings(tmp_path, swapped) == []


def test_thousand_sections_are_checked_quickly(tmp_path: Path) -> None:
    """P4: The check of many sections ends too."""
    many = "".join(section(f'exe = "program-{n}-*"', ALL_TCP) for n in range(500))
    begin = time.process_time()
    load(tmp_path, many)
    assert time.process_time() - begin < 5


def test_thousand_rules_are_checked_quickly(tmp_path: Path) -> None:
    """P4: The check ends, and finds the one shadowed rule among many."""
    many = "".join(f'[[rule]]\nlocal = "10.{n // 250}.{n % 250}.1:{n + 1}"\nuse = "tcp"\n' for n in range(1000))
    (found,) = errors(tmp_path, many + '[[rule]]\nlocal = "10.1.1.1:252"\n')
    assert "line 755" in found


FUNCTION = '[[rule]]\nuse = "python:{module}:{name}"\n'


def test_functions_that_exist(tmp_path: Path) -> None:
    """P5: A def, an assignment, an import, a package and a dotted module are found; nothing is imported."""
    (tmp_path / "m.py").write_text(
        "import os\nfrom x import y as z\nraise SystemExit('imported')\n"
        "try:\n    import fast as decide2\nexcept ImportError:\n    decide2 = None\n"
        "def decide(request, more=1): ...\na = b = lambda request: 'tcp'\nc: object = a\nclass K: ...\n"
    )
    (tmp_path / "package" / "sub").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("from .sub import *\n")
    (tmp_path / "package" / "sub" / "leaf.py").write_text("def f(*a): ...\n")
    for module, name in (("m", "decide"), ("m", "z"), ("m", "b"), ("m", "c"), ("m", "decide2"), ("m", "K"),
                         ("package", "anything"), ("package.sub.leaf", "f")):  # fmt: skip
        loaded = load(tmp_path, FUNCTION.format(module=module, name=name))
        assert loaded.policy.rules[0].function is not None


BAD_FUNCTIONS = [
    ("nope", "f", '3: use: the Python module "nope" is not in '),
    ("goood", "f", 'did you mean "good"?'),
    ("good", "decid", 'defines no function "decid"; did you mean "decide"?'),
    ("good", "local", 'defines no function "local"; define it there, at the top level'),
    ("json", "loads", '3: use: the module name "json" is taken by Python itself; rename the module'),
    ("good", "no_argument", 'good.py:4: "no_argument" cannot be called with one argument'),
    ("good", "two", 'good.py:5: "two" cannot be called with one argument'),
    ("good", "waits", 'good.py:6: "waits" is async'),
    ("broken", "f", "broken.py:2: not Python: "),
]


@pytest.mark.parametrize(("module", "name", "message"), BAD_FUNCTIONS, ids=range(len(BAD_FUNCTIONS)))
def test_function_that_cannot_be_used(tmp_path: Path, module: str, name: str, message: str) -> None:
    """P4, P5: A missing module or function, and one that cannot be called, stop the launcher with place and remedy."""
    (tmp_path / "good.py").write_text(
        "def decide(request): ...\nif True:\n    def outer(r): local = 1\ndef no_argument(): ...\ndef two(a, b): ...\n"
        "async def waits(request): ...\n"
    )
    (tmp_path / "broken.py").write_text("def f(request):\n  return (\n")
    (found,) = errors(tmp_path, FUNCTION.format(module=module, name=name))
    assert message in found, found


def test_function_that_everybody_may_write(tmp_path: Path) -> None:
    """X3, P5: Code that anybody may change does not run in everybody's programs."""
    (tmp_path / "m.py").write_text("def f(request): ...\n")
    (tmp_path / "m.py").chmod(0o646)
    (found,) = errors(tmp_path, FUNCTION.format(module="m", name="f"))
    assert f'3: use: everybody may write "{tmp_path}/m.py"; chmod o-w' in found


def test_python_path(tmp_path: Path) -> None:
    """P5: A module beside the policy file comes before those in python_path."""
    lib = tmp_path / "lib"
    lib.mkdir()
    (lib / "m.py").write_text("def decide(request): ...\n")
    body = f'[defaults]\npython_path = ["{lib}"]\n' + FUNCTION.format(module="m", name="decide")
    assert load(tmp_path, body).modules == (str(lib / "m.py"),)
    (tmp_path / "m.py").write_text("def decide(request): ...\n")
    assert load(tmp_path, body).modules == (str(tmp_path / "m.py"),)


def test_modules_that_hide_each_other(tmp_path: Path) -> None:
    """P5: One name for two modules is an error: one interpreter can load only one."""
    drop_ins = tmp_path / "policy.d"
    drop_ins.mkdir()
    for folder in (tmp_path, drop_ins):
        (folder / "m.py").write_text("def decide(request): ...\n")
    (drop_ins / "x.toml").write_text('version = 1\n[[rule]]\nrole = "listen"\nuse = "python:m:decide"\n')
    (drop_ins / "x.toml").chmod(0o644)
    (found,) = errors(tmp_path, '[[rule]]\nrole = "connect"\nuse = "python:m:decide"\n')
    assert found.startswith(f'{drop_ins}/x.toml:4: the module "m" is {drop_ins}/m.py here, but the engine would load')
