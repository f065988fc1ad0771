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
    if not isinstance(fake, Tensor):
        return False
    steps = _steps(node)
    if steps is None or fake.numel() > _MOST_ELEMENTS:  # sizes are known where there are steps
        return False
    with torch.no_grad():
        tensor = _value(gm, steps)
    name = f"_constant_{node.name}"
    gm.register_buffer(name, tensor, persistent=False)
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta = {**node.meta, "val": fake}
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)
    return True


def _steps(node: fx.Node) -> list[fx.Node] | None:
    """The calls that lead to the node, itself the last, where all of it comes from the model's tensors and numbers,
    without chance or unknown sizes; else None. No recursion: graphs are thousands of calls deep."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        step = waiting.pop()
        if step in found or step.op == "get_attr":
            continue
        if not _is_fixed(step):
            return None
        found.add(step)
        waiting += step.all_input_nodes
    return sorted(found)


def _is_fixed(node: fx.Node) -> bool:
    """Does a call give the same for the same arguments, in sizes that are known?"""
    fake = node.meta.get("val")
    if node.op != "call_function" or isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    chance = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not chance and (not isinstance(fake, Tensor) or all(isinstance(s, int) for s in fake.shape))


def _value(gm: fx.GraphModule, steps: list[fx.Node]) -> Tensor:
    done: dict[fx.Node, Any] = {}

    def of(node: fx.Node) -> Any:
        return get_tensor(gm, str(node.target)) if node.op == "get_attr" else done[node]

    for step in steps:
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), of)
        done[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    found: Tensor = done[steps[-1]]
    return found
