"""The compiled policy as Python sees it: the constants and structures of native/table.h, and a reader.

Imported inside other people's processes, so it stays with `struct`. Held to the C header by
tests/unit/test_layout.py.
"""

from __future__ import annotations

import struct

MAGIC = b"SANTABLE"
VERSION = 1
MAX_SIZE = 16 << 20

ROLE_LISTEN, ROLE_CONNECT = 1, 2
FAMILY_V4, FAMILY_V6 = 1, 2
ACTION_TCP, ACTION_SAN, ACTION_ASK = 1, 2, 3
OTHERWISE_INHERIT, OTHERWISE_TCP, OTHERWISE_ERROR = 0, 1, 2
ENGINE_INHERIT, ENGINE_EMBEDDED, ENGINE_STARTUP, ENGINE_HELPER, ENGINE_REACTIVE, ENGINE_OFF = range(6)
FIREWALL_INHERIT, FIREWALL_HEED, FIREWALL_IGNORE = range(3)
PREDICATE_EXE, PREDICATE_NAME, PREDICATE_ARG, PREDICATE_USER, PREDICATE_CGROUP, PREDICATE_ENV = range(1, 7)
PROVIDER_NONE, PROVIDER_UNIX = 0, 1
PROVIDERS_MAX = 4
RULE_DEFAULT = 0xFFFFFFFF
FUNCTION_NONE = 0xFFFFFFFF

# struct table_header: magic; version, size, crc, flags; generation; offset and count of sections, predicates, rules
# and functions; strings, strings_size; search_path, nsearch_path; libpython, python_home, engine_module, helper, key,
# reserved.
HEADER = struct.Struct("=8s4IQ18I")
# predicate, npredicates, rule, nrules, file, line, engine, otherwise, providers, firewall, reserved
SECTION = struct.Struct("=6I2B4sBx")
# kind, text, number, reserved
PREDICATE = struct.Struct("=4I")
# role, action, otherwise, reserved, providers, local_families, local_prefix, remote_families, remote_prefix,
# local ports, remote ports, local, remote, function, file, line
RULE = struct.Struct("=4B4s4B4H16s16s3I")
# module, name, timeout_ms, reserved, file, line
FUNCTION = struct.Struct("=6I")

V4_PREFIX = bytes(10) + b"\xff\xff"
WILDCARD_V4 = V4_PREFIX + bytes(4)
WILDCARD_V6 = bytes(16)


class TableError(ValueError):
    """The bytes are not a table of this version."""


class Section:
    """A [[process]] section or, the last one of a table, the global scope."""

    __slots__ = ("engine", "file", "firewall", "first_rule", "line", "nrules", "otherwise", "predicates", "providers")

    def __init__(
        self,
        predicates: tuple[tuple[int, bytes, int], ...],
        first_rule: int,
        nrules: int,
        file: str,
        line: int,
        engine: int,
        otherwise: int,
        providers: tuple[int, ...],
        firewall: int,
    ) -> None:
        self.predicates = predicates
        self.first_rule = first_rule
        self.nrules = nrules
        self.file = file
        self.line = line
        self.engine = engine
        self.otherwise = otherwise
        self.providers = providers
        self.firewall = firewall


class Rule:
    """One line of the compiled policy. Addresses are integers of 128 bits, masks likewise."""

    __slots__ = (
        "action",
        "file",
        "function",
        "line",
        "local",
        "local_families",
        "local_first",
        "local_last",
        "local_mask",
        "otherwise",
        "providers",
        "remote",
        "remote_families",
        "remote_first",
        "remote_last",
        "remote_mask",
        "role",
    )

    def __init__(self, fields: tuple[int, ...], providers: bytes, local: bytes, remote: bytes, file: str) -> None:
        (self.role, self.action, self.otherwise, self.local_families, local_prefix) = fields[:5]
        (self.remote_families, remote_prefix) = fields[5:7]
        (self.local_first, self.local_last, self.remote_first, self.remote_last) = fields[7:11]
        (self.function, self.line) = fields[11:13]
        self.providers = provider_list(providers)
        self.local_mask = prefix_mask(local_prefix)
        self.remote_mask = prefix_mask(remote_prefix)
        self.local = int.from_bytes(local, "big") & self.local_mask
        self.remote = int.from_bytes(remote, "big") & self.remote_mask
        self.file = file


