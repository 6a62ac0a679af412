"""Scenarios, one for each misbehaviour, and the generator of programs."""

from scenario import pytest_pyfunc_call, world  # noqa: F401
