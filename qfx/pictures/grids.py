"""Heat maps: a row for each layer, a column for each head, a panel for each role; other weights have a panel too.

    q          k      v      o          other weights
    0 1 2 3    0 1    0 1    0 1 2 3    gate_proj up_proj down_proj
0   . : . .    : .    . .    . . . :    :         .       |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qfx.analysis.head_types import TYPES, Head
from qfx.format import Format
from qfx.pictures import canvas


class Placed(Protocol):
    """What a unit tells of its place: as `qfx.analysis.units.Unit`."""

    @property
    def name(self) -> str: ...
    @property
    def fqn(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def head(self) -> int | None: ...


OTHERS, BESIDE = "other weights", "beside the layers"
_ROLES = ("q", "k", "v", "o", "cache_k", "cache_v")
_MOST = 24  # columns and rows up to which a cell is large enough for words
TYPE_COLOURS = dict(zip(TYPES, ("#2a6f97", "#e07a1f", "#8fa3ad", "#6a4c93"), strict=True))


@dataclass(frozen=True)
class Panel:
    """title; columns: their labels; cells: (row, column) -> unit name."""

    title: str
    columns: tuple[str, ...]
    cells: dict[tuple[int, int], str]


def grid(units: Sequence[Placed]) -> tuple[list[str], list[Panel]]:
    """(layers in order, panels). Units of no layer stand in a row of their own."""
    layers = list(dict.fromkeys(unit.layer or BESIDE for unit in units))
    layers.sort(key=lambda name: name == BESIDE)
    row = {name: i for i, name in enumerate(layers)}
    panels = []
    for role in _ROLES:
        own = [unit for unit in units if unit.kind == role and unit.head is not None]
        if own:
            heads = sorted({unit.head or 0 for unit in own})
            at = {head: i for i, head in enumerate(heads)}
            cells = {(row[u.layer or BESIDE], at[u.head or 0]): u.name for u in own}
            panels.append(Panel(role.replace("_", " "), tuple(map(str, heads)), cells))
    rest = [unit for unit in units if unit.head is None or unit.kind not in _ROLES]
    if rest:
        short = _short(rest)
        names = list(dict.fromkeys(short[unit.name] for unit in rest))
        cells = {(row[u.layer or BESIDE], names.index(short[u.name])): u.name for u in rest}
        panels.append(Panel(OTHERS, tuple(names), cells))
    return layers, panels


def _short(units: Sequence[Placed]) -> dict[str, str]:
    """Unit name -> the end of its name, as many parts as tell the units of each layer apart."""
    for count in range(1, 1 + max(unit.fqn.count(".") for unit in units)):
        found = {unit.name: ".".join(unit.fqn.split(".")[-count:]) for unit in units}
        if len({(unit.layer, found[unit.name]) for unit in units}) == len(units):
            return found
    return {unit.name: unit.name for unit in units}


def values(units: Sequence[Placed], found: Mapping[str, float], *, title: str, label: str) -> Any:
    """Heat map of a positive number of each unit, by its logarithm."""
    from matplotlib.colors import LogNorm

    known = {name: value for name, value in found.items() if 0 < value < math.inf}
    low, high = min(known.values(), default=1e-3), max(known.values(), default=1.0)
    return _heat(units, known, LogNorm(low, high if high > low else 2 * low), title, label, "viridis")


def bits(units: Sequence[Placed], formats: Mapping[str, Format], *, title: str) -> Any:
    """Heat map of the bits of each unit's codes; its type and group are in the cell."""
    from matplotlib.colors import Normalize

    used = {unit.name: float(formats[unit.name].bits) for unit in units if unit.name in formats}
    texts = {name: "\n".join(filter(None, (formats[name].type, formats[name].granularity))) for name in used}
    limits = Normalize(1.5, max(8.0, *used.values()) if used else 8.0)
    return _heat(units, used, limits, title, "bits of a code", "YlGnBu", texts)


