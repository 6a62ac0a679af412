"""Where the policy engine finds Python: libpython, its home, and a search path. Asked only when a table is compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig

from interposer.launch.environment import PACKAGE_PARENT


def find() -> str:
    """The absolute path of the running Python's libpython, "" when there is none."""
    for path in candidates():
        if os.path.isfile(path):
            return os.path.realpath(path)
    return _from_loader_cache(_names())


def candidates() -> list[str]:
    """Where it may be, the likeliest place first; the loader's cache can name others."""
    paths = [os.path.join(place, name) for place in _places() for name in _names()]
    return [path for path in dict.fromkeys(paths) if os.path.isabs(path)]


def _names() -> list[str]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}{sys.abiflags}"
    names = [f"libpython{version}.so.1.0", f"libpython{version}.so"]
    for variable in ("INSTSONAME", "LDLIBRARY"):
        name = sysconfig.get_config_var(variable)
        if isinstance(name, str) and ".so" in name and name not in names:
            names.insert(0, name)
    return names


def _places() -> list[str]:
    base = os.path.join(sys.base_prefix, "lib")
    library = str(sysconfig.get_config_var("LIBDIR") or base)
    multiarch = str(sysconfig.get_config_var("MULTIARCH") or "")
    return [base, os.path.join(base, multiarch), library, os.path.join(library, multiarch)]


def _from_loader_cache(names: list[str]) -> str:
    try:
        listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and name.split(" ", 1)[0] in names and os.path.isfile(path):
            return os.path.realpath(path)
    return ""


def python_home() -> str:
    """The prefix that holds lib/python3.X."""
    return sys.base_prefix


def search_path() -> list[str]:
    """sys.path of the engine: the standard library, this package, and cffi's runtime."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    dynload = os.path.join(sys.base_exec_prefix, sys.platlibdir, version, "lib-dynload")
    result = [sysconfig.get_path("stdlib"), PACKAGE_PARENT]
    cffi = importlib.util.find_spec("_cffi_backend")
    if cffi is not None and cffi.origin:
        result.append(os.path.dirname(os.path.abspath(cffi.origin)))
    result.append(dynload)  # last: the engine itself needs nothing from there, and is spared reading the directory
    return list(dict.fromkeys(result))
