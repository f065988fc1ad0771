"""Complex numbers become pairs of real tensors, which every backend computes with.

    %polar: torch.complex64[7,8] = aten.polar(%ones, %angles)
    %view_as_complex: torch.complex64[2,7,8] = aten.view_as_complex(%x)
    %mul: torch.complex64[2,7,8] = aten.mul.Tensor(%view_as_complex, %polar)
    %view_as_real: f32[2,7,8,2] = aten.view_as_real(%mul)
    ->
    %cos: f32[7,8] = aten.cos(%angles)
    %sin: f32[7,8] = aten.sin(%angles)
    %select: f32[2,7,8] = aten.select.int(%x, -1, 0)
    %select_1: f32[2,7,8] = aten.select.int(%x, -1, 1)
    %mul: f32[2,7,8] = aten.mul.Tensor(%select, %cos)
    %mul_1: f32[2,7,8] = aten.mul.Tensor(%select_1, %sin)
    %sub: f32[2,7,8] = aten.sub.Tensor(%mul, %mul_1)
    %mul_2: f32[2,7,8] = aten.mul.Tensor(%select, %sin)
    %mul_3: f32[2,7,8] = aten.mul.Tensor(%select_1, %cos)
    %add: f32[2,7,8] = aten.add.Tensor(%mul_2, %mul_3)
    %stack: f32[2,7,8,2] = aten.stack([%sub, %add], -1)

So Llama 4 and DeepSeek-V2 write rotary position embeddings. What is complex is made real only together with all that
it comes from and all that reads it: Fourier transforms, complex parameters, inputs and outputs stay as they are, with
what is computed of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val
from qfx.passes import _match as m
from qfx.passes._build import call, matched
from qfx.passes._build import replace as substitute

aten = torch.ops.aten

Pair = tuple[Any, Any]  # the real and the imaginary part; that of a real operand is None
Build = Callable[..., fx.Node]
Parts = Callable[[Any], Pair]

# They bring each element somewhere, whatever it is.
_MOVES = (
    *m.RESHAPES, *m.TRANSPOSES, *m.SAME_VALUE, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints, aten.unflatten.int,
    aten.repeat.default, aten.index_select.default, aten.index.Tensor, aten.neg.default,
)  # fmt: skip
_EXITS = (aten.view_as_real.default, aten.real.default, aten.imag.default, aten.abs.default, aten.sym_size.int)


def complex_pairs(gm: fx.GraphModule) -> bool:
    """Compute the real and the imaginary part of what is complex."""
    nodes = _closed([n for n in gm.graph.nodes if _is_complex(n)])
    pairs: dict[Any, Pair] = {}
    for node in nodes:
        pairs[node] = _parts(gm, node, lambda x: pairs.get(x, (x, None)))
    for node in nodes:
        for reader in [user for user in node.users if user not in pairs]:
            _leave(gm, reader, *pairs[node])
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return matched(gm, "complex_pairs", len(nodes))


def _is_complex(value: Any) -> bool:
    held = val(value) if isinstance(value, fx.Node) else None
    return isinstance(held, Tensor) and held.is_complex()


def _closed(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those that are known, computed from and read by known ones alone."""
    kept = {n for n in nodes if _is_known(n) and all(_is_complex(u) or is_call(u, *_EXITS) for u in n.users)}
    lost = [n for n in nodes if n not in kept]
    while lost:
        node = lost.pop()
        beside = [n for n in (*node.all_input_nodes, *node.users) if n in kept]
        kept.difference_update(beside)
        lost += beside
    return [n for n in nodes if n in kept]


