"""What the machine stops for."""

from __future__ import annotations


class FaultError(Exception):
    """What a GPU would stop for, or do something undefined with."""
