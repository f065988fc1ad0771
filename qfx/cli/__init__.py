"""The command `qfx`: quantize, inspect, compare, presets."""

from __future__ import annotations


def main() -> None:
    """Entry point of the script `qfx`."""
    from qfx.cli.app import app

    app()
