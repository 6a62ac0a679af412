"""The contract's scenarios."""

from scenario import pytest_pyfunc_call, world  # noqa: F401
