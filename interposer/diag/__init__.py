"""Looks at running processes from outside: their stats pages, and what the kernel knows of their sockets."""
