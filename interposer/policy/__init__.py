"""What a user's policy function works with: `Request` (with its `Process` and `Option`s), which it is given, and
`Decision`, which it may return.

The package runs inside other people's processes, so they are loaded only when asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from interposer.policy.request import Decision, Option, Process, Request

__all__ = ["Decision", "Option", "Process", "Request"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from interposer.policy import request

    return getattr(request, name)