def _heat(
    units: Sequence[Placed], found: Mapping[str, float], norm: Any, title: str, label: str,
    colours: str, texts: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    layers, panels = grid(units)
    widths = [max(1.2, len(panel.columns) * (1.6 if panel.title == OTHERS else 1)) for panel in panels]
    cell = 0.34 if sum(widths) <= _MOST and len(layers) <= _MOST else 0.2
    made = canvas.figure(min(22.0, 3.2 + cell * 1.5 * sum(widths)), min(20.0, 1.9 + cell * len(layers)))
    made.suptitle(title, fontsize=11, color=canvas.INK)
    axes = made.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    shown, image = canvas.colours(colours), None
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        table = np.full((len(layers), len(panel.columns)), np.nan)
        for place, name in panel.cells.items():
            table[place] = found.get(name, np.nan)
        image = axis.imshow(table, cmap=shown, norm=norm, aspect="auto", interpolation="nearest")
        _label(axis, panel, layers if number == 0 else None, len(layers))
        if texts and cell > 0.3:
            _write(axis, panel, texts, lambda place, t=table, i=image: i.cmap(i.norm(t[place])))
    if image is not None:
        bar = made.colorbar(image, ax=list(axes), pad=0.01, fraction=0.03)
        bar.set_label(label, fontsize=8, color=canvas.INK)
        bar.ax.tick_params(labelsize=7)
    return made


def _label(axis: Any, panel: Panel, layers: Sequence[str] | None, rows: int) -> None:
    axis.set_title(panel.title, fontsize=9, color=canvas.INK)
    step = max(1, len(panel.columns) // 16)
    turned = max(map(len, panel.columns)) > 3
    axis.set_xticks(range(0, len(panel.columns), step), panel.columns[::step], fontsize=7,
                    rotation=50 if turned else 0, ha="right" if turned else "center")  # fmt: skip
    step = max(1, rows // 32)
    axis.set_yticks(range(0, rows, step), layers[::step] if layers else [], fontsize=7)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    for edge in range(rows - 1):
        axis.axhline(edge + 0.5, color="white", linewidth=0.8)
    for edge in range(len(panel.columns) - 1):
        axis.axvline(edge + 0.5, color="white", linewidth=0.8)


def _write(axis: Any, panel: Panel, texts: Mapping[str, str], colour: Any) -> None:
    for place, name in panel.cells.items():
        if name in texts:
            axis.text(place[1], place[0], texts[name], ha="center", va="center", fontsize=6.5,
                      color="white" if canvas.dark(colour(place)) else canvas.INK)  # fmt: skip


def types(heads: Sequence[Head], *, title: str) -> Any:
    """What each query head does: its type as a colour, and the strongest of its patterns as a letter.

    s: sink, p: previous token, i: induction, d: duplicate token; half of the attention, or more.
    """
    layers = list(dict.fromkeys(head.attention for head in heads))
    columns = max(head.head for head in heads) + 1
    cell = 0.34 if columns <= _MOST and len(layers) <= _MOST else 0.2
    made = canvas.figure(min(22.0, 4.4 + 1.5 * cell * columns), min(20.0, 1.7 + cell * len(layers)))
    made.suptitle(title, fontsize=11, color=canvas.INK)
    axis = made.subplots()
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    table = np.full((len(layers), columns, 3), to_rgb(canvas.MISSING))
    for head in heads:
        place = layers.index(head.attention), head.head
        table[place] = to_rgb(TYPE_COLOURS[head.type])
        if cell > 0.3 and (letters := _letters(head)):
            axis.text(place[1], place[0], letters, ha="center", va="center", fontsize=6.5,
                      color="white" if canvas.dark(tuple(table[place])) else canvas.INK)  # fmt: skip
    axis.imshow(table, aspect="auto", interpolation="nearest")
    named = [next(head.layer or head.attention for head in heads if head.attention == name) for name in layers]
    _label(axis, Panel("query head", tuple(map(str, range(columns))), {}), named, len(layers))
    used = [name for name in TYPES if any(head.type == name for head in heads)]
    axis.legend(handles=[Patch(color=TYPE_COLOURS[name], label=name) for name in used], fontsize=8, frameon=False,
                loc="upper left", bbox_to_anchor=(1.01, 1.0))  # fmt: skip
    return made


def _letters(head: Head) -> str:
    shares = {"s": head.sink, "p": head.previous, "i": head.induction, "d": head.duplicate}
    return "".join(letter for letter, share in shares.items() if share is not None and share >= 0.5)
