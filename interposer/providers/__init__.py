"""The control side of SAN providers: NAMES is the one list of them, with the numbers of native/table.h, and each has a
module here (subnet.Control). Programs under the switch import this file, so it imports nothing."""

from __future__ import annotations

NAMES = {"unix": 1}
