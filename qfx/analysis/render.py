"""A sensitivity on a terminal: the most sensitive units, the heads of each layer, how well scores predict."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qfx.format import Format

if TYPE_CHECKING:
    from qfx.analysis.sensitivity import Sensitivity

_NAME = 40  # characters of a unit's name at least


def show(found: Sensitivity, console: Console, rows: int) -> None:
    """Print it. rows: how many units, those that lose most."""
    for table in units(found, rows, console.width):
        console.print(table)
    if found.heads:
        console.print(heads(found))
        console.print("Types of heads are no measure of the bits that they need: the scores are.", style="dim")
    if found.measured:
        console.print(predictions(found))
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    return table


def units(found: Sensitivity, rows: int, width: int) -> list[Table]:
    """Units by their greatest loss, weights and caches apart; values are calibrated where something was measured."""
    scores = found.calibrated()
    caches = {unit.name for unit in found.units if unit.kind.startswith("cache")}
    how = "measured and calibrated" if found.measured else "predicted"
    tables = []
    for what, names in (("weights", set(scores) - caches), ("key-value cache", set(scores) & caches)):
        texts = [text for text in found.formats if any(text in scores[name] for name in names)]
        most = sorted(names, key=lambda name: -max(scores[name].values()))[:rows]
        texts = _fewer(texts, max(2, (width - _NAME) // 12))
        table = _table(f"{what}: {found.what}, {how}, {len(most)} of {len(names)} units", "unit", *texts)
        table.columns[0].min_width = _NAME
        for name in most:
            table.add_row(escape(name), *(number(scores[name].get(text)) for text in texts))
        tables += [table] if names else []
    return tables


def _fewer(texts: list[str], most: int) -> list[str]:
    """As many formats as there is room for: of each number of bits the first (few and many bits first), then others."""
    first = {Format.parse(text).bits: text for text in reversed(texts)}
    bits = sorted(first)
    spread = {bits[round(i * (len(bits) - 1) / max(1, most - 1))] for i in range(most)}
    chosen = [*(first[b] for b in sorted(spread)), *first.values(), *texts]
    kept = list(dict.fromkeys(chosen))[:most]
    return [text for text in texts if text in kept]


def heads(found: Sensitivity) -> Table:
    """How many heads of each type an attention has, and its strongest patterns."""
    table = _table("heads", "attention", "types", "sink", "previous token", "induction", "duplicate")
    for name in dict.fromkeys(head.attention for head in found.heads):
        own = [head for head in found.heads if head.attention == name]
        types = ", ".join(f"{count} {kind}" for kind, count in Counter(head.type for head in own).most_common())
        best = [
            max((value for head in own if (value := getattr(head, what)) is not None), default=None)
            for what in ("sink", "previous", "induction", "duplicate")
        ]
        table.add_row(escape(name), types, *("" if value is None else f"{value:.2f}" for value in best))
    return table


def predictions(found: Sensitivity) -> Table:
    """Each method against what was measured."""
    table = _table(
        "predicted against measured", "method", "kind", "bits", "units", "Spearman", "measured / score", "off by"
    )
    for row in found.predictions():
        rank = "" if math.isnan(row.rank) else f"{row.rank:.2f}"
        error = "" if math.isnan(row.error) or row.count < 2 else f"x{row.error:.2f}"
        table.add_row(row.method, row.kind, str(row.bits), str(row.count), rank, number(row.ratio), error)
    return table


def number(value: float | None) -> str:
    """Three digits, nothing for what is not known."""
    return "" if value is None or math.isnan(value) else f"{value:.2e}"
