"""An activation function, perhaps gated, whose result is rounded, becomes one op with the rounding.

    %silu: f16[2,96] = aten.silu(%gate)
    %mul: f16[2,96] = aten.mul.Tensor(%silu, %up)
    %quantize_dynamic = qfx_triton.quantize_dynamic(%mul, None, i8/tok)
    ->
    %act_quantize = qfx_triton.act_quantize(%gate, %up, silu, None, None, None, i8/tok, False)

silu, gelu (erf or tanh) and quick_gelu. The op writes the product in float only where something else reads it. Codes
are those of the product of the rounded activation, rounded to its dtype, as before.
"""

from __future__ import annotations

import torch
from torch import fx

import qfx.backends.triton.act_quantize  # noqa: F401  (registers torch.ops.qfx_triton.act_quantize)
from qfx import graph
from qfx.backends.triton.passes._gates import act_of, gated
from qfx.backends.triton.passes._nodes import Quantize, bring_before, note_computed, position, take
from qfx.passes._build import call, matched


def fuse_act_quantize(gm: fx.GraphModule) -> bool:
    """See the module."""
    count = 0
    for node in list(gm.graph.nodes):
        found = Quantize.of(node)
        if found is not None and found.reason_against_fusing() is None:
            count += _fused(gm, found)
    return matched(gm, "fuse_act_quantize", count)


def _fused(gm: fx.GraphModule, found: Quantize) -> bool:
    """Put the op in place of what makes x and of the quantization. False where x is made otherwise."""
    parts = gated(found.x) or ((found.x, None) if act_of(found.x) else None)
    if parts is None:
        return False
    act, up = parts
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    old = [act, found.node] if up is None else [act, found.x, found.node]
    inputs = [n for n in (act.args[0], up, *found.inputs) if isinstance(n, fx.Node)]
    place = position(order, inputs, [user for n in old for user in n.users if user not in old])
    if place is None:
        return False
    keep = any(user is not found.node for user in found.x.users)
    bring_before(order, inputs, place)
    with gm.graph.inserting_before(place):
        new = call(
            gm, torch.ops.qfx_triton.act_quantize.default, act.args[0], up, act_of(act), found.scale, found.zero,
            found.smooth, str(found.format), keep, like=found.x,
        )  # fmt: skip
    note_computed(new, *old)
    found.read_from(gm, new)
    if keep:
        take(gm, found.x, new, len(graph.val(new)) - 1)
    for node in reversed(old[:-1]):
        gm.graph.erase_node(node)
    return True
