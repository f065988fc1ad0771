"""Spelled-out RMSNorm becomes aten.rms_norm.

    %pow_1: f32[2,7,64] = aten.pow.Tensor_Scalar(%x, 2)
    %mean: f32[2,7,1] = aten.mean.dim(%pow_1, [-1], True)
    %add: f32[2,7,1] = aten.add.Tensor(%mean, 1e-06)
    %rsqrt: f32[2,7,1] = aten.rsqrt(%add)
    %mul: f32[2,7,64] = aten.mul.Tensor(%x, %rsqrt)
    %mul_1: f32[2,7,64] = aten.mul.Tensor(@norm.weight, %mul)
    ->
    %rms_norm: f32[2,7,64] = aten.rms_norm(%x, [64], @norm.weight, 1e-06)

Recognized: squares by pow, square or x * x; rsqrt(v), v ** -0.5, 1 / sqrt(v), x / sqrt(v); up-casts to f32 and back;
no weight; a computed weight (Gemma's 1 + w stays a node). In half precision the result is rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace

aten = torch.ops.aten


def rms_norm(gm: fx.GraphModule) -> bool:
    """Put aten.rms_norm(x, [D], w, eps) for x / sqrt(mean(x^2) + eps) * w over the last dimension."""
    count = 0
    for node in list(gm.graph.nodes):
        found = _normalized(node)
        if found is not None:
            _rewrite(gm, node, *found)
            count += 1
    return matched(gm, "rms_norm", count)


def _normalized(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) where `node` is x / sqrt(mean(x^2) + eps)."""
    for x, root in _quotients(node):
        eps = _mean_square(root, x)
        if eps is not None:
            return x, eps
    return None


def _quotients(node: fx.Node) -> list[tuple[Any, Any]]:
    """(x, v) wherever `node` reads as x / sqrt(v)."""
    if m.plain_binary(node, *m.MUL):
        return [(x, v) for x, factor in m.orders(node) if (v := _under_root(factor)) is not None]
    if m.plain_binary(node, *m.DIV):
        x, root = node.args
        half = is_call(root, *m.POW) and m.is_number(root.args[1], 0.5)  # type: ignore[union-attr]
        if half or is_call(root, aten.sqrt.default):
            return [(x, root.args[0])]  # type: ignore[union-attr]
    return []


def _under_root(node: Any) -> Any:
    """v of 1 / sqrt(v), however it is written."""
    if is_call(node, aten.rsqrt.default) or (is_call(node, *m.POW) and m.is_number(node.args[1], -0.5)):
        return node.args[0]
    if is_call(node, aten.reciprocal.default):
        root = node.args[0]
    elif m.plain_binary(node, *m.DIV) and m.is_number(node.args[0], 1.0):
        root = node.args[1]
    else:
        return None
    return root.args[0] if is_call(root, aten.sqrt.default) else None


def _mean_square(node: Any, x: Any) -> float | None:
    """eps where `node` is mean(x^2) + eps over the last dimension."""
    found = m.with_constant(node, *m.ADD)
    if found is None or not is_call(found[0], aten.mean.dim):
        return None
    given = m.arguments(found[0])
    dims = given["dim"]
    last = isinstance(dims, list | tuple) and len(dims) == 1 and m.is_last(dims[0], x)
    base = _square_of(given["self"])
    if not last or not given["keepdim"] or base is None or m.skip_upcasts(base) is not m.skip_upcasts(x):
        return None
    return found[1] if isinstance(m.shape(x)[-1], int) else None


def _square_of(node: Any) -> Any:
    if is_call(node, *m.POW) and m.is_number(node.args[1], 2.0):
        return node.args[0]
    if is_call(node, aten.square.default):
        return node.args[0]
    if m.plain_binary(node, *m.MUL) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _rewrite(gm: fx.GraphModule, node: fx.Node, x: fx.Node, eps: float) -> None:
    """Replace the normalization, its weight and casts around them."""
    source = m.skip_upcasts(x)
    last, weight = _with_weight(node, m.dtype(source))
    rounded = m.only_user(last)
    if is_call(rounded, *m.CASTS) and m.dtype(rounded) == m.dtype(source) and m.dtype(source) != m.dtype(last):
        assert rounded is not None
        if weight is None or m.dtype(weight) == m.dtype(source):
            last = rounded
    with gm.graph.inserting_before(last):
        if m.dtype(source) != m.dtype(last) or (weight is not None and m.dtype(weight) != m.dtype(source)):
            source, weight = _cast(gm, x, last), None if weight is None else _cast(gm, weight, last)
        sizes = [m.shape(x)[-1]]
        new = call(gm, aten.rms_norm.default, source, sizes, weight, eps, like=last)
    replace(last, new)


def _with_weight(node: fx.Node, dtype: torch.dtype | None) -> tuple[fx.Node, fx.Node | None]:
    """(last node, weight [D]) of a normalization that a vector multiplies, perhaps after a cast to `dtype`."""
    user: Any = m.only_user(node)
    below = node
    if is_call(user, *m.CASTS) and m.dtype(user) == dtype:
        below, user = user, m.only_user(user)
    if m.plain_binary(user, *m.MUL):
        for a, b in m.orders(user):
            if a is below and m.rank(b) == 1 and m.same_size(m.shape(b)[0], m.shape(node)[-1]):
                return user, b
    return node, None


def _cast(gm: fx.GraphModule, node: fx.Node, like: fx.Node) -> fx.Node:
    """The node in the dtype of `like`."""
    if m.dtype(node) == m.dtype(like):
        return node
    return call(gm, aten._to_copy.default, node, dtype=m.dtype(like), like=like)
