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

import operator
from typing import Any

import torch
from torch import fx

from qfx import graph
from qfx.backends.triton.passes._gates import act_of, gated
from qfx.backends.triton.passes._nodes import note_computed
from qfx.backends.triton.products import ACTIVATIONS
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, take_place

aten = torch.ops.aten
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


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
    if not isinstance(gate, fx.Node) or any(len(half.users) != 1 for half in (gate, up)):
        return None
    cuts, width = [gate, up], m.shape(gate)[-1]
    if is_call(gate, aten.slice.Tensor) and is_call(up, aten.slice.Tensor):
        right = _columns(gate) == (0, width) and _columns(up) == (width, 2 * width)
    else:
        right = is_call(gate, operator.getitem) and is_call(up, operator.getitem)
        right = right and (gate.args[1], up.args[1]) == (0, 1) and _splits_columns(gate.args[0])
    source = gate.args[0] if right and gate.args[0] is up.args[0] else None
    if not isinstance(source, fx.Node) or len(source.users) != 2:
        return None
    product: Any = source
    if is_call(source, *_SPLITS):
        cuts.append(source)
        product = source.args[0]
        if len(product.users) != 1:
            return None
    ours = graph.schema_name(product) == "qfx_triton::linear_weight_only" and not m.arguments(product)["act"]
    return cuts if ours and m.shape(product)[-1] == 2 * width else None


def _splits_columns(node: Any) -> bool:
    return is_call(node, *_SPLITS) and m.is_last(m.arguments(node)["dim"], node.args[0])


def _columns(part: fx.Node) -> tuple[int, int] | None:
    """Which columns of the last dimension a slice takes, one beside the other; None where it takes others."""
    given, whole = m.arguments(part), m.shape(part.args[0])
    if not m.is_last(given["dim"], part) or given["step"] != 1 or not isinstance(given["end"], int | None):
        return None
    return given["start"] or 0, whole[-1] if given["end"] is None else min(given["end"], whole[-1])
