"""The weights of a graph, rounded unit by unit as an assignment of formats says, and kept packed for the next time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.analysis.units import Unit, by_weight
from qfx.annotation import Columns, Formats
from qfx.calibration.importance import Importance
from qfx.errors import explain, nearest
from qfx.format import Format
from qfx.live.segments import Segment, along, segments, stands_alone, take
from qfx.packing import Packed
from qfx.passes.annotate import kind_of
from qfx.passes.quantize import weight_value
from qfx.recipe import Recipe
from qfx.rounding.blocks import steps_of
from qfx.rounding.parts import check_finite, dequantize_in_parts, round_in_parts

FLOAT = Format("f32")  # of a unit without a format: as it is
ROUNDINGS = ("rtn", "mse", "hqq")  # what a unit can be rounded by alone
Assignment = Mapping[str, Format]
_AT = {"embedding": 0}


class Weights:
    """Rounds the weights of a prepared graph.

    units: parts of weights, those of one weight covering it. rounding: "rtn", "mse" or "hqq" (see
    `qfx.rounding.nearest`). seen: for "mse", what an error costs by the inputs of a weight, by FQN; others count alike.
    """

    def __init__(
        self, gm: fx.GraphModule, units: Iterable[Unit], *, rounding: str = "mse",
        seen: Mapping[str, Importance] | None = None,
    ) -> None:  # fmt: skip
        self.gm, self.rounding, self.seen = gm, rounding, seen or {}
        self.units = {unit.name: unit for unit in units}
        self.of = by_weight(self.units.values())
        self.readers = _readers(gm, self.of)
        self._packed: dict[Any, Packed] = {}
        self._latest: dict[tuple[str, fx.Node], tuple[tuple[Format, ...], Tensor]] = {}

    def check(self, assignment: Iterable[str]) -> None:
        """Raises ValueError for a name that is no unit's."""
        if unknown := next((name for name in assignment if name not in self.units), None):
            raise ValueError(
                explain(
                    f"there is no unit {unknown!r}",
                    expected=f"one of the {len(self.units)} units",
                    next_step=nearest(unknown, self.units),
                )
            )

    def formats(self, fqn: str, assignment: Assignment) -> tuple[Format, ...]:
        """The formats of the units of a weight in order, `FLOAT` for those that have none."""
        return tuple(assignment.get(unit.name, FLOAT) for unit in self.of[fqn])

    def place(self, assignment: Assignment) -> dict[fx.Node, Tensor]:
        """Call -> what stands for its weight, for every weight of which a unit has a format."""
        found: dict[fx.Node, Tensor] = {}
        for fqn in dict.fromkeys(self.units[name].fqn for name in assignment):
            formats = self.formats(fqn, assignment)
            for operand, nodes in self.readers[fqn].items():
                value = self._value(fqn, operand, formats)
                found.update(dict.fromkeys(nodes, value))
        return found

    def part(self, unit: Unit, fmt: Format, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A unit as it is and as a format of its own gives it back, both f32 of `unit.shape`; or some of its rows."""
        operand = next(iter(self.readers[unit.fqn]))
        segment = Segment(fmt, ((unit.start, unit.stop),))
        value = weight_value(self.gm, operand)
        part = value if unit.axis is None else take(value, segment, unit.axis)
        if rows is None:
            return part.to(torch.float32), self._round(unit.fqn, operand, part, segment)
        part = part[rows].to(torch.float32)
        seen = self.importance(unit.fqn, unit.axis, segment.ranges)
        return part, round_in_parts(part, fmt, self.rounding, name=unit.fqn, importance=seen).dequantize()

    def parts(self, units: Sequence[Unit], fmt: Format) -> list[tuple[Tensor, Tensor]]:
        """`part` of units of one weight that have one shape, rounded together where each row is rounded by itself."""
        first = units[0]
        apart = first.axis == 1 and first.fqn in self.seen  # each has channels of its own
        if len(units) == 1 or len(first.shape) != 2 or not fmt.by_row or apart:
            return [self.part(unit, fmt) for unit in units]
        value = weight_value(self.gm, next(iter(self.readers[first.fqn])))
        segments = [Segment(fmt, ((unit.start, unit.stop),)) for unit in units]
        assert first.axis is not None, first.name
        whole = torch.cat([take(value, segment, first.axis).to(torch.float32) for segment in segments])
        seen = self.importance(first.fqn, 0, ())
        packed = round_in_parts(whole, fmt, self.rounding, name=first.fqn, importance=seen)
        made = dequantize_in_parts(packed, torch.float32)
        return list(zip(whole.split(first.shape[0]), made.split(first.shape[0]), strict=True))

    def importance(self, fqn: str, axis: int | None, ranges: Sequence[tuple[int, int]]) -> Importance | None:
        """That of a part of a weight: of these columns where the axis is 1, else of all; None where none was given."""
        seen = self.seen.get(fqn) if self.rounding == "mse" else None
        return seen if seen is None or axis != 1 else seen.columns(ranges)

    def check_finite(self) -> None:
        """Raises ValueError for NaN or Inf in a weight, naming it."""
        for fqn, views in self.readers.items():
            for operand in views:
                check_finite(weight_value(self.gm, operand), fqn)

    def _value(self, fqn: str, operand: fx.Node, formats: tuple[Format, ...]) -> Tensor:
        held = self._latest.get((fqn, operand))
        if held is not None and held[0] == formats:
            return held[1]
        value = weight_value(self.gm, operand)
        own = self.of[fqn]
        axis = own[0].axis
        if axis is None or len(own) == 1:  # the whole, if it is the columns of the only head, too
            made = self._round(fqn, operand, value, Segment(formats[0], ((0, 0),))).to(value.dtype)
        else:
            made = torch.empty_like(value, memory_format=torch.contiguous_format)
            for segment in _pieces(formats, own, value.shape):
                part = self._round(fqn, operand, take(value, segment, axis), segment)
                at = 0
                for start, stop in segment.ranges:
                    made.narrow(axis, start, stop - start).copy_(part.narrow(axis, at, stop - start))
                    at += stop - start
        self._latest[fqn, operand] = (formats, made)
        return made

    def _round(self, fqn: str, operand: fx.Node, value: Tensor, segment: Segment) -> Tensor:
        """The part of a weight in a segment's format, back in f32."""
        if segment.format == FLOAT:
            return value.to(torch.float32)
        key = (fqn, operand, segment.format, segment.ranges)
        if key not in self._packed:
            seen = self.importance(fqn, self.of[fqn][0].axis if segment.size else None, segment.ranges)
            self._packed[key] = round_in_parts(value, segment.format, self.rounding, name=fqn, importance=seen)
        return dequantize_in_parts(self._packed[key], torch.float32)


def rounding_of(recipe: Recipe | None) -> str:
    """How a unit alone is rounded to tell what it loses: as the recipe says where that can be, else "mse"."""
    return recipe.rounding if recipe is not None and recipe.rounding in ROUNDINGS else "mse"


def formats_of(own: list[Unit], formats: tuple[Format, ...]) -> Formats:
    """The formats of the units of one weight, as an annotation says them."""
    if len(own) == 1:
        return formats[0]
    return Columns(formats) if own[0].axis == 1 else formats


def _pieces(formats: tuple[Format, ...], own: list[Unit], shape: torch.Size) -> list[Segment]:
    """The segments in which a weight is stored, cut into its units where each can be rounded by itself."""
    asked = formats_of(own, formats)
    found: list[Segment] = []
    for segment in segments(asked, shape, own[0].fqn):
        fmt, width = segment.format, own[0].stop - own[0].start
        if stands_alone(fmt, along(asked), width):
            found += [
                Segment(fmt, ((at, at + width),)) for start, stop in segment.ranges for at in range(start, stop, width)
            ]
        else:
            found.append(segment)
    return found


def _readers(gm: fx.GraphModule, fqns: Iterable[str]) -> dict[str, dict[fx.Node, list[fx.Node]]]:
    """FQN -> weight operand (one for each way in which a tied weight is read) -> the calls that read it."""
    held: dict[str, str] = {}
    names = set(fqns)
    found: dict[str, dict[fx.Node, list[fx.Node]]] = {name: {} for name in names}
    steps: dict[tuple[str, str], fx.Node] = {}
    for node in gm.graph.nodes:
        kind, weight = kind_of(node), graph.weight_of(node)
        if weight is None or kind in (None, "attention"):
            continue
        target, fqn = str(weight.target), graph.fqn_of(node)
        if fqn in names:
            held.setdefault(target, fqn)
        if target not in held:
            continue
        operand = node.args[_AT.get(str(kind), 1)]
        assert isinstance(operand, fx.Node)
        operand = steps.setdefault((target, steps_of(operand)), operand)
        found[held[target]].setdefault(operand, []).append(node)
    return found
