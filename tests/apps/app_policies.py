"""The policies under which programs run: without code, with every decision in Python, and with a function."""

from __future__ import annotations

import pytest

PLAIN = """\
version = 1

[defaults]
providers = ["unix"]
otherwise = "tcp"
"""
DECIDE = """\
def decide(request):
    address, port = request.remote or request.local
    return ["unix"] if address in ("127.0.0.1", "0.0.0.0", "::") and port > 1024 else "tcp"
"""
POLICIES = {
    "plain": (PLAIN, ""),
    "reactive": (PLAIN + 'engine = "reactive"\n', ""),
    "function": (PLAIN + '\n[[rule]]\nrole = "both"\nuse = "python:site_policy:decide"\n', DECIDE),
}

few_policies = pytest.mark.parametrize(
    "policy",
    [pytest.param(name, marks=[] if name == "plain" else pytest.mark.long) for name in POLICIES],
    indirect=True,
)
"""All policies in the long form, else the one without code."""
