"""Values that depend on no input: where ONNX has no form for an operator, torch computes them once, at lowering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import get_tensor

_MOST_ELEMENTS = 1 << 22


def folded(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Replace a node whose result is always the same tensor by that tensor. Says whether it did."""
    fake = node.meta.get("val")
    if not isinstance(fake, Tensor) or fake.numel() > _MOST_ELEMENTS or not _is_constant(node, {}):
        return False
    with torch.no_grad():
        tensor = _value(gm, node, {})
    name = f"_constant_{node.name}"
    gm.register_buffer(name, tensor, persistent=False)
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta = {**node.meta, "val": fake}
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)
    return True


def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Does all that leads to the node come from the model's tensors and numbers, without chance or unknown sizes?"""
    if node in known:
        return known[node]
    fake = node.meta.get("val")
    static = not isinstance(fake, Tensor) or all(isinstance(s, int) for s in fake.shape)
    if node.op != "call_function":
        known[node] = node.op == "get_attr"
    else:
        chance = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]
        numbers = isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool)
        known[node] = static and not chance and not numbers and all(_is_constant(a, known) for a in inputs)
    return known[node]


def _value(gm: fx.GraphModule, node: fx.Node, done: dict[fx.Node, Any]) -> Any:
    if node not in done:
        if node.op == "get_attr":
            done[node] = get_tensor(gm, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(gm, n, done))
            done[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return done[node]
