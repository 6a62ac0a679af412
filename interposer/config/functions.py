"""Users' policy functions, looked up without importing them: the file is there, parses, and defines the name."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator

from interposer.config.words import nearest


class BadFunction(ValueError):
    """The function cannot be used; `hint` says what to do, `file` and `line` are of a Python file to blame."""

    def __init__(self, message: str, hint: str, file: str = "", line: int = 0) -> None:
        super().__init__(message)
        self.hint = hint
        self.file = file
        self.line = line


def split_use(text: str) -> tuple[str, str]:
    """The module and the name in "python:module:name". Raises BadFunction."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isidentifier() for part in [*parts[1].split("."), parts[2]]):
        raise BadFunction(f'"{text}" does not name a function', 'write "python:MODULE:FUNCTION"')
    return parts[1], parts[2]


def find_function(module: str, name: str, folders: list[str]) -> str:
    """The file of `module` in the first folder that has it; it must define `name`. Raises BadFunction."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "interposer":
        raise BadFunction(f'the module name "{top}" is taken by Python itself', "rename the module")
    path = _find_module(module, folders)
    if path is None:
        near = nearest(top, _modules_in(folders))
        hint = f'did you mean "{near}"?' if near else "put it there, or name its directory in [defaults] python_path"
        raise BadFunction(f'the Python module "{module}" is not in {" or ".join(folders)}', hint)
    if os.stat(path).st_mode & 0o002:
        raise BadFunction(f'everybody may write "{path}"', f"chmod o-w {path}")
    tree = _parse(path)
    names = dict(_top_level_names(tree.body))
    if name not in names:
        if "*" in names:
            return path
        near = nearest(name, list(names))
        hint = f'did you mean "{near}"?' if near else "define it there, at the top level"
        raise BadFunction(f'"{path}" defines no function "{name}"', hint)
    _check_signature(path, name, names[name])
    return path


def _find_module(module: str, folders: list[str]) -> str | None:
    relative = module.replace(".", "/")
    for folder in folders:
        for candidate in (f"{folder}/{relative}/__init__.py", f"{folder}/{relative}.py"):
            if os.path.isfile(candidate):
                return candidate
    return None


def _modules_in(folders: list[str]) -> list[str]:
    found = []
    for folder in folders:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        found += [name.removesuffix(".py") for name in names if name.endswith(".py")]
    return found


def _parse(path: str) -> ast.Module:
    try:
        with open(path, "rb") as source:
            return ast.parse(source.read(), path)
    except OSError as error:
        raise BadFunction(f'"{path}" cannot be read: {error.strerror}', "make it readable") from None
    except SyntaxError as error:
        raise BadFunction(f"not Python: {error.msg}", "correct the line", path, error.lineno or 0) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadFunction(f"not Python: {error or 'nested too deeply'}", "correct the file", path) from None


def _top_level_names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name, statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        yield node.id, statement
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _top_level_names(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _top_level_names(handler.body)


def _check_signature(path: str, name: str, statement: ast.stmt) -> None:
    if isinstance(statement, ast.AsyncFunctionDef):
        raise BadFunction(f'"{name}" is async, and nothing would await it', "write a plain def", path, statement.lineno)
    if not isinstance(statement, ast.FunctionDef):
        return
    arguments = statement.args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    needed = positional - len(arguments.defaults)
    keywords = sum(default is None for default in arguments.kw_defaults)
    if needed > 1 or keywords or (positional == 0 and not arguments.vararg):
        message = f'"{name}" cannot be called with one argument, the request'
        raise BadFunction(message, f"write def {name}(request):", path, statement.lineno)
