"""The page of a plan whose formats were allocated: which unit has which, what that takes, what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qfx.analysis.render import number
from qfx.errors import explain
from qfx.format import Format
from qfx.pictures import charts, grids
from qfx.pictures.page import Listing, Page, Picture
from qfx.plan import Plan

_FORMAT_ROWS = 12


@dataclass(frozen=True)
class Part:
    """A unit as the plan tells it: its place, its format, its weights and bytes, its predicted loss."""

    name: str
    fqn: str
    kind: str
    layer: str
    head: int | None
    format: Format
    elements: int
    bytes: int
    score: float


def parts_of(plan: Plan) -> list[Part]:
    """The units of `plan.sensitivities["allocation"]`. Raises ValueError where the plan has no allocation."""
    told = plan.sensitivities.get("allocation")
    if not isinstance(told, Mapping) or not told.get("units"):
        raise ValueError(
            explain(
                "the plan has one format for each weight by its rules: nothing was allocated",
                expected="a plan that was made under a budget",
                next_step="qfx.plan(model, recipe, data, avg_bits=4)",
            )
        )
    return [
        Part(
            name, name.rpartition(".")[0] if row["head"] is not None else name, row["kind"], row["layer"], row["head"],
            Format.parse(row["format"]), row["elements"], row["bytes"], row["score"],
        )
        for name, row in told["units"].items()
    ]  # fmt: skip


def allocation(plan: Plan, *, points: Sequence[charts.Point] = (), title: str = "Allocation") -> Page:
    """Formats and predicted loss of each unit as heat maps, bytes by layer, and tables.

    points: other models, for a chart of loss over bytes; the plan is put beside them. Raises ValueError for a plan
    without allocation.
    """
    parts, told = parts_of(plan), plan.sensitivities["allocation"]
    formats = {part.name: part.format for part in parts}
    losses = {part.name: part.score for part in parts}
    bits = f"{told['average_bits']:.3f} bits a weight"
    pictures = [
        Picture("formats", "Which unit has which format", (
            "A row for each layer, a column for each head (rows of q, k and v, columns of o) and each other weight. "
            "Dark cells have many bits. Heads stand as in the model, before equal ones are put side by side."
        ), grids.bits(parts, formats, title=f"formats, {bits}")),
        Picture("losses", "What each unit is predicted to lose in its format", (
            "A good allocation spends its bytes so that the next byte gains the same everywhere. Units that still "
            "stand out are those for which a better format was too dear, or none was allowed."
        ), grids.values(parts, losses, title="predicted loss in the chosen format", label=str(told["what"]))),
        Picture("bytes", "Where the bytes are", (
            "Bytes of each layer by kind of unit, scales and zero points counted, beside the same weights in 16 bits."
        ), charts.sizes([charts.Size(p.layer, p.kind, p.elements, p.bytes) for p in parts], title=f"bytes, {bits}")),
    ]  # fmt: skip
    if points:
        own = charts.Point("this plan", told["bytes"], told["measured"], "this plan")
        caption = "Each point is a model: its bytes, how far its outputs are from the float model's. Least is best."
        made = charts.pareto([*points, own], what=str(told["what"]), title="loss over bytes")
        pictures.append(Picture("pareto", "Loss over bytes", caption, made))
    return Page(title, _facts(told, bits), [*pictures, _by_format(parts), _units(parts)], plan.notes)


def _facts(told: Mapping[str, Any], bits: str) -> dict[str, str]:
    budget = ", ".join(f"{name} {value:,}" for name, value in told["budget"].items())
    facts = {"budget": budget, "bytes": f"{told['bytes']:,} ({bits})", "scores": str(told["method"])}
    facts["predicted loss"] = number(told["predicted"])
    if told.get("measured_before") is not None:
        facts["measured before refinement"] = number(told["measured_before"])
    if judged := told.get("judged"):
        other = f"cut by heads {number(judged['heads'])}" if judged["heads"] is not None else "no cut by heads"
        facts["whole weights or heads"] = (
            f"{'heads' if judged['better'] == 'heads' else 'whole weights'}: {other}, whole weights "
            f"{number(judged['layers'])}, measured on {judged['on']}"
        )
    return {**facts, "measured": f"{number(told['measured'])} {told['what']}"}


def _by_format(parts: Sequence[Part]) -> Listing:
    rows = []
    every = sum(part.elements for part in parts)
    for fmt in dict.fromkeys(sorted((part.format for part in parts), key=lambda f: (f.bits, str(f)))):
        own = [part for part in parts if part.format == fmt]
        elements, size = sum(part.elements for part in own), sum(part.bytes for part in own)
        cells = [f"{elements / every:.1%}", f"{size:,}", f"{8 * size / elements:.3f}"]
        rows.append([str(fmt), str(len(own)), *cells, number(sum(part.score for part in own))])
    headings = ["format", "units", "of the weights", "bytes", "bits a weight", "predicted loss"]
    return Listing("Formats", headings, rows, folded=len(rows) > _FORMAT_ROWS)


def _units(parts: Sequence[Part]) -> Listing:
    rows = [
        [part.name, part.kind, str(part.format), f"{part.bytes:,}", f"{8 * part.bytes / part.elements:.3f}",
         number(part.score)]
        for part in sorted(parts, key=lambda part: -part.score)
    ]  # fmt: skip
    headings = ["unit", "kind", "format", "bytes", "bits a weight", "predicted loss"]
    return Listing(f"All {len(rows)} units, those that lose most first", headings, rows, folded=True)
