"""The gate of a gated layer is applied where both of its linears are computed, as one product of float inputs.

    %linear: f16[2,96] = qfx_triton.linear_weight_only(%x, [...], None, None, u4/g128, 96)
    %gate: f16[2,48] = aten.slice.Tensor(%linear, 1, 0, 48)
    %up: f16[2,48] = aten.slice.Tensor(%linear, 1, 48, 96)
    %silu: f16[2,48] = aten.silu(%gate)
    %mul: f16[2,48] = aten.mul.Tensor(%silu, %up)
    ->
    %mul: f16[2,48] = qfx_triton.linear_weight_only(%x, [...], None, None, u4/g128, 96, silu)

Also where the model has one linear for both, and splits it. For few tokens that is one kernel less in a layer, and both
halves are not written and read again. Not where something else reads one of them, nor where codes are made of the
product (`fuse_act_quantize`, which runs before).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qfx import graph
from qfx.backends.triton.passes._gates import act_of, gated
from qfx.backends.triton.passes._nodes import note_computed
from qfx.backends.triton.products import ACTIVATIONS
from qfx.passes import _match as m
from qfx.passes._build import call, matched, take_place


def fuse_gate(gm: fx.GraphModule) -> bool:
    """See the module."""
    count = 0
    for node in list(gm.graph.nodes):
        parts = gated(node)
        if parts is None or act_of(parts[0]) not in ACTIVATIONS:
            continue
        act, up = parts
        between = _halves(act.args[0], up)
        if between is None:
            continue
        product: Any = between[-1].args[0]
        given = {**m.arguments(product), "act": act_of(act)}
        with gm.graph.inserting_before(product):  # where what it reads is not written into yet
            new = call(gm, product.target, *given.values(), like=product)
        note_computed(new, product, *reversed(between), act, node)
        take_place(node, new)
        for old in (act, *between, product):
            gm.graph.erase_node(old)
        count += 1
    return matched(gm, "fuse_gate", count)


def _halves(gate: Any, up: Any) -> list[fx.Node] | None:
    """What cuts a product of float inputs into these two halves, readers first; None where they are none of one."""
    product: Any = m.whole(gate, up)
    if product is None or gate.args[0] is not up.args[0]:
        return None
    cut: Any = gate.args[0]
    alone = len(gate.users) == len(up.users) == 1 and len(cut.users) == 2
    if not alone or graph.schema_name(product) != "qfx_triton::linear_weight_only" or m.arguments(product)["act"]:
        return None
    if cut is product:
        return [gate, up]
    return [gate, up, cut] if len(product.users) == 1 else None
