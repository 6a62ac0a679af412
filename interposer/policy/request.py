"""What a policy function is given, and what it may return.

    from interposer.policy import Decision, Request

    def decide(request: Request) -> Decision | str:
        if request.remote and request.remote[1] == 5432:
            return "tcp"
        return Decision("unix", send_buffer=1 << 20, remember=60)

Imported inside other people's processes: nothing heavy, not even dataclasses.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from interposer.policy.engine import Facts

V4_PREFIX = bytes(10) + b"\xff\xff"
OPTION_SIZE = 22
"""Of struct sock_option in native/engine.h: level, name, length, value."""


class _Frozen:
    """Cannot be changed; equal to one of the same type with equal fields."""

    __slots__ = ()
    FIELDS: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in self.FIELDS])

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.FIELDS)})"


class Process(_Frozen):
    """The process that asks, as it was when its program started.

    exe          path of the executable, as in /proc/PID/exe
    name         the name under which it runs, as in /proc/PID/comm
    arguments    argv; the first is the program's own name
    environment  a copy
    cgroups      paths, as in /proc/PID/cgroup
    user         effective user id
    """

    __slots__ = ("_facts",)
    FIELDS = ("exe", "name", "arguments", "user")
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
        pairs = [_text(variable).partition("=") for variable in self._facts.environment]
        return {name: value for name, _, value in pairs}

    @property
    def cgroups(self) -> tuple[str, ...]:
        return tuple([_text(path) for path in self._facts.cgroups])

    @property
    def user(self) -> int:
        return self._facts.user


class Option(_Frozen):
    """A socket option that the program has set with setsockopt().

    level   SOL_SOCKET, IPPROTO_TCP and so on, as a number
    number  the option's number in that level
    value   the bytes that were given
    name    "SO_KEEPALIVE", "TCP_NODELAY"...; "" where the option has no name here
    """

    __slots__ = ("level", "number", "value")
    FIELDS = ("name", "level", "number", "value")
    level: int
    number: int
    value: bytes

    def __init__(self, level: int, number: int, value: bytes) -> None:
        put = object.__setattr__
        put(self, "level", level)
        put(self, "number", number)
        put(self, "value", value)

    @property
    def name(self) -> str:
        from interposer.policy.options import NAMES

        return NAMES.get((self.level, self.number), "")

    def __int__(self) -> int:
        """The value of an option that is a C int (most are). Raises ValueError where it is not four bytes long."""
        import sys

        if len(self.value) != 4:
            raise ValueError(f"{self!r} is no integer")
        return int.from_bytes(self.value, sys.byteorder, signed=True)


class Request(_Frozen):
    """One listen() or connect() of a program.

    role     "listen" or "connect"
    family   "v4" or "v6": the family of the program's socket
    local    (address, port) to which it is bound; ("0.0.0.0", 0) or ("::", 0) where it is not
    remote   (address, port) to which it connects; None for "listen"
    process  the asking process
    rule     "file:line" of the rule that names the function
    options  the socket options that the program has set so far, each once with its latest value; at most 16
    """

    __slots__ = ("_options", "family", "local", "process", "remote", "role", "rule")
    FIELDS = ("role", "family", "local", "remote", "process", "rule", "options")
    role: Literal["listen", "connect"]
    family: Literal["v4", "v6"]
    local: tuple[str, int]
    remote: tuple[str, int] | None
    process: Process
    rule: str
    _options: bytes | tuple[Option, ...]

    def __init__(
        self,
        role: Literal["listen", "connect"],
        family: Literal["v4", "v6"],
        local: tuple[str, int],
        remote: tuple[str, int] | None,
        process: Process,
        rule: str,
        options: bytes | Sequence[Option] = (),
    ) -> None:
        put = object.__setattr__
        put(self, "role", role)
        put(self, "family", family)
        put(self, "local", local)
        put(self, "remote", remote)
        put(self, "process", process)
        put(self, "rule", rule)
        put(self, "_options", options if isinstance(options, bytes) else tuple(options))

    @property
    def options(self) -> tuple[Option, ...]:
        # Most functions never look at them, so they stay as they came until one does.
        if isinstance(self._options, bytes):
            object.__setattr__(self, "_options", _unpack(self._options))
        assert not isinstance(self._options, bytes)
        return self._options

    def option(self, name: str | int, number: int | None = None) -> Option | None:
        """The option of that name (`option("TCP_NODELAY")`) or of that level and number (`option(6, 1)`).

        None where the program has not set it. Raises ValueError for a name that no option has, and TypeError where
        neither a name nor two numbers are given.
        """
        if isinstance(name, str) and number is None:
            from interposer.policy.options import number_of

            wanted = number_of(name)
        elif isinstance(name, int) and isinstance(number, int):
            wanted = (name, number)
        else:
            raise TypeError('option("TCP_NODELAY") or option(6, 1)')
        for option in self.options:
            if (option.level, option.number) == wanted:
                return option
        return None


class NewRequest(_Frozen):
    """Made for every question, so quickly: it can be written to, until its __class__ is set to Request."""

    __slots__ = Request.__slots__
    __setattr__ = object.__setattr__  # type: ignore[assignment]
    __delattr__ = object.__delattr__

    def __init__(
        self,
        role: Literal["listen", "connect"],
        family: Literal["v4", "v6"],
        local: tuple[str, int],
        remote: tuple[str, int] | None,
        process: Process,
        rule: str,
        options: bytes,
    ) -> None:
        self.role = role
        self.family = family
        self.local = local
        self.remote = remote
        self.process = process
        self.rule = rule
        self._options = options


class Decision(_Frozen):
    """A function's answer in full.

    providers       tried in this order: a name or several; () or "tcp" means TCP
    otherwise       "tcp" or "error": what happens where none of them can serve; None: as the rule says
    send_buffer     bytes of the companion's send buffer, 1 to 1 GiB; None: as it is
    receive_buffer  bytes of its receive buffer, likewise
    remember        for how many seconds the answer holds for the same question (0: ask every time); None: until the
                    policy changes
    """

    __slots__ = ("otherwise", "providers", "receive_buffer", "remember", "send_buffer")
    FIELDS = ("providers", "otherwise", "send_buffer", "receive_buffer", "remember")
    providers: tuple[str, ...]
    otherwise: Literal["tcp", "error"] | None
    send_buffer: int | None
    receive_buffer: int | None
    remember: float | None

    def __init__(
        self,
        providers: Sequence[str] | str = (),
        otherwise: Literal["tcp", "error"] | None = None,
        *,
        send_buffer: int | None = None,
        receive_buffer: int | None = None,
        remember: float | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "providers", (providers,) if isinstance(providers, str) else tuple(providers))
        put(self, "otherwise", otherwise)
        put(self, "send_buffer", send_buffer)
        put(self, "receive_buffer", receive_buffer)
        put(self, "remember", remember)


def _unpack(packed: bytes) -> tuple[Option, ...]:
    import sys

    found = []
    for start in range(0, len(packed) - OPTION_SIZE + 1, OPTION_SIZE):
        one = packed[start : start + OPTION_SIZE]
        level = int.from_bytes(one[0:2], sys.byteorder, signed=True)
        number = int.from_bytes(one[2:4], sys.byteorder, signed=True)
        found.append(Option(level, number, one[5 : 5 + one[4]]))
    return tuple(found)


_texts: dict[bytes, str] = {}


def address_text(ip: bytes) -> str:
    """The usual text of 16 bytes, where IPv4 is ::ffff:a.b.c.d: "127.0.0.1", "fe80::1" (RFC 5952)."""
    text = _texts.get(ip)
    if text is None:
        if len(_texts) >= 1024:
            _texts.clear()
        text = _texts[ip] = _address_text(ip)
    return text


def _address_text(ip: bytes) -> str:
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