class Function:
    """A user's function that some rule asks."""

    __slots__ = ("file", "line", "module", "name", "timeout_ms")

    def __init__(self, module: str, name: str, timeout_ms: int, file: str, line: int) -> None:
        self.module = module
        self.name = name
        self.timeout_ms = timeout_ms
        self.file = file
        self.line = line


class Table:
    """The whole table, unpacked. `data` is what native/flows.c has validated, so only the frame is checked here.

    Raises TableError where the bytes are not a table of this version.
    """

    __slots__ = (
        "engine_module",
        "functions",
        "generation",
        "helper",
        "key",
        "libpython",
        "python_home",
        "rules",
        "search_path",
        "sections",
    )

    def __init__(self, data: bytes) -> None:
        try:
            self._unpack(data)
        except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
            raise TableError(f"not a compiled policy: {error}") from None

    def _unpack(self, data: bytes) -> None:
        (
            magic, version, size, _crc, _flags, self.generation,
            sections, nsections, predicates, npredicates, rules, nrules, functions, nfunctions,
            strings, strings_size, search_path, nsearch_path,
            libpython, python_home, engine_module, helper, key, _reserved,
        ) = HEADER.unpack_from(data)  # fmt: skip
        if magic != MAGIC or version != VERSION or size != len(data):
            raise ValueError("wrong magic, version or size")
        area = data[strings : strings + strings_size]

        def raw(offset: int) -> bytes:
            return area[offset : area.index(0, offset)]

        def text(offset: int) -> str:
            return raw(offset).decode("utf-8", "surrogateescape")

        conditions = []
        for i in range(npredicates):
            kind, pattern, number, _ = PREDICATE.unpack_from(data, predicates + i * PREDICATE.size)
            conditions.append((kind, raw(pattern), number))
        section_list = []
        for i in range(nsections):
            first, count, rule, nrule, file, line, engine, otherwise, providers, firewall = SECTION.unpack_from(
                data, sections + i * SECTION.size
            )
            section_list.append(
                Section(
                    tuple(conditions[first : first + count]), rule, nrule, text(file), line, engine, otherwise,
                    provider_list(providers), firewall,
                )
            )  # fmt: skip
        rule_list = []
        for i in range(nrules):
            (
                role, action, otherwise, _, providers, lfam, lprefix, rfam, rprefix, lfirst, llast, rfirst, rlast,
                local, remote, function, file, line,
            ) = RULE.unpack_from(data, rules + i * RULE.size)  # fmt: skip
            ports = (lfirst, llast, rfirst, rlast)
            fields = (role, action, otherwise, lfam, lprefix, rfam, rprefix, *ports, function, line)
            rule_list.append(Rule(fields, providers, local, remote, text(file)))
        function_list = []
        for i in range(nfunctions):
            module, name, timeout_ms, _, file, line = FUNCTION.unpack_from(data, functions + i * FUNCTION.size)
            function_list.append(Function(text(module), text(name), timeout_ms, text(file), line))
        self.sections = tuple(section_list)
        self.rules = tuple(rule_list)
        self.functions = tuple(function_list)
        self.search_path = tuple(text(o) for o in struct.unpack_from(f"={nsearch_path}I", data, search_path))
        self.libpython = text(libpython)
        self.python_home = text(python_home)
        self.engine_module = text(engine_module)
        self.helper = text(helper)
        self.key = text(key)


def provider_list(field: bytes) -> tuple[int, ...]:
    """The provider numbers of a `providers` field, in order."""
    return tuple(field[: field.index(0)] if 0 in field else field)


def prefix_mask(prefix: int) -> int:
    """The 128-bit mask of a prefix length."""
    return ((1 << prefix) - 1) << (128 - prefix)


def sound(data: bytes) -> bool:
    """Whether the bytes are whole, by their checksum. In programs native/policy_table.c sees to that, and to more."""
    import zlib

    if len(data) < HEADER.size:
        return False
    return bool(HEADER.unpack_from(data)[3] == zlib.crc32(memoryview(data)[HEADER.size :]))


def key_of(data: bytes) -> str:
    """The launcher's cache key of a table, "" where the bytes are not a table of this version."""
    if len(data) < HEADER.size:
        return ""
    fields = HEADER.unpack_from(data)
    if fields[0] != MAGIC or fields[1] != VERSION or fields[2] != len(data):
        return ""
    start = fields[14] + fields[22]
    end = data.find(b"\0", start)
    return data[start:end].decode("utf-8", "surrogateescape") if end > 0 else ""
