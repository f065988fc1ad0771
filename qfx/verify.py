"""The verifier: what must hold of a graph in normal form after every pass."""

from __future__ import annotations

import torch
from torch import fx

from qfx import annotation, graph


def verify(gm: fx.GraphModule) -> None:
    """Check a graph in normal form.

    The graph lints; inputs come first; every operator is functional; every node carries a value; each get_attr names
    a tensor that exists and has the shape and dtype the graph says. What does not hold is a fault of ours:
    AssertionError, or RuntimeError from lint. Annotations can be read, else ValueError: the user may have written them.
    """
    gm.graph.lint()
    seen_call = False
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            assert not seen_call, f"input {node.name} stands after a call"
            assert "val" in node.meta, f"input {node.name} carries no value"
        elif node.op == "get_attr":
            _check_parameter(gm, node)
        elif node.op == "call_function":
            seen_call = True
            _check_call(node)
        else:
            assert node.op == "output", f"{node.name}: {node.op} has no place in the normal form"


def _check_parameter(gm: fx.GraphModule, node: fx.Node) -> None:
    tensor = graph.get_tensor(gm, str(node.target))
    value = node.meta.get("val")
    assert isinstance(value, torch.Tensor), f"{node.name} carries no value"
    assert tuple(value.shape) == tuple(tensor.shape) and value.dtype == tensor.dtype, (
        f"{node.name}: the graph says {value.dtype} {tuple(value.shape)}, {node.target} is {tensor.dtype} "
        f"{tuple(tensor.shape)}"
    )


def _check_call(node: fx.Node) -> None:
    assert "val" in node.meta, f"{node.name} ({node.target}) carries no value"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        assert not target._schema.is_mutable, f"{node.name}: {target} changes its input; the normal form is functional"
    annotation.get(node)
