"""What a policy function is given, and what it may return.

    def decide(request):
        if request.role == "connect" and request.remote[1] == 5432:
            return "tcp"
        return "unix"

Imported inside other people's processes: nothing heavy, not even dataclasses.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from interposer.policy.engine import Facts

V4_PREFIX = bytes(10) + b"\xff\xff"


class _Frozen:
    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __repr__(self) -> str:
        names: tuple[str, ...] = getattr(type(self), "FIELDS", ())
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class Process(_Frozen):
    """The process that asks. `arguments` begins with argv[0]; `user` is the effective user id at its start."""

    __slots__ = ("_facts",)
    FIELDS = ("exe", "name", "user")
    _facts: Facts

    def __init__(self, facts: Facts) -> None:
        object.__setattr__(self, "_facts", facts)

    @property
    def exe(self) -> str:
        return _text(self._facts.exe)

    @property
    def name(self) -> str:
        return _text(self._facts.name)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple([_text(argument) for argument in self._facts.arguments])

    @property
    def environment(self) -> dict[str, str]:
        """As the process was started; a copy."""
        pairs = [_text(variable).partition("=") for variable in self._facts.environment]
        return {name: value for name, _, value in pairs}

    @property
    def cgroups(self) -> tuple[str, ...]:
        return tuple([_text(path) for path in self._facts.cgroups])

    @property
    def user(self) -> int:
        return self._facts.user


class Request(_Frozen):
    """One listen() or connect().

    role     "listen" or "connect"
    family   "v4" or "v6": the family of the program's socket
    local    (address, port): where it is bound; ("0.0.0.0", 0) or ("::", 0) where it is not
    remote   (address, port): where it connects to; None for "listen"
    process  the asking process
    rule     "file:line" of the rule that names the function
    """

    __slots__ = ("family", "local", "process", "remote", "role", "rule")
    FIELDS = ("role", "family", "local", "remote", "process", "rule")
    role: str
    family: str
    local: tuple[str, int]
    remote: tuple[str, int] | None
    process: Process
    rule: str

    def __init__(
        self,
        role: str,
        family: str,
        local: tuple[str, int],
        remote: tuple[str, int] | None,
        process: Process,
        rule: str,
    ) -> None:
        put = object.__setattr__
        put(self, "role", role)
        put(self, "family", family)
        put(self, "local", local)
        put(self, "remote", remote)
        put(self, "process", process)
        put(self, "rule", rule)


class Decision(_Frozen):
    """A function's answer in full.

    `providers` are tried in order, none of them means TCP; `otherwise`, "tcp" or "error", says what happens where none
    can serve (None: as the rule says).
    """

    __slots__ = ("otherwise", "providers")
    FIELDS = ("providers", "otherwise")
    providers: tuple[str, ...]
    otherwise: str | None

    def __init__(self, providers: Sequence[str] | str = (), otherwise: str | None = None) -> None:
        object.__setattr__(self, "providers", (providers,) if isinstance(providers, str) else tuple(providers))
        object.__setattr__(self, "otherwise", otherwise)


def address_text(ip: bytes) -> str:
    """The usual text of 16 bytes, where IPv4 is ::ffff:a.b.c.d: "127.0.0.1", "fe80::1" (RFC 5952)."""
    if ip.startswith(V4_PREFIX):
        return ".".join([str(byte) for byte in ip[12:]])
    groups = [int.from_bytes(ip[i : i + 2], "big") for i in range(0, 16, 2)]
    best, length = 0, 1
    start = None
    for i, group in enumerate(groups + [1]):
        if group == 0:
            start = i if start is None else start
        elif start is not None:
            if i - start > length:
                best, length = start, i - start
            start = None
    words = [f"{group:x}" for group in groups]
    if length == 1:
        return ":".join(words)
    return ":".join(words[:best]) + "::" + ":".join(words[best + length :])


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
