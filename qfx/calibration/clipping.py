"""How much of their extremes the inputs of linears keep where scales are found at run time, searched on data.

    %linear = aten.linear(%x, @fc.weight)  # x=u4/tok w=i4/ch
    ->
    %linear = aten.linear(%x, @fc.weight)  # x=u4/tok/c90 w=i4/ch

minimize ||(Q_c(X) - X) W^T||^2 over the share c of the extremes that a scale spans. Values that are spread like a bell,
as rotations leave them, are many near zero and few far out: finer steps for all are worth more than the range of those
few. QuaRot (Ashkboos et al. 2024) takes 0.9 everywhere. Linears that read one value in one format keep one share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Columns, Outliers
from qfx.calibration.observers import Observer
from qfx.calibration.padding import Attended, without
from qfx.errors import Note, source_line
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.passes._sites import is_linear
from qfx.passes.calibrate import observed
from qfx.passes.quantize import weight_value
from qfx.plan import Plan

CLIPS: tuple[int, ...] = tuple(range(100, 55, -5))  # percent of the extremes
TOLD = "clip"  # in Plan.sensitivities: FQN -> share and errors
_ROWS = 256  # of a batch whose errors are multiplied with the weights


class Errors(Observer):
    """Squared error of the results of linears that read one value, for each of CLIPS: f64 [len(CLIPS)]."""

    def __init__(self, fmt: Format, weights: Sequence[Tensor], name: str) -> None:
        super().__init__("", name)
        self.formats = [replace(fmt, clip=clip) for clip in CLIPS]
        self.weights = weights
        self.errors = torch.zeros(len(CLIPS), dtype=torch.float64)

    @property
    def config(self) -> tuple[Any, ...]:
        """Observers of the same linears are one."""
        return (*super().config, id(self))

    def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
        """Take in one batch [.., K]."""
        super().update(x, batch, kept)
        x = without(x, kept or {})
        if not x.numel():
            return
        x = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        some = slice(None, None, -(-len(x) // _ROWS))
        for i, fmt in enumerate(self.formats):
            lost = (fake_quantize(x, fmt, activation=True) - x)[some]
            self.errors[i] += sum(float((lost @ w.to(lost).T).square().sum()) for w in self.weights)

    @property
    def clip(self) -> int:
        """The share of least error, in percent; the greatest of equals."""
        return CLIPS[int(self.errors.argmin())]


def clip_inputs(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool = True
) -> list[Note]:  # fmt: skip
    """Search the share for the linears of a float graph, into their annotations there and in `plan`.

    Inputs count whose format is one of integers with scales found at run time, and says no share itself. Fills
    `plan.sensitivities["clip"]`: FQN -> percent, and the squared error with it relative to that without. Returns notes
    about linears that keep columns apart, which stay as they are, and a minor one where there is nothing to clip.
    """
    found = _readers(gm)
    notes = [_apart(nodes[0]) for nodes in found.values() if _has_columns(nodes[0])]
    errors = {
        node: one
        for (_, fmt, _), nodes in found.items()
        if not _has_columns(nodes[0])
        for one in [Errors(fmt, [_weight(gm, node) for node in nodes], graph.fqn_of(nodes[0]))]
        for node in nodes
    }
    if not errors and not notes:
        what = "no linear has an input of integers whose scale is found at run time: there is nothing to clip"
        return [Note("graph", what, "give inputs a format such as 'u4/tok'", minor=True)]
    observers, more = observed(
        gm, batches, lambda node, role: errors.get(node) if role == "x" else None, progress=progress
    )
    notes += more
    told = plan.sensitivities.setdefault(TOLD, {})
    for (fqn, _), one in observers.items():
        assert isinstance(one, Errors)
        if one.seen:
            whole, least = float(one.errors[0]), float(one.errors.min())
            told[fqn] = {"percent": one.clip, "error": least / whole if whole else 1.0}
    for node in gm.graph.nodes:
        if is_linear(node) and graph.fqn_of(node) in told:
            _set(node, told[graph.fqn_of(node)]["percent"], plan)
    return notes


def _readers(gm: fx.GraphModule) -> dict[tuple[fx.Node, Format, bool], list[fx.Node]]:
    """Linears whose input may be clipped, by its value and format, those apart that keep columns apart."""
    found: dict[tuple[fx.Node, Format, bool], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        x = annotation.get(node).get("x") if is_linear(node) else None
        if isinstance(x, Format) and x.is_integer and x.dynamic and x.clip == 100 and "w" in annotation.get(node):
            value = node.args[0]
            assert isinstance(value, fx.Node)
            found.setdefault((value, x, _has_columns(node)), []).append(node)
    return found


def _has_columns(node: fx.Node) -> bool:
    return isinstance(annotation.get(node)["w"], Columns | Outliers)


def _apart(node: fx.Node) -> Note:
    reason = (
        "some input columns of its weight have a format of their own, each with a range of its own: none is clipped"
    )
    step = "nothing, or give its input a share in the recipe, such as x='u4/tok/c90'"
    return Note(graph.fqn_of(node), reason, step, source_line(node) or "", minor=True)


def _weight(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    operand = node.args[1]
    assert isinstance(operand, fx.Node)
    return weight_value(gm, operand)


def _set(node: fx.Node, percent: int, plan: Plan) -> None:
    x = annotation.get(node)["x"]
    assert isinstance(x, Format)
    clipped = replace(x, clip=percent)
    annotation.set(node, "x", clipped)
    fqn = graph.fqn_of(node)
    plan.annotations[fqn] = {**plan.annotations[fqn], "x": str(clipped)}
