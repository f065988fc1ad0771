"""Operators without an ONNX form are retraced into simpler ones by torch's own decompositions, node by node."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qfx.backends.onnx.fold import folded
from qfx.backends.onnx.table import EMIT, op_key

Reason = Callable[[fx.GraphModule, fx.Node], str | None]


def decompose(gm: fx.GraphModule, reason_against: Reason) -> dict[fx.Node, str]:
    """Replace in place what has no ONNX form and can be written by operators that have one; returns the others with
    the reason."""
    kept: dict[fx.Node, str] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        reason = reason_against(gm, node)
        if reason is None:
            continue
        if not _replaced(gm, node, reason_against) and not folded(gm, node):
            kept[node] = reason
    return kept


def _replaced(gm: fx.GraphModule, node: fx.Node, reason_against: Reason) -> bool:
    simpler = _retraced(node)
    if simpler is None or any(
        reason_against(simpler, n) is not None for n in simpler.graph.nodes if n.op == "call_function"
    ):
        return False
    inputs = dict(zip((n for n in simpler.graph.nodes if n.op == "placeholder"), node.all_input_nodes, strict=True))
    copies: dict[fx.Node, Any] = dict(inputs)
    with gm.graph.inserting_before(node):
        for inner in simpler.graph.nodes:
            if inner.op == "output":
                _rewire(gm, node, fx.node.map_arg(inner.args[0], lambda n: copies[n]))
            elif inner.op != "placeholder":
                copies[inner] = _copy(gm, node, inner, simpler, copies)
    return True


def _copy(
    gm: fx.GraphModule, node: fx.Node, inner: fx.Node, simpler: fx.GraphModule, copies: dict[fx.Node, Any]
) -> fx.Node:
    copy = gm.graph.node_copy(inner, lambda n: copies[n])
    if inner.op == "get_attr":
        name = f"_constant_{copy.name}"
        gm.register_buffer(name, getattr(simpler, str(inner.target)), persistent=False)
        copy.target = name
    meta: dict[str, Any] = {
        k: node.meta[k] for k in ("stack_trace", "nn_module_stack", "qfx_module", "custom") if k in node.meta
    }
    copy.meta = {**inner.meta, **meta}
    return copy


def _rewire(gm: fx.GraphModule, node: fx.Node, result: Any) -> None:
    if isinstance(result, list | tuple):
        for user in list(node.users):
            place = user.args[1]
            assert isinstance(place, int), f"{user} takes no one result of {node}"
            user.replace_all_uses_with(result[place])
            gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


@cache
def _rules() -> dict[Any, Any]:
    """Torch's decompositions of what has no ONNX form itself."""
    return {op: rule for op, rule in core_aten_decompositions().items() if op_key(op) not in EMIT}


def _retraced(node: fx.Node) -> fx.GraphModule | None:
    """The node as a graph of simpler functional operators, its inputs as placeholders; None where torch has none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    inputs = node.all_input_nodes
    if any("val" not in n.meta for n in inputs):
        return None
    fakes = [n.meta["val"] for n in inputs]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)

    def function(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        return target(*args, **kwargs)

    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            traced = make_fx(torch.func.functionalize(function), decomposition_table=_rules())(*fakes)
    except Exception:  # noqa: BLE001  (whatever torch's tracing raises, there is no simpler form, which callers tell)
        return None
    traced.graph.eliminate_dead_code()
    return traced if any(n.op == "call_function" and n.target is not target for n in traced.graph.nodes) else None
