"""Input channels of great magnitude stay in 16 bits, as LLM.int8 has it (Dettmers et al. 2022). Into the plan.

    %linear = aten.linear(%x, @fc.weight)  # x=i8/tok w=i8/ch
    ->
    %linear = aten.linear(%x, @fc.weight)  # x=i8/tok w=outliers[f16:2,i8/ch]

A channel is an outlier where its magnitude exceeds a threshold anywhere in the calibration data (LLM.int8 looks at each
input at run time; with fixed columns the weight is stored once, and the sizes are known). Its column of the weight is
kept in 16 bits and meets float inputs; the others are rounded, with scales per token that no outlier stretches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Outliers
from qfx.calibration.observers import AbsMax, Observer
from qfx.errors import Note, source_line
from qfx.format import Format
from qfx.passes.calibrate import observed
from qfx.passes.quantize import weight_value
from qfx.plan import Plan

_STEP = "nothing, or choose another threshold (Recipe.outliers)"


def keep_outliers(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, skip: Collection[str] = (),
    progress: bool = True,
) -> list[Note]:  # fmt: skip
    """Annotate the linears of `gm` whose inputs have channels beyond `plan.recipe.outliers`, and `plan` with them.

    Linears count whose weight has one format and whose input has a format with scales found at run time; a note names
    others that have outliers. skip: linears whose weight another module's forward reads, which take no several formats.
    Fills `plan.sensitivities["outliers"]`: FQN -> number of channels kept. Gives a minor note where there is none.
    """
    threshold = plan.recipe.outliers
    assert threshold is not None

    def make(node: fx.Node, role: str) -> Observer | None:
        wanted = role == "x" and "w" in annotation.get(node) and graph.val(node.args[0]).shape
        return AbsMax("ch", graph.fqn_of(node)) if wanted else None

    observers, notes = observed(gm, batches, make, progress=progress)
    told = plan.sensitivities.setdefault("outliers", {})
    for node in gm.graph.nodes:
        seen = observers.found.get((graph.fqn_of(node), "x"))
        if not isinstance(seen, AbsMax) or not seen.seen or graph.fqn_of(node) in told:
            continue
        columns = (seen.absmax() > threshold).nonzero().flatten().tolist()
        reason = _refusal(node, skip) if columns else None
        if reason is not None:
            what = f"{len(columns)} of its input channels exceed {threshold:g}, and none is kept apart: {reason}"
            notes.append(Note(graph.fqn_of(node), what, _STEP, source_line(node) or ""))
        elif columns:
            _keep(gm, node, columns, plan)
            told[graph.fqn_of(node)] = len(columns)
    if not told and not notes:
        what = f"no input channel of a linear exceeds {threshold:g}: none is kept apart"
        notes.append(Note("graph", what, _STEP, minor=True))
    return notes


def _refusal(node: fx.Node, skip: Collection[str]) -> str | None:
    """Why no column of a node can be kept apart, or None."""
    formats = annotation.get(node)
    x, w = formats["x"], formats["w"]
    if graph.schema_name(node) != "aten::linear":
        return "only linears keep columns apart"
    if graph.fqn_of(node) in skip:
        return "its weight is read by a forward of another module"
    if not isinstance(w, Format):
        return f"its weight has several formats, w={annotation.show(w)}"
    if not isinstance(x, Format) or not x.dynamic:
        return f"the scale of x={annotation.show(x)} is fixed for all channels"
    return None


def _keep(gm: fx.GraphModule, node: fx.Node, columns: list[int], plan: Plan) -> None:
    """Annotate every node of the name, since calls of one layer share its weight."""
    fqn, rest = graph.fqn_of(node), annotation.get(node)["w"]
    operand = node.args[1]
    assert isinstance(operand, fx.Node)
    assert isinstance(rest, Format)
    value = weight_value(gm, operand)
    apart = len(columns) < value.shape[-1]
    w = Outliers(rest, _half(value[:, columns]), tuple(columns)) if apart else _half(value)
    for other in gm.graph.nodes:
        if other.op == "call_function" and graph.fqn_of(other) == fqn and "w" in annotation.get(other):
            annotation.set(other, "w", w)
            if not apart:
                annotation.clear(other, "x")
    plan.annotations[fqn] = {**plan.annotations[fqn], "w": annotation.to_json(w)}
    if not apart:
        plan.annotations[fqn].pop("x")


def _half(value: Tensor) -> Format:
    """The 16-bit type for a weight: its own, else f16 where that holds the values."""
    if value.dtype == torch.bfloat16:
        return Format("bf16")
    fits = value.dtype == torch.float16 or float(value.abs().max()) < torch.finfo(torch.float16).max
    return Format("f16" if fits else "bf16")
