"""Annotated nodes become qfx:: ops with packed weights.

    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=i8/tok w=i8/ch
    ->
    %linear: f32[2,3] = qfx.linear(%x, @fc.w_codes, @fc.w_scale, None, @fc.bias, None, None, None, i8/tok, i8/ch)

A weight that several nodes read in one format is packed once. `refuse` says beforehand what has no such op.
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
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.format import Format
from qfx.packing import Packed
from qfx.parts import round_in_parts
from qfx.passes._sites import holds
from qfx.recipe import is_static

aten = torch.ops.aten
Pack = Callable[[Tensor, Format, str], Packed]


def refuse(gm: fx.GraphModule) -> list[Note]:
    """Take off the annotations that no qfx:: op serves, so that what stays is what runs. A note for each such node."""
    notes = []
    for node in gm.graph.nodes:
        formats = annotation.get(node) if node.op == "call_function" else {}
        reasons = {role: reason for role, fmt in formats.items() if (reason := _refusal(node, role, fmt))}
        if not reasons:
            continue
        asked = " ".join(word for word in annotation.text(node).split(" ") if word.split("=")[0] in reasons)
        for role in reasons:
            annotation.clear(node, role)
        why = "; ".join(dict.fromkeys(reasons.values()))
        step = "leave it out of the recipe (format 'none', or Recipe.ignore)"
        notes.append(Note(graph.fqn_of(node), f"{asked} was asked, but {why}", step, source_line(node) or ""))
    return notes


def _refusal(node: fx.Node, role: str, fmt: Format | annotation.PerHead) -> str | None:
    """Why no op serves this role of a node, or None."""
    name = graph.schema_name(node)
    if "attention" in name:
        return "attention runs in float"
    if "conv" in name:
        return "a convolution whose windows overlap in more than one dimension, or are not plain, runs in float"
    if name not in _BUILD or role not in ("w", "x") or (role == "x" and name == "aten::embedding"):
        return f"no op takes a format for role {role!r}"
    if role == "x" and "w" not in annotation.get(node):
        return "an input is quantized only where the weight is, too"
    if role == "x" and name == "qfx::grouped_linear" and isinstance(fmt, Format) and is_static(fmt):
        return "experts take only input formats whose scale is found at run time"
    return None


def quantize(
    gm: fx.GraphModule, *, tensors: Mapping[str, Tensor], rounding: str = "rtn", pack: Pack | None = None
) -> bool:
    """Put qfx:: ops in place of every node annotated with a weight format.

    tensors: calibrated values by "<FQN>/x_scale", "<FQN>/x_zero" (static activation formats).
    rounding: how weights are rounded ("rtn", "mse"). pack: packs a weight, to share packed weights between graphs.
    Raises UnsupportedError where a static format has no scale, ValueError where a weight holds NaN or Inf.
    """
    pack = pack or (lambda weight, fmt, name: round_in_parts(weight, fmt, rounding, name=name))
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
        x = formats.get("x")
        if isinstance(w, tuple) or isinstance(x, tuple):
            raise UnsupportedError(
                explain(
                    "roles x and w of this node take one format each",
                    found=f"formats per head, {annotation.text(node)}",
                    node=node,
                    next_step="annotate each role with one format",
                )
            )
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


def base_name(node: fx.Node) -> str:
    """Prefix of a node's packed tensors: the owner of its weight, and the weight's name where that is not `weight`."""
    fqn = graph.fqn_of(node)
    source = graph.weight_of(node)
    assert source is not None
    if fqn == "weight":
        return ""
    held = str(source.target)
    return f"{fqn}_" if held == fqn else f"{fqn}."


def is_smoothed(x: Any) -> bool:
    """Is it an explicit smoothing division, x [.., K] by a vector [K] named `smooth`, that qfx::linear takes over?"""
    if not graph.is_call(x, aten.div.Tensor):
        return False
    value, factor = x.args
    if not (isinstance(factor, fx.Node) and factor.op == "get_attr" and _SMOOTH.search(str(factor.target))):
        return False
    before, after, divisor = graph.val(value), graph.val(x), graph.val(factor)
    return isinstance(before, Tensor) and before.dtype == after.dtype and divisor.shape == after.shape[-1:]


_SMOOTH = re.compile(r"(^|[._])smooth$")


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
        done[key] = (base_name(node), pack(weight_value(gm, operand), fmt, graph.fqn_of(node)))
    base, packed = done[key]
    named = {"w_codes": packed.data, "w_scale": packed.scale, "w_zero": packed.zero}
    return [_held(gm, f"{base}{leaf}", tensor, node) for leaf, tensor in named.items()]


def _held(gm: fx.GraphModule, name: str, tensor: Tensor | None, node: fx.Node) -> fx.Node | None:
    """A get_attr of `tensor` under `name`, or under `name_1`, ... where the graph holds another tensor under it."""
    if tensor is None:
        return None
    free, number = name, 0
    while holds(gm, free) and graph.get_tensor(gm, free) is not tensor:
        number += 1
        free = f"{name}_{number}"
    return graph.add_tensor(gm, free, tensor, node)


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
    if x is None or not is_static(x):
        return None, None
    fqn, base = graph.fqn_of(node), base_name(node)
    scale, zero = (tensors.get(f"{fqn}/{leaf}") for leaf in ("x_scale", "x_zero"))
    if scale is None or (x.has_zero and zero is None):
        raise UnsupportedError(
            explain(
                "a static activation format needs a calibrated scale",
                expected=f"{'x_scale' if scale is None else 'x_zero'} of {fqn!r} for format '{x}'",
                found="none",
                node=node,
                next_step="calibrate with qfx.quantize(model, recipe, data=...) or use a dynamic format such as i8/tok",
            )
        )
    return _held(gm, f"{base}x_scale", scale, node), _held(gm, f"{base}x_zero", zero, node)


def _linear(
    gm: fx.GraphModule, node: fx.Node, weight: list[Any], x: Format | None, w: Format, tensors: Mapping[str, Tensor]
) -> None:
    scale, zero = _static(gm, node, x, tensors)
    value: Any = node.args[0]
    smooth = None
    if is_smoothed(value):
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
