"""Activation functions in a lowered graph, alone or as the gate of a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.graph import is_call
from qfx.ops import floats as float_ops
from qfx.passes import _match as m

aten = torch.ops.aten


def gated(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(activation, other factor) of a product of an activation that nothing else reads."""
    if not m.plain_binary(node, aten.mul.Tensor):
        return None
    for act, up in m.orders(node):
        alone = isinstance(act, fx.Node) and m.only_user(act) is node
        fits = isinstance(up, fx.Node) and m.dtype(up) == m.dtype(act) and m.same_sizes(m.shape(up), m.shape(act))
        if alone and fits and act_of(act):
            return act, up
    return None


def act_of(node: Any) -> str:
    """The name of an activation function as ops have it; "" for other nodes."""
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if m.arguments(node)["approximate"] == "tanh" else "gelu"
    if is_call(node, aten.silu.default):
        return "silu"
    return "quick_gelu" if is_call(node, torch.ops.qfx.quick_gelu.default, float_ops.quick_gelu) else ""
