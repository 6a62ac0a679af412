"""The control side of SAN providers. NAMES is the one list of them; the numbers are those of native/table.h."""

from __future__ import annotations

NAMES = {"unix": 1}
