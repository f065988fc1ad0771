"""A norm whose result is rounded, and the sum before it, become one op.

    %add: f16[2,64] = aten.add.Tensor(%x, %y)                                        (read elsewhere, too)
    %rms_norm: f16[2,64] = aten.rms_norm(%add, [64], @norm.weight, 1e-06)
    %quantize_dynamic = qfx_triton.quantize_dynamic(%rms_norm, None, i8/tok)
    ->
    %norm_quantize = qfx_triton.norm_quantize(%x, %y, @norm.weight, None, 1e-06, False, ..., i8/tok, False, True)
    %getitem: i8[2,64] = getitem(%norm_quantize, 0)
    %add: f16[2,64] = getitem(%norm_quantize, 3)

The op writes the norm's result, or the sum, in float only where something else reads it. Codes are those of the norm's
result rounded to its dtype, as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import qfx.backends.triton.norm_quantize  # noqa: F401  (registers torch.ops.qfx_triton.norm_quantize)
from qfx import graph
from qfx.backends.triton.passes._nodes import (
    Quantize,
    bring_before,
    is_row_vector,
    note_computed,
    position,
    take,
)
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched

aten = torch.ops.aten


@dataclass(frozen=True)
class _Norm:
    """node is norm(x) * weight + bias over the last dimension. layer: a LayerNorm."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    layer: bool


def fuse_norm_quantize(gm: fx.GraphModule) -> bool:
    """See the module."""
    count = 0
    for node in list(gm.graph.nodes):
        found = Quantize.of(node)
        norm = None if found is None or found.reason_against_fusing() else _norm(found.x)
        if found is None or norm is None:
            continue
        count += _fused(gm, found, norm, _summands(norm.x)) or _fused(gm, found, norm, None)
    return matched(gm, "fuse_norm_quantize", count)


def _norm(node: fx.Node) -> _Norm | None:
    """The parts of a norm that the op computes; None for other nodes."""
    if not is_call(node, aten.rms_norm.default, aten.layer_norm.default):
        return None
    given = m.arguments(node)
    x, shape, bias = given["input"], list(given["normalized_shape"]), given.get("bias")
    same = m.dtype(x) == m.dtype(node) and m.same_sizes(shape, m.shape(x)[-1:])
    if not same or given["eps"] is None or not all(is_row_vector(v, x) for v in (given["weight"], bias)):
        return None
    layer = is_call(node, aten.layer_norm.default)
    return _Norm(node, x, given["weight"], bias, float(given["eps"]), layer)


def _summands(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(x, residual) of a sum of two tensors of its own shape and dtype."""
    if not m.plain_binary(node, aten.add.Tensor):
        return None
    for part in node.args:
        if not isinstance(part, fx.Node) or m.dtype(part) != m.dtype(node):
            return None
        if not m.same_sizes(m.shape(part), m.shape(node)):
            return None
    x, residual = node.args
    return x, residual


def _fused(gm: fx.GraphModule, found: Quantize, norm: _Norm, parts: tuple[fx.Node, fx.Node] | None) -> bool:
    """Put the op in place of sum, norm and quantization, or of the last two. False where it has no place to stand."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    old = [norm.node, found.node] if parts is None else [norm.x, norm.node, found.node]
    x, residual = parts or (norm.x, None)
    inputs = [n for n in (x, residual, norm.weight, norm.bias, *found.inputs) if n is not None]
    place = position(order, inputs, [user for n in old for user in n.users if user not in old])
    if place is None:
        return False
    keep_norm = any(user is not found.node for user in norm.node.users)
    keep_sum = parts is not None and any(user is not norm.node for user in norm.x.users)
    bring_before(order, inputs, place)
    with gm.graph.inserting_before(place):
        new = call(
            gm, torch.ops.qfx_triton.norm_quantize.default, x, residual, norm.weight, norm.bias, norm.eps, norm.layer,
            found.scale, found.zero, found.smooth, str(found.format), keep_norm, keep_sum, like=norm.node,
        )  # fmt: skip
    note_computed(new, *old)
    found.read_from(gm, new)
    kept = [n for n, keep in ((norm.node, keep_norm), (norm.x, keep_sum)) if keep]
    results = len(graph.val(new)) - len(kept)
    for number, node in enumerate(kept):
        take(gm, node, new, results + number)
    for node in (norm.node, norm.x) if parts else (norm.node,):
        gm.graph.erase_node(node)
    return True
