"""Annotated nodes become qfx:: ops with packed weights.

    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=i8/tok w=i8/ch
    ->
    %linear: f32[2,3] = qfx.linear(%x, @fc.w_codes, @fc.w_scale, None, @fc.bias, None, None, None, i8/tok, i8/ch)

A weight of several formats (see `qfx.live.segments`) becomes one op for each segment: of rows, whose results are
joined,

    %linear: f32[2,4] = aten.linear(%x, @fc.weight)  # w=[i4/ch,i8/ch]
    ->
    %linear_1: f32[2,2] = qfx.linear(%x, @fc.rows0_codes, @fc.rows0_scale, ..., i4/ch)  # w=i4/ch
    %linear_2: f32[2,2] = qfx.linear(%x, @fc.rows1_codes, @fc.rows1_scale, ..., i8/ch)  # w=i8/ch
    %linear: f32[2,4] = aten.cat([%linear_1, %linear_2], 1)

or of columns (`columns0_codes`, ...), each of its slice of the input, whose results are added.
A weight that several nodes read in one format is packed once. For attention see `quantize_attention`. `refuse` says
beforehand what has no such op.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import qfx.ops.floats
import qfx.ops.packed  # noqa: F401  (registers torch.ops.qfx)
from qfx import annotation, graph
from qfx.annotation import Formats
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.format import Format
from qfx.live.segments import Segment, along, pieces, segments, stem_of, take
from qfx.packing import Packed
from qfx.passes._build import call, plain, take_place
from qfx.passes._calibrated import calibrated
from qfx.passes._sites import holds
from qfx.passes.quantize_attention import is_attention, quantize_attention, reason_against
from qfx.recipe import is_static
from qfx.rounding import rounded

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


def _refusal(node: fx.Node, role: str, fmt: Formats) -> str | None:
    """Why no op serves this role of a node, or None."""
    name = graph.schema_name(node)
    if is_attention(node):
        return reason_against(node, role, fmt)
    if "conv" in name:
        return "a convolution whose windows overlap in more than one dimension, or are not plain, runs in float"
    if name not in _BUILD or role not in ("w", "x") or (role == "x" and name == "aten::embedding"):
        return f"no op takes a format for role {role!r}"
    if role == "w" and name != "aten::linear" and not isinstance(fmt, Format):
        return "only the weight of a linear takes several formats"
    if role == "x" and "w" not in annotation.get(node):
        return "an input is quantized only where the weight is, too"
    if role == "x" and name == "qfx::grouped_linear" and isinstance(fmt, Format) and is_static(fmt):
        return "experts take only input formats whose scale is found at run time"
    return None


def quantize(
    gm: fx.GraphModule, *, tensors: Mapping[str, Tensor], rounding: str = "rtn", pack: Pack | None = None
) -> bool:
    """Put qfx:: ops in place of every attention that is annotated, and every node annotated with a weight format.

    tensors: calibrated values by "<FQN>/x_scale", "<FQN>/x_zero" (static activation formats), and weights that were
    rounded beforehand (see `qfx.rounding.rounded`). rounding: how the others are rounded ("rtn", "mse"). pack: packs a
    weight, to share packed weights between graphs.
    Raises UnsupportedError where a static format has no scale, ValueError where a weight holds NaN or Inf or cannot be
    cut into as many parts as it has formats.
    """
    pack = pack or (lambda weight, fmt, name: rounded.pack(tensors, weight, fmt, rounding, name=name))
    done: dict[Any, tuple[str, Packed]] = {}
    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        formats = annotation.get(node)
        if formats and is_attention(node):
            quantize_attention(gm, node, tensors)
            changed = True
            continue
        w = formats.get("w")
        build = _BUILD.get(graph.schema_name(node))
        if w is None or build is None:
            continue
        x = formats.get("x")
        if not isinstance(x, Format | None) or not (isinstance(w, Format) or build is _linear):
            raise UnsupportedError(
                explain(
                    "only the weight of a linear takes several formats",
                    found=annotation.text(node),
                    node=node,
                    next_step="annotate each role with one format",
                )
            )
        changed = True
        if build is _linear:
            found = segments(w, graph.val(node.args[1]).shape, graph.fqn_of(node))
            if len(found) > 1:
                weights = [_packed_nodes(gm, node, s.format, pack, done, i, w, s) for i, s in enumerate(found)]
                (_columns if along(w) else _rows)(gm, node, weights, x, found, tensors)
                continue
            w = found[0].format
        assert isinstance(w, Format)
        build(gm, node, _packed_nodes(gm, node, w, pack, done), x, w, tensors)
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
    gm: fx.GraphModule, node: fx.Node, fmt: Format, pack: Pack, done: dict[Any, tuple[str, Packed]],
    number: int = 0, whole: Formats | None = None, segment: Segment | None = None,
) -> list[fx.Node | None]:  # fmt: skip
    """get_attr nodes of codes, scale and zero point for the weight of a node; the same weight is packed once.

    number, whole, segment: of a weight of several formats, all of which are `whole`.
    """
    operand = node.args[0 if node.target is aten.embedding.default else 1]
    assert isinstance(operand, fx.Node)
    source = graph.weight_of(node)
    assert source is not None
    axis = None if whole is None else along(whole)
    stem = stem_of(axis, number)
    key = (source.target, str(fmt), _chain(operand), axis, segment)
    if key not in done:
        value, name = weight_value(gm, operand), graph.fqn_of(node)
        held = value
        if axis is not None and segment is not None:
            value, name = take(value, segment, axis), f"{name}.{stem}"
        done[key] = (base_name(node) + stem, pack(value, fmt, name).beside(held))
    stem, packed = done[key]
    named = {"codes": packed.data, "scale": packed.scale, "zero": packed.zero}
    return [_held(gm, f"{stem}_{part}", tensor, node) for part, tensor in named.items()]


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
    take_place(node, new)


def _static(
    gm: fx.GraphModule, node: fx.Node, x: Format | None, tensors: Mapping[str, Tensor]
) -> tuple[fx.Node | None, fx.Node | None]:
    """get_attr nodes of x_scale and x_zero."""
    if x is None or not is_static(x):
        return None, None
    fqn, base = graph.fqn_of(node), base_name(node)
    what, instead = "a static activation format", " or use a dynamic format such as i8/tok"
    scale, zero = calibrated(tensors, fqn, "x", x, node, what=what, instead=instead)
    return _held(gm, f"{base}x_scale", scale, node), _held(gm, f"{base}x_zero", zero, node)


def _input(node: fx.Node) -> tuple[Any, Any]:
    """(what is multiplied by a weight, the vector that divides it first or None)."""
    return node.args[0].args if is_smoothed(node.args[0]) else (node.args[0], None)  # type: ignore[union-attr, return-value]


def _linear(
    gm: fx.GraphModule, node: fx.Node, weight: list[Any], x: Format | None, w: Format, tensors: Mapping[str, Tensor]
) -> None:
    scale, zero = _static(gm, node, x, tensors)
    value, smooth = _input(node)
    args = (value, *weight, _bias(node), scale, zero, smooth, str(x) if x else "", str(w))
    _replace(gm, node, torch.ops.qfx.linear.default, args)


def _rows(
    gm: fx.GraphModule, node: fx.Node, weights: list[list[Any]], x: Format | None, found: list[Segment],
    tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """One op for each segment of output rows; their results in order, then the bias."""
    value, smooth = _input(node)
    static = _static(gm, node, x, tensors)
    parts = [
        _segment(gm, node, (value, *weight, None, *static, smooth), x, segment.format)
        for weight, segment in zip(weights, found, strict=True)
    ]
    axis = parts[0].meta["val"].dim() - 1
    cut = [
        parts[i] if (start, stop) == (0, found[i].size) else _cut(gm, parts[i], axis, start, stop, node)
        for i, start, stop in pieces(found)
    ]
    whole = plain(call(gm, aten.cat.default, cut, axis, like=node))
    bias = _bias(node)
    take_place(node, whole if bias is None else plain(call(gm, aten.add.Tensor, whole, bias, like=node)))


def _columns(
    gm: fx.GraphModule, node: fx.Node, weights: list[list[Any]], x: Format | None, found: list[Segment],
    tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """One op for each segment of input columns, of its part of the input; their results added, bias in the first."""
    value: Any = node.args[0]
    static = _static(gm, node, x, tensors)
    axis = value.meta["val"].dim() - 1
    total: fx.Node | None = None
    for weight, segment in zip(weights, found, strict=True):
        given = (None, None) if segment.float_input else static
        own = [s if s is None or not s.meta["val"].dim() else _taken(gm, s, 0, segment, node) for s in given]
        bias = _bias(node) if total is None else None
        args = (_taken(gm, value, axis, segment, node), *weight, bias, *own, None)
        part = _segment(gm, node, args, None if segment.float_input else x, segment.format)
        total = part if total is None else plain(call(gm, aten.add.Tensor, total, part, like=node))
    assert total is not None
    take_place(node, total)


def _segment(gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], x: Format | None, w: Format) -> fx.Node:
    """The op of one segment, annotated with its own formats."""
    part = call(gm, torch.ops.qfx.linear.default, *args, str(x) if x else "", str(w), like=node)
    annotation.set(part, "w", w)
    return part


def _taken(gm: fx.GraphModule, value: fx.Node, axis: int, segment: Segment, like: fx.Node) -> fx.Node:
    """The part of a value that a segment of columns reads."""
    cut = [_cut(gm, value, axis, start, stop, like) for start, stop in segment.ranges]
    return cut[0] if len(cut) == 1 else plain(call(gm, aten.cat.default, cut, axis, like=like))


def _cut(gm: fx.GraphModule, value: fx.Node, axis: int, start: int, stop: int, like: fx.Node) -> fx.Node:
    return plain(call(gm, aten.slice.Tensor, value, axis, start, stop, like=like))


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


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
