"""Weights rounded where errors cost the least for the inputs that they meet, into the plan (see `rounded.py`).

    sum over rows d of W - W'  of  d C d^T     C = mean(x^T x), its diagonal or its blocks (`calibration.importance`)

With the blocks this is the clip search of AWQ (Lin et al. 2023): the scale of a group is that with which its part of
the layer's result on the calibration data changes least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Formats
from qfx.calibration.importance import BLOCK, Importance
from qfx.calibration.moments import Moments
from qfx.calibration.observers import Observer
from qfx.errors import Note
from qfx.live.segments import along, segments, stem_of, take
from qfx.packing import Packed
from qfx.passes._sites import is_linear
from qfx.passes.calibrate import observed
from qfx.passes.quantize import weight_value
from qfx.plan import Plan
from qfx.rounding import rounded
from qfx.rounding.parts import round_in_parts

_GREATEST = 512  # channels of a group that are one block


def round_weighted(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool = True
) -> list[Note]:
    """Round the weights of every annotated linear of a float graph by `plan.recipe.weighting`, into `plan.tensors`.

    Fills `plan.sensitivities["rounding"][FQN]` with the relative squared error of the layer's result (as far as the
    importance tells it) of nearest rounding and of what was found, and the seconds. Tables that an embedding reads,
    too, are rounded once, for the linear. Linears that no data reached are left to plain rounding; a note says so.
    """
    weighting = plan.recipe.weighting

    def make(node: fx.Node, role: str) -> Observer | None:
        if role != "w" or not is_linear(node):
            return None
        block = _block(annotation.get(node)["w"]) if weighting == "covariance" else None
        return Moments(graph.fqn_of(node), block)

    observers, notes = observed(gm, batches, make, progress=progress)
    found = plan.sensitivities.setdefault("rounding", {})
    for node in gm.graph.nodes:
        seen = observers.found.get((graph.fqn_of(node), "w"))
        if isinstance(seen, Moments) and seen.seen and is_linear(node):
            found[graph.fqn_of(node)] = _round(gm, node, plan, seen.importance())
    return notes


def _round(gm: fx.GraphModule, node: fx.Node, plan: Plan, importance: Importance) -> dict[str, float]:
    start = time.perf_counter()
    w, name = annotation.get(node)["w"], graph.fqn_of(node)
    operand = node.args[1]
    assert isinstance(operand, fx.Node)
    value = weight_value(gm, operand)
    cut, axis = segments(w, value.shape, name), along(w)
    before = after = energy = 0.0
    for number, segment in enumerate(cut):
        part = take(value, segment, axis) if len(cut) > 1 else value
        own = importance.columns(segment.ranges) if axis and len(cut) > 1 else importance
        packed = round_in_parts(part, segment.format, plan.recipe.rounding, name=name, importance=own)
        nearest = round_in_parts(part, segment.format, "rtn", name=name)
        before += _cost(nearest, part, own)
        after += _cost(packed, part, own)
        energy += float(own.product(part.to(torch.float32), part.to(torch.float32)).sum())
        for reader in _readers(gm, node) if len(cut) == 1 else [name]:
            rounded.put(plan.tensors, reader if len(cut) == 1 else f"{reader}.{stem_of(axis, number)}", packed)
    whole = max(energy, torch.finfo(torch.float32).tiny)
    seconds = time.perf_counter() - start
    return {"error_before": before / whole, "error_after": after / whole, "seconds": seconds}


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """FQNs of the nodes that are to read the same weight in the same format: the linear, and embeddings tied to it."""
    source, w = graph.weight_of(node), annotation.get(node)["w"]
    assert source is not None
    names = [graph.fqn_of(node)]
    for other in gm.graph.nodes:
        if other.op == "call_function" and graph.schema_name(other) == "aten::embedding":
            read = graph.weight_of(other)
            if read is not None and read.target == source.target and annotation.get(other).get("w") == w:
                names.append(graph.fqn_of(other))
    return list(dict.fromkeys(names))


def _cost(packed: Packed, part: Tensor, importance: Importance) -> float:
    difference = packed.dequantize() - part.to(torch.float32)
    return float(importance.product(difference, difference).sum())


def _block(w: Formats) -> int:
    """Channels of a block of moments, which no group of the formats may cut."""
    sizes = [f.group or (f.block[1] if f.block else 0) for f in annotation.each(w)]
    common = math.gcd(*sizes)
    return common if 0 < common <= _GREATEST else math.gcd(common, BLOCK) or BLOCK
