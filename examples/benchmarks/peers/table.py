"""How results are shown: a table for people, JSON for programs, a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from qfx.storage.files import write_text

PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "torchao", "onnxruntime-genai", "llama-cpp-python", "qfx")
WIDTH = 150


def console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def place(threads: int) -> str:
    """Processor, threads and versions, in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {threads} threads; " + ", ".join(f"{p} {v}" for p, v in versions().items())


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def shown(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], title: str) -> Table:
    """rows: one dict each with `peer`, and either values or `failed`. columns: heading by key of a row."""
    table = Table(title=title, title_justify="left")
    table.add_column("peer")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    table.add_column("remarks", overflow="fold")
    for row in rows:
        cells = ["" if row.get("failed") else cell(key, row.get(key)) for key in columns]
        table.add_row(row["peer"], *cells, reason(row["failed"]) if row.get("failed") else row.get("remarks", ""))
    return table


def reason(failed: str) -> str:
    """What fits into a table; the JSON holds all of it."""
    first = failed.strip().splitlines()[0]
    return f"failed: {first[:200]}"


def cell(key: str, value: Any) -> str:
    """A number as the table prints it: by the unit that its key ends in."""
    if value is None:
        return ""
    if key.endswith("_ms"):
        return f"{value:.2f}"
    if key.endswith("_bytes"):
        return f"{value / 1e6:.1f}"
    if key.endswith("ratio"):
        return f"{value:.2f}x"
    return f"{value:.1f}" if key.endswith("_per_s") else f"{value:.5f}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """A line of words between the tables."""
    console().print(text, highlight=False)


def check(asked: Iterable[object], known: Iterable[object], option: str) -> None:
    """Raises typer.BadParameter where something is asked for that is not known."""
    names = list(known)
    if unknown := [one for one in asked if one not in names]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(map(str, names))}", param_hint=option)


def write(file: Path | None, found: Mapping[str, Any]) -> None:
    """What a benchmark found as JSON, where a file is asked for."""
    if file is not None:
        write_text(file, json.dumps(found, indent=1) + "\n")


def plot(file: Path | None, runs: Mapping[str, Mapping[str, Any]], key: str, label: str) -> None:
    """Bars of `key`, a panel for each run (by title, with its `rows`), where a file is asked for.

    Rows that failed are left out.
    """
    if file is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 5), squeeze=False)
    for axis, (title, run) in zip(axes[0], runs.items(), strict=True):
        good = [row for row in run["rows"] if not row.get("failed") and row.get(key) is not None][::-1]
        colours = ["tab:orange" if row["peer"].startswith("qfx") else "tab:blue" for row in good]
        bars = axis.barh([row["peer"] for row in good], [row[key] for row in good], color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set(title=title, xlabel=label)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
