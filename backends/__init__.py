"""Backends: what each can lower, and how."""
