"""Einsums of two tensors become matmul, or aten.linear where one of them is a parameter.

    %einsum: f32[2,7,4,16] = aten.einsum(bsd,dhk->bshk, [%x, @w])
    ->
    %permute: f32[4,16,64] = aten.permute(@w, [1, 2, 0])
    %reshape: f32[64,64] = aten.reshape(%permute, [64, 64])
    %linear: f32[2,7,64] = aten.linear(%x, %reshape)
    %reshape_1: f32[2,7,4,16] = aten.reshape(%linear, [2, 7, 4, 16])

Each letter of an operand stands once, is in the result or summed with the other operand's, and has one size. Other
einsums (traces, outer products, sums over one operand) stay.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace, size
from qfx.passes.linear import is_parameter

aten = torch.ops.aten

_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class _Letters:
    """The letters of two operands by what becomes of them, in the order of the first operand that has them."""

    batch: str  # in both and in the result
    summed: str  # in both, not in the result
    left: str  # in the first and in the result
    right: str  # in the second and in the result
    result: str


def einsum(gm: fx.GraphModule) -> bool:
    """Put matmul or aten.linear for einsums of two tensors."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is aten.einsum.default:
            new = _product(gm, node)
            if new is not None:
                replace(node, new)
                count += 1
    return matched(gm, "einsum", count)


def _product(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    if len(operands) != 2:
        return None
    parsed = _parse(equation, [m.rank(o) for o in operands])
    if parsed is None:
        return None
    (first, second), result = parsed
    x, y = operands
    if is_parameter(x) and not is_parameter(y):
        x, y, first, second = y, x, second, first
    letters = _sorted(first, second, result)
    if letters is None or not _one_size_each((first, x), (second, y)):
        return None
    sizes = {c: size(gm, x, i, like=node) for i, c in enumerate(first)}
    sizes |= {c: size(gm, y, i, like=node) for i, c in enumerate(second) if c not in sizes}
    as_linear = is_parameter(y) and not letters.batch and all(isinstance(sizes[c], int) for c in second)
    build = _linear if as_linear else _matmul
    return build(gm, node, (x, first), (y, second), letters, sizes)


def _parse(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """(letters of each operand, of the result), dots replaced by spare letters; None where it says something else."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    dots = 0
    for i, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        hidden = rank - len(term.replace("...", "")) if "..." in term else 0
        dots = max(dots, hidden)
        terms[i] = term.replace("...", _SPARE[:hidden])
        if hidden not in (0, dots):
            return None
    if any(c in equation for c in _SPARE):
        return None
    return terms, result.replace("...", _SPARE[:dots])


def _sorted(first: str, second: str, result: str) -> _Letters | None:
    plain = all(len(set(term)) == len(term) for term in (first, second, result))
    both = [c for c in first if c in second]
    letters = _Letters(
        batch="".join(c for c in both if c in result),
        summed="".join(c for c in both if c not in result),
        left="".join(c for c in first if c not in second),
        right="".join(c for c in second if c not in first),
        result=result,
    )
    used = letters.batch + letters.left + letters.right
    return letters if plain and letters.summed and set(used) == set(result) else None


def _one_size_each(*operands: tuple[str, Any]) -> bool:
    seen: dict[str, Any] = {}
    return all(
        m.same_size(seen.setdefault(c, length), length)
        for letters, tensor in operands
        for c, length in zip(letters, m.shape(tensor), strict=True)
    )


def _linear(gm: fx.GraphModule, node: fx.Node, x: Any, w: Any, letters: _Letters, sizes: dict[str, Any]) -> fx.Node:
    a = _arranged(gm, node, x, [*letters.left, letters.summed], sizes)
    b = _arranged(gm, node, w, [letters.right, letters.summed], sizes)
    y = call(gm, aten.linear.default, a, b, like=node)
    return _unfolded(gm, node, y, letters.left, letters.right, letters, sizes)


def _matmul(gm: fx.GraphModule, node: fx.Node, x: Any, y: Any, letters: _Letters, sizes: dict[str, Any]) -> fx.Node:
    a = _arranged(gm, node, x, [*letters.batch, letters.left, letters.summed], sizes)
    b = _arranged(gm, node, y, [*letters.batch, letters.summed, letters.right], sizes)
    z = call(gm, aten.matmul.default, a, b, like=node)
    return _unfolded(gm, node, z, letters.batch, letters.left + letters.right, letters, sizes, folds=2)


def _arranged(
    gm: fx.GraphModule, node: fx.Node, operand: tuple[fx.Node, str], groups: list[str], sizes: dict[str, Any]
) -> fx.Node:
    """The tensor with its letters in groups, each group one dimension (an empty one has size 1)."""
    tensor, have = operand
    wanted = "".join(groups)
    if wanted != have:
        tensor = call(gm, aten.permute.default, tensor, [have.index(c) for c in wanted], like=node)
    if all(len(group) == 1 for group in groups):
        return tensor
    return call(gm, aten.reshape.default, tensor, [_size(gm, node, g, sizes) for g in groups], like=node)


def _size(gm: fx.GraphModule, node: fx.Node, group: str, sizes: dict[str, Any]) -> Any:
    """The product of a group's sizes."""
    product: Any = 1
    for c in group:
        product = sizes[c] if product == 1 else _times(gm, node, product, sizes[c])
    return product


def _times(gm: fx.GraphModule, node: fx.Node, a: Any, b: Any) -> Any:
    return a * b if isinstance(a, int) and isinstance(b, int) else call(gm, operator.mul, a, b, like=node)


def _unfolded(
    gm: fx.GraphModule,
    node: fx.Node,
    tensor: fx.Node,
    kept: str,
    folded: str,
    letters: _Letters,
    sizes: dict[str, Any],
    folds: int = 1,
) -> fx.Node:
    """The result with all its letters as dimensions, in order. `folded` stands in the last `folds` dimensions."""
    single = len(letters.right) == 1 and (folds == 1 or len(letters.left) == 1)
    if not single:
        tensor = call(gm, aten.reshape.default, tensor, [sizes[c] for c in kept + folded], like=node)
    have = kept + folded
    if have == letters.result:
        return tensor
    return call(gm, aten.permute.default, tensor, [have.index(c) for c in letters.result], like=node)