def _is_known(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _PARTS:
        return False
    if node.target in (*m.ADD, *m.SUB):  # a part that is not added to has the shape of the sum all the same
        whole = all(m.same_sizes(m.shape(x), m.shape(node)) for x in node.args[:2])
        return m.plain_binary(node, *m.ADD, *m.SUB) and whole
    if node.target is aten.complex.default:
        return m.same_sizes(m.shape(node.args[0]), m.shape(node.args[1]))
    return not any(isinstance(x, complex) for x in node.args)


def _parts(gm: fx.GraphModule, node: fx.Node, of: Parts) -> Pair:
    """The parts of a complex node, in the dtype that its own have, or float32 of those of half precision."""

    def build(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(gm, target, *args, like=node, **kwargs)

    dtype = torch.float64 if val(node).dtype == torch.complex128 else torch.float32
    found = _PARTS[node.target](build, node, of)
    real, imaginary = (p if m.dtype(p) == dtype else build(aten._to_copy.default, p, dtype=dtype) for p in found)
    return real, imaginary


def _leave(gm: fx.GraphModule, reader: fx.Node, real: fx.Node, imaginary: fx.Node) -> None:
    """A real result of a complex node, from its parts. A length is a norm: at 0, too, it has the gradient 0, which
    that of hypot has not."""

    def build(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(gm, target, *args, like=reader, **kwargs)

    if reader.target is aten.view_as_real.default:
        new = build(aten.stack.default, [real, imaginary], -1)
    elif reader.target is aten.abs.default:
        new = build(aten.linalg_vector_norm.default, build(aten.stack.default, [real, imaginary], -1), 2.0, [-1])
    elif reader.target is aten.sym_size.int:
        new = build(aten.sym_size.int, real, reader.args[1])
    else:
        new = real if reader.target is aten.real.default else imaginary
    if isinstance(val(reader), Tensor) and m.dtype(new) != m.dtype(reader):  # half precision
        new = build(aten._to_copy.default, new, dtype=m.dtype(reader))
    substitute(reader, new)


def _polar(build: Build, node: fx.Node, of: Parts) -> Pair:
    length, angle = node.args[:2]
    cos, sin = build(aten.cos.default, angle), build(aten.sin.default, angle)
    ones = m.is_number(length, 1.0) or is_call(length, aten.ones_like.default, aten.ones.default)
    if ones and m.same_sizes(m.shape(angle), m.shape(node)):
        return cos, sin
    return build(aten.mul.Tensor, cos, length), build(aten.mul.Tensor, sin, length)


def _side_by_side(build: Build, node: fx.Node, of: Parts) -> Pair:
    x = node.args[0]
    return build(aten.select.int, x, -1, 0), build(aten.select.int, x, -1, 1)


def _moved(build: Build, node: fx.Node, of: Parts) -> Pair:
    real, imaginary = (build(node.target, p, *node.args[1:], **node.kwargs) for p in of(node.args[0]))
    return real, imaginary


def _conjugate(build: Build, node: fx.Node, of: Parts) -> Pair:
    real, imaginary = of(node.args[0])
    return real, build(aten.neg.default, imaginary)


def _sum(build: Build, node: fx.Node, of: Parts) -> Pair:
    (a, b), (c, d) = (of(x) for x in node.args[:2])
    if d is None:
        return build(node.target, a, c), b
    if b is None:
        return build(node.target, a, c), d if node.target in m.ADD else build(aten.neg.default, d)
    return build(node.target, a, c), build(node.target, b, d)


def _product(build: Build, node: fx.Node, of: Parts) -> Pair:
    def times(x: Any, y: Any) -> fx.Node:
        return build(aten.mul.Tensor, x, y)

    (a, b), (c, d) = sorted((of(x) for x in node.args[:2]), key=lambda pair: pair[1] is None)
    if d is None:
        return times(a, c), times(b, c)
    real = build(aten.sub.Tensor, times(a, c), times(b, d))
    return real, build(aten.add.Tensor, times(a, d), times(b, c))


_PARTS: dict[Any, Callable[[Build, fx.Node, Parts], Pair]] = {
    aten.polar.default: _polar,
    aten.complex.default: lambda build, node, of: (node.args[0], node.args[1]),
    aten.view_as_complex.default: _side_by_side,
    aten._conj.default: _conjugate,
    aten.conj.default: _conjugate,
    aten.resolve_conj.default: _moved,
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys((*m.ADD, *m.SUB), _sum),
    **dict.fromkeys(m.MUL, _product),
}
