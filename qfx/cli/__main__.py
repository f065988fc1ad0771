"""`python -m qfx.cli` is the command `qfx`."""

from __future__ import annotations

from qfx.cli import main

main()
