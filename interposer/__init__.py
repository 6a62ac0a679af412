"""Puts the TCP connections of unmodified programs on faster transports."""

__version__ = "0.1.0"
