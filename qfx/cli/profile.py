"""`qfx profile`: measure this CPU, for predictions."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qfx.allocation.devices import Device
from qfx.allocation.profile import measure
from qfx.cli.terminal import step


def run(console: Console, out: Path, threads: int | None, name: str | None) -> None:
    """Measure, write the file, show what it says."""
    if out.suffix != ".json":
        raise ValueError(f"the profile is a .json file, found {out}\n  next step: -o cpu.json")
    with console.status("measure") as status:
        found = measure(threads=threads, name=name, told=lambda what: status.update(f"measure {what}"))
    with step(console, f"write {out}", spinner=False):
        found.save(out)
    console.print(table(found))


def table(found: Device) -> Table:
    """The numbers for people."""
    shown = Table(title=f"{found.name}: {found.source}", title_justify="left")
    shown.add_column("what")
    shown.add_column("measured", justify="right")
    for size, speed in found.bandwidth:
        shown.add_row(f"read {size / 2**20:g} MiB over and over", f"{speed / 1e9:.1f} GB/s")
    for kernel, curve in found.rates.items():
        shown.add_row(f"{kernel} at {', '.join(str(rows) for rows, _ in curve)} rows", _rates(curve))
    shown.add_row("time of a call beside its work", f"{found.overhead * 1e6:.2f} us")
    shown.add_row("memory", f"{found.memory / 1e9:.1f} GB")
    return shown


def _rates(curve: tuple[tuple[int, float], ...]) -> str:
    return f"{', '.join(f'{rate / 1e9:.0f}' for _, rate in curve)} Gop/s"
