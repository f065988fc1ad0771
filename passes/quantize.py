"""Annotated nodes become qfx:: ops with packed weights.

    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=i8/tok w=i8/ch
    ->
    %linear: f32[2,3] = qfx.linear(%x, @fc.w_codes, @fc.w_scale, None, @fc.bias, None, None, None, i8/tok, i8/ch)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import qfx.float_ops
import qfx.ops  # noqa: F401  (registers torch.ops.qfx)
from qfx import annotation, graph
from qfx.errors import UnsupportedError, explain
from qfx.format import Format
from qfx.packing import Packed
from qfx.rounding import round_weight

aten = torch.ops.aten
Pack = Callable[[Tensor, Format, str], Packed]


def quantize(gm: fx.GraphModule, *, tensors: Mapping[str, Tensor], rounding: str = "rtn", pack: Pack | None = None) -> bool:
    """Put qfx:: ops in place of every node annotated with a weight format.

    tensors: calibrated values by "<FQN>/x_scale", "<FQN>/x_zero", "<FQN>/smooth" (static activation formats).
    rounding: how weights are rounded ("rtn", "mse"). pack: packs a weight (given to share packed weights between graphs).
    Raises UnsupportedError where a static format has no scale, ValueError where a weight holds NaN or Inf.
    """
    pack = pack or (lambda weight, fmt, name: round_weight(weight, fmt, rounding, name=name))
    packed: dict[Any, tuple[str, Packed]] = {}
    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        formats = annotation.get(node)
        w = formats.get("w")
        build = _BUILD.get(graph.schema_name(node))
        if w is None or build is None:
            continue
        if not isinstance(w, Format):
            raise UnsupportedError(
                explain(
                    "this version packs one format per weight",
                    found=f"{len(w)} formats, one per head",
                    node=node,
                    next_step="annotate role w with one format",
                )
            )
        x = formats.get("x")
        assert x is None or isinstance(x, Format)
        weight = _packed_nodes(gm, node, w, pack, packed)
        build(gm, node, weight, x, w, tensors)
        changed = True
    if changed:
        _forget_unused(gm)
    return changed


def weight_value(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The real tensor behind a weight operand: a get_attr, or views and casts of one."""
    if node.op == "get_attr":
        return graph.get_tensor(gm, str(node.target)).detach()
    assert node.op == "call_function", node
    args = torch.fx.map_arg(node.args, lambda n: weight_value(gm, n))
    kwargs = torch.fx.map_arg(node.kwargs, lambda n: weight_value(gm, n))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    assert isinstance(result, Tensor)
    return result


def base_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """Prefix of the packed tensors of a node: the owner of its weight, with the weight's own name where it is not `weight`."""
    fqn = graph.fqn_of(node)
    source = graph.weight_of(node)
    assert source is not None
    if fqn == "weight":
        return ""
    held = str(source.target)
    return f"{fqn}_" if held == fqn else f"{fqn}."


def is_smooth(node: Any) -> bool:
    """Is it the vector of an explicit smoothing division?"""
    return isinstance(node, fx.Node) and node.op == "get_attr" and bool(re.search(r"(^|[._])smooth$", str(node.target)))


def _packed_nodes(
    gm: fx.GraphModule, node: fx.Node, fmt: Format, pack: Pack, done: dict[Any, tuple[str, Packed]]
) -> list[fx.Node | None]:
    """get_attr nodes of codes, scale and zero point for the weight of a node; the same weight is packed once."""
    operand = node.args[0 if node.target is aten.embedding.default else 1]
    assert isinstance(operand, fx.Node)
    source = graph.weight_of(node)
    assert source is not None
    key = (source.target, str(fmt), _chain(operand))
    if key not in done:
        base = base_name(gm, node)
        done[key] = (base, pack(weight_value(gm, operand), fmt, graph.fqn_of(node)))
    base, packed = done[key]
    named = {"w_codes": packed.data, "w_scale": packed.scale, "w_zero": packed.zero}
    return [None if t is None else graph.add_tensor(gm, f"{base}{leaf}", t, node) for leaf, t in named.items()]


def _chain(node: fx.Node) -> str:
    if node.op == "get_attr":
        return ""
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    return f"{_chain(inner)}|{node.target}{node.args[1:]}"


def _forget_unused(gm: fx.GraphModule) -> None:
    """Let go of weights that no node reads any more, so that they do not stay in memory."""
    before = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    graph.clean(gm)
    for name in before - {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}:
        *path, leaf = name.split(".")
        delattr(gm.get_submodule(".".join(path)) if path else gm, leaf)


def _replace(gm: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    new.name = node.name


def _static(
    gm: fx.GraphModule, node: fx.Node, x: Format | None, tensors: Mapping[str, Tensor]
) -> tuple[fx.Node | None, fx.Node | None]:
    """get_attr nodes of x_scale and x_zero."""
    fqn, base = graph.fqn_of(node), base_name(gm, node)
    found = {leaf: tensors.get(f"{fqn}/{leaf}") for leaf in ("x_scale", "x_zero")}
    if x is None or x.dynamic or x.is_plain:
        return None, None
    if found["x_scale"] is None:
        raise UnsupportedError(
            explain(
                "a static activation format needs a calibrated scale",
                expected=f"a scale for {fqn!r}",
                found="none",
                node=node,
                next_step="calibrate with qfx.quantize(model, recipe, data=...) or use a dynamic format such as i8/tok",
            )
        )
    nodes = [None if t is None else graph.add_tensor(gm, f"{base}{leaf}", t, node) for leaf, t in found.items()]
    return nodes[0], nodes[1]


def _linear(
    gm: fx.GraphModule, node: fx.Node, weight: list[Any], x: Format | None, w: Format, tensors: Mapping[str, Tensor]
) -> None:
    scale, zero = _static(gm, node, x, tensors)
    value, smooth = node.args[0], None
    if graph.is_call(value, aten.div.Tensor) and is_smooth(value.args[1]):
        value, smooth = value.args
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    args = (value, *weight, bias, scale, zero, smooth, str(x) if x else "", str(w))
    _replace(gm, node, torch.ops.qfx.linear.default, args)


def _embedding(
    gm: fx.GraphModule, node: fx.Node, weight: list[Any], x: Format | None, w: Format, tensors: Mapping[str, Tensor]
) -> None:
    value = node.meta["val"]
    args = (node.args[1], *weight, str(w), value.shape[-1], value.dtype)
    _replace(gm, node, torch.ops.qfx.embedding.default, args)


def _grouped(
    gm: fx.GraphModule, node: fx.Node, weight: list[Any], x: Format | None, w: Format, tensors: Mapping[str, Tensor]
) -> None:
    args = (node.args[0], *weight, node.args[2], str(x) if x else "", str(w))
    _replace(gm, node, torch.ops.qfx.grouped_linear_quant.default, args)


_BUILD: dict[str, Callable[..., None]] = {
    "aten::linear": _linear,
    "aten::embedding": _embedding,
    "qfx::grouped_linear": _grouped,
}
