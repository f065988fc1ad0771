"""`qfx presets`: the recipes that have a name."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qfx.presets import descriptions


def run(console: Console) -> None:
    """One line for each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("preset", style="bold", no_wrap=True)
    table.add_column("what it does")
    for name, line in descriptions().items():
        table.add_row(name, line)
    console.print(table)
