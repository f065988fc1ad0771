"""The page of an analysis: `qfx analyze ... --html out.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qfx.analysis.render import number
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.units import Unit
from qfx.format import Format
from qfx.pictures import charts, grids
from qfx.pictures.page import Listing, Page, Picture

_ROWS = 40  # units in the table that is not folded
_SHOWN_BITS = 3  # what heat maps are of, where it is there: at 2 bits all is lost, at 4 hardly anything


def analysis(found: Sensitivity, *, title: str = "Sensitivity") -> Page:
    """Heat maps of what each unit loses, types of heads, predicted against measured, and tables of all of it."""
    weights = [unit for unit in found.units if not unit.kind.startswith("cache")]
    caches = [unit for unit in found.units if unit.kind.startswith("cache")]
    parts: list[Picture | Listing] = []
    for name, what, units in (("weights", "weights", weights), ("caches", "key-value cache", caches)):
        if units:
            parts.append(_map(found, units, name, what))
    if found.heads:
        parts.append(_types(found))
    if pairs := pairs_of(found):
        parts.append(_predicted(found, pairs))
    parts += [_units(found, weights or caches), *_tables(found)]
    return Page(title, _facts(found), parts, found.notes)


def _facts(found: Sensitivity) -> dict[str, str]:
    """What the analysis was made of."""
    known = {name: found.provenance.get(name) for name in ("model", "loss", "batches", "shape", "rounding")}
    facts = {name: "x".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in known.items() if v}
    return {**facts, "scores": ", ".join(found.methods), "units": str(len(found.units)), "quantity": found.what}


def shown_format(found: Sensitivity, units: Sequence[Unit]) -> dict[str, str]:
    """Unit -> the format of which a heat map shows the loss: of 3 bits, or the nearest that the unit has."""
    scores = found.score()
    chosen = {}
    for unit in units:
        texts = [text for text in found.formats if text in scores.get(unit.name, {})] or list(scores.get(unit.name, {}))
        if texts:
            chosen[unit.name] = min(texts, key=lambda text: abs(Format.parse(text).bits - _SHOWN_BITS))
    return chosen


def _map(found: Sensitivity, units: Sequence[Unit], name: str, what: str) -> Picture:
    scores, chosen = found.calibrated(), shown_format(found, units)
    values = {unit: scores[unit][text] for unit, text in chosen.items()}
    used = ", ".join(sorted(set(chosen.values())))
    how = "measured for some units, predicted and calibrated for the others" if found.measured else "predicted"
    caption = (
        f"Each cell is one unit: what the model loses ({found.what}) where that unit alone is in {used}; {how}. "
        "Bright units lose most and want more bits. Units differ in size: a whole matrix loses more than one head."
    )
    figure = grids.values(units, values, title=f"{what}: loss in {used}", label=found.what)
    return Picture(f"sensitivity-{name}", f"What each unit loses: {what}", caption, figure)


def _types(found: Sensitivity) -> Picture:
    caption = (
        "Where each query head looks, on the data and on repeated random tokens. Letters: half of its attention, or "
        "more, on the first token (s: sink), the token before (p), what followed an earlier copy (i: induction), an "
        "earlier copy itself (d). No source shows that the type tells the bits a head needs: the losses above do."
    )
    return Picture("head-types", "What the heads do", caption, grids.types(found.heads, title="types of heads"))


def pairs_of(found: Sensitivity, method: str | None = None) -> list[charts.Pair]:
    """What a method (None: the first) predicted and what was measured, of every unit and format that has both."""
    kinds = {unit.name: unit.kind for unit in found.units}
    scores = found.score(method)
    return [
        charts.Pair(kinds[name], Format.parse(text).bits, scores[name][text], value)
        for name, row in found.measured.items()
        for text, value in row.items()
        if name in kinds and text in scores.get(name, {}) and math.isfinite(value)
    ]


def _predicted(found: Sensitivity, pairs: list[charts.Pair]) -> Picture:
    caption = (
        f"Units that were quantized alone and measured, beside the score of {found.methods[0]}. Points in the order of "
        "the line mean that the ranking can be trusted; a distance from it is what calibration takes out."
    )
    made = charts.predicted(pairs, what="loss", title=f"{found.methods[0]} against measurement")
    return Picture("predicted", "Predicted against measured", caption, made)


def _units(found: Sensitivity, units: Sequence[Unit]) -> Listing:
    scores = found.calibrated()
    texts = [text for text in found.formats if any(text in scores.get(unit.name, {}) for unit in units)]
    ranked = sorted((u for u in units if u.name in scores), key=lambda u: -max(scores[u.name].values()))
    rows = [[u.name, u.kind, *(number(scores[u.name].get(text)) for text in texts)] for u in ranked]
    return Listing(f"All {len(rows)} units, those that lose most first", ["unit", "kind", *texts], rows,
                   folded=len(rows) > _ROWS)  # fmt: skip


def _tables(found: Sensitivity) -> list[Listing]:
    made = []
    if found.measured:
        rows = [
            [row.method, row.kind, str(row.bits), str(row.count), "" if math.isnan(row.rank) else f"{row.rank:.2f}",
             number(row.ratio), "" if math.isnan(row.error) or row.count < 2 else f"x{row.error:.2f}"]
            for row in found.predictions()
        ]  # fmt: skip
        heads = ["method", "kind", "bits", "units", "Spearman", "measured / score", "off by"]
        made.append(Listing("How well each method predicts", heads, rows, folded=len(rows) > _ROWS))
    if found.heads:
        shares = ("sink", "previous", "induction", "duplicate", "explained")
        rows = [
            [head.attention, str(head.head), head.type, *(_share(getattr(head, name)) for name in shares)]
            for head in found.heads
        ]
        made.append(Listing("All heads", ["attention", "head", "type", *shares], rows, folded=True))
    return made


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"
