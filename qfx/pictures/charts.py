"""Charts: divergence over bytes with its Pareto front, bytes by layer and kind, predicted against measured loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qfx.pictures import canvas
from qfx.pictures.grids import BESIDE

COLOURS = {  # kinds of units
    "q": "#014f86", "k": "#2a6f97", "v": "#61a5c2", "o": "#a9d6e5", "linear": "#e07a1f", "embedding": "#8fa3ad",
    "lm_head": "#5c677d", "experts": "#6a4c93", "conv": "#b08968", "cache_k": "#3a9d5d", "cache_v": "#95d5b2",
}  # fmt: skip
_SIGNS = dict(zip(COLOURS, "osD^vPX*h<>", strict=True))
_BITS = {2: "#b5179e", 3: "#e07a1f", 4: "#2a6f97", 5: "#3a9d5d", 6: "#7f5539", 8: "#5c677d"}


@dataclass(frozen=True)
class Point:
    """A model of so many bytes whose outputs are so far from the float model's. group: points of one line."""

    name: str
    bytes: int
    loss: float
    group: str = ""


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: none has as few bytes and as small a loss. By bytes."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def pareto(points: Sequence[Point], *, what: str, title: str) -> Any:
    """Loss over bytes, both as they are, the loss on a logarithmic axis; the Pareto front as a line."""
    made = canvas.figure(8.5, 5.5)
    axis = made.subplots()
    canvas.plain(axis)
    best = front(points)
    axis.step([p.bytes / 1e6 for p in best], [p.loss for p in best], where="post", color=canvas.FAINT, linewidth=1.5,
              label="Pareto front", zorder=1)  # fmt: skip
    groups = list(dict.fromkeys(p.group for p in points))
    for number, group in enumerate(groups):
        own = sorted((p for p in points if p.group == group), key=lambda p: p.bytes)
        colour = f"C{number % 10}"
        axis.plot([p.bytes / 1e6 for p in own], [p.loss for p in own], "o", color=colour, label=group or None, zorder=2,
                  linestyle=":" if len(own) > 1 and group else "", markersize=6, linewidth=1)  # fmt: skip
    for point in points if len(points) <= 24 and not any(groups) else best:
        axis.annotate(point.name, (point.bytes / 1e6, point.loss), fontsize=7, xytext=(5, 4), color=canvas.INK,
                      textcoords="offset points")  # fmt: skip
    axis.set(yscale="log", xlabel="MB of weights, scales and zero points counted", ylabel=what)
    axis.set_title(title, fontsize=11, color=canvas.INK)
    axis.grid(visible=True, which="major", alpha=0.25)
    axis.margins(x=0.08)
    axis.legend(fontsize=8, frameon=False)
    return made


@dataclass(frozen=True)
class Size:
    """A unit's layer and kind, the number of its weights, and the bytes that they take."""

    layer: str
    kind: str
    elements: int
    bytes: int


def sizes(parts: Sequence[Size], *, title: str) -> Any:
    """Bytes of each layer's weights by kind, beside what they take in 16 bits."""
    layers = list(dict.fromkeys(part.layer or BESIDE for part in parts))
    layers.sort(key=lambda name: name == BESIDE)
    made = canvas.figure(9.5, min(20.0, 1.6 + 0.34 * len(layers)))
    axis = made.subplots()
    canvas.plain(axis)
    place = {name: i for i, name in enumerate(layers)}
    half = [0.0] * len(layers)
    for part in parts:
        half[place[part.layer or BESIDE]] += 2 * part.elements / 1e3
    rows = range(len(layers))
    axis.barh(rows, half, color="none", edgecolor=canvas.FAINT, linestyle="--", height=0.75, label="in 16 bits")
    left = [0.0] * len(layers)
    for kind in [kind for kind in COLOURS if any(part.kind == kind for part in parts)]:
        own = [0.0] * len(layers)
        for part in parts:
            own[place[part.layer or BESIDE]] += part.bytes / 1e3 if part.kind == kind else 0.0
        axis.barh(rows, own, left=left, color=COLOURS[kind], height=0.75, label=kind)
        left = [a + b for a, b in zip(left, own, strict=True)]
    for row, (now, before) in enumerate(zip(left, half, strict=True)):
        axis.text(now, row, f" {now:.0f} kB, {16 * now / before:.2f} bits", va="center", fontsize=7, color=canvas.INK)
    axis.set_yticks(rows, layers, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("kB", fontsize=8)
    axis.set_title(title, fontsize=11, color=canvas.INK)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return made


@dataclass(frozen=True)
class Pair:
    """What was predicted and what was measured for one unit in one format of some bits."""

    kind: str
    bits: int
    predicted: float
    measured: float


def predicted(pairs: Sequence[Pair], *, what: str, title: str) -> Any:
    """Measured over predicted loss, both on logarithmic axes; on the line both are equal. Colour: bits, sign: kind."""
    made = canvas.figure(7.5, 6.0)
    axis = made.subplots()
    canvas.plain(axis)
    good = [pair for pair in pairs if pair.predicted > 0 and pair.measured > 0]
    every = [value for pair in good for value in (pair.predicted, pair.measured)]
    if every:
        low, high = min(every) / 1.5, max(every) * 1.5
        axis.plot([low, high], [low, high], color=canvas.FAINT, linewidth=1, zorder=1)
    kinds = [kind for kind in COLOURS if any(pair.kind == kind for pair in good)]
    for bits in sorted({pair.bits for pair in good}):
        for kind in kinds:
            own = [pair for pair in good if pair.kind == kind and pair.bits == bits]
            axis.scatter([p.predicted for p in own], [p.measured for p in own], marker=_SIGNS[kind], s=30, alpha=0.8,
                         color=_BITS.get(bits, canvas.INK), linewidths=0, zorder=2)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel=f"predicted {what}", ylabel=f"measured {what}")
    axis.set_title(title, fontsize=11, color=canvas.INK)
    axis.grid(visible=True, which="major", alpha=0.25)
    from matplotlib.lines import Line2D

    shown = [(f"{bits} bits", "o", _BITS.get(bits, canvas.INK)) for bits in sorted({pair.bits for pair in good})]
    shown += [(kind.replace("_", " "), _SIGNS[kind], canvas.FAINT) for kind in kinds]
    signs = [Line2D([], [], linestyle="", marker=marker, color=colour, label=label) for label, marker, colour in shown]
    axis.legend(handles=signs, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return made
