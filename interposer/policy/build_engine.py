"""Builds the embedding module: the cffi glue between engine.c and `interposer.policy.entry`, and the engine's own
modules, compiled into it: what need not be looked for and read makes the start 1.5 ms shorter.

The module does not link libpython: engine.c loads the host's libpython first, globally, and that resolves its symbols.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import importlib.util
import io
import marshal
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import cffi

from interposer.policy import reasons

POLICY = Path(__file__).resolve().parent
PACKAGE = POLICY.parent
NATIVE = PACKAGE / "native"
MODULE = "_interposer"

# Of engine.h; the C compiler checks the copy.
STRUCTURES = """
struct process_facts { const char *exe, *name, *arguments, *environment, *cgroups; uint32_t user; };
void interposer_log(const char *line);
void interposer_keep_sigint(int begin);
"""

UPCALLS = """
int interposer_configure(const void *table, uint32_t size, const struct process_facts *facts);
int interposer_prepare(uint32_t function);
"""

# Compiled at every start, so short. entry.py registers the up-calls.
INIT = "import interposer.policy.entry"

OURS = {
    "interposer": PACKAGE / "__init__.py",
    "interposer.providers": PACKAGE / "providers" / "__init__.py",
    "interposer.policy": POLICY / "__init__.py",
    **{f"interposer.policy.{name}": POLICY / f"{name}.py" for name in ("entry", "engine", "table")},
    **{f"interposer.policy.{name}": POLICY / f"{name}.py" for name in ("functions", "guard", "options", "request")},
}
PYTHONS = ("encodings", "encodings.aliases", "encodings.utf_8", "struct")
"""What of the standard library the start would read from files."""


def sources() -> list[Path]:
    """The files of this package that end up in the module."""
    return [Path(__file__).resolve(), POLICY / "embed.c", *OURS.values(), *NATIVE.glob("*.h"), NATIVE / "reasons.def"]


def frozen_modules() -> dict[str, bytes]:
    """The name of each module, and its code as the interpreter wants it."""
    found = {}
    for name in PYTHONS:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        found[name] = _compiled(name, Path(spec.origin).read_text(encoding="utf-8"))
    for name, path in OURS.items():
        found[name] = _compiled(name, path.read_text(encoding="utf-8"))
    # In a program only the numbers are wanted, and no file to read them from.
    numbers = "".join(f"{reason.symbol} = {reason.number}\n" for reason in reasons.BY_NUMBER.values())
    found["interposer.policy.reasons"] = _compiled("interposer.policy.reasons", numbers)
    return found


def _compiled(name: str, text: str) -> bytes:
    """Without docstrings, and without `from __future__`, which is a file too."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    flags = __future__.annotations.compiler_flag
    return marshal.dumps(compile(tree, f"<frozen {name}>", "exec", flags=flags, dont_inherit=True, optimize=2))


def _header(modules: dict[str, bytes]) -> str:
    text, rows = "", ""
    for number, (name, code) in enumerate(modules.items()):
        package = int(any(other.startswith(f"{name}.") for other in modules))
        text += f"static const unsigned char code_{number}[] = {{{','.join(map(str, code))}}};\n"
        rows += f'    {{.name = "{name}", .code = code_{number}, .size = {len(code)}, .is_package = {package}}},\n'
    return f"{text}static const struct _frozen frozen_modules[] = {{\n{rows}    {{.name = NULL}},\n}};\n"


def build(output_path: str) -> None:
    """Compiles the module to `output_path`, for the Python that runs this.

    Raises subprocess.CalledProcessError with the compiler's words in its `stderr`.
    """
    ffi = cffi.FFI()
    ffi.cdef(STRUCTURES)
    ffi.embedding_api(UPCALLS)
    ffi.embedding_init_code(INIT)
    ffi.set_source(MODULE, '#include "embed.c"')
    output = Path(output_path)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "engine_module.c"
        with contextlib.redirect_stdout(io.StringIO()):  # cffi announces the file
            ffi.emit_c_code(str(source))
        (Path(scratch) / "frozen_modules.h").write_text(_header(frozen_modules()))
        fresh = output.with_suffix(".new")
        command = ["gcc", "-std=gnu11", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-shared", "-pthread"]
        command += [f"-I{path}" for path in (sysconfig.get_path("include"), NATIVE, POLICY, scratch)]
        command += [f'-DEXT_SUFFIX="{sysconfig.get_config_var("EXT_SUFFIX")}"']
        command += ["-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,nodelete"]
        subprocess.run([*command, "-o", str(fresh), str(source)], check=True, capture_output=True, text=True)
        fresh.replace(output)
