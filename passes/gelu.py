"""Spelled-out activations become one operator: aten.gelu (erf or tanh), aten.silu, qfx::quick_gelu.

    %mul: f32[2,96] = aten.mul.Tensor(%x, 0.5)
    %pow_1: f32[2,96] = aten.pow.Tensor_Scalar(%x, 3.0)
    %mul_1: f32[2,96] = aten.mul.Tensor(%pow_1, 0.044715)
    %add: f32[2,96] = aten.add.Tensor(%x, %mul_1)
    %mul_2: f32[2,96] = aten.mul.Tensor(%add, 0.7978845608028654)
    %tanh: f32[2,96] = aten.tanh(%mul_2)
    %add_1: f32[2,96] = aten.add.Tensor(%tanh, 1.0)
    %mul_3: f32[2,96] = aten.mul.Tensor(%mul, %add_1)
    ->
    %gelu: f32[2,96] = aten.gelu(%x, approximate=tanh)

There are many spellings, so the arithmetic around each tanh, erf and sigmoid is read as a function of one tensor and
compared with the known activations on sample points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val
from qfx.ops import floats as float_ops
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace

aten = torch.ops.aten

_CORES = (aten.tanh.default, aten.erf.default, aten.sigmoid.default)
_ARITHMETIC = (*m.ADD, *m.SUB, *m.MUL, *m.DIV, *m.POW, aten.neg.default, aten.square.default, aten.rsub.Scalar)
_ELEMENTWISE = (*_CORES, *_ARITHMETIC, *m.CASTS)
_DEPTH = 8  # operations on one side of the core
_SAMPLES = torch.linspace(-9.0, 9.0, 61, dtype=torch.float64)
_KNOWN: tuple[tuple[Any, dict[str, str], Tensor], ...] = (
    (aten.gelu.default, {}, aten.gelu.default(_SAMPLES)),
    (aten.gelu.default, {"approximate": "tanh"}, aten.gelu.default(_SAMPLES, approximate="tanh")),
    (aten.silu.default, {}, aten.silu.default(_SAMPLES)),
    (torch.ops.qfx.quick_gelu.default, {}, float_ops.quick_gelu(_SAMPLES)),
)


def gelu(gm: fx.GraphModule) -> bool:
    """Put one activation operator for arithmetic that computes it. Input and result have the same dtype."""
    count = 0
    for core in [n for n in gm.graph.nodes if is_call(n, *_CORES)]:
        found = _activation(core)
        if found is not None:
            last, x, target, kwargs = found
            replace(last, call(gm, target, x, like=last, **kwargs))
            count += 1
    return matched(gm, "gelu", count)


def _activation(core: fx.Node) -> tuple[fx.Node, fx.Node, Any, dict[str, str]] | None:
    """(last node, x, operator, its options) of the activation around a core, the widest that is known."""
    for last in reversed(list(_below(core))):
        for x in _above(core):
            if m.dtype(x) != m.dtype(last) or not m.same_sizes(m.shape(x), m.shape(last)):
                continue
            values = _evaluate(last, x, {})
            for target, kwargs, expected in _KNOWN if values is not None else ():
                if torch.allclose(values, expected, rtol=1e-6, atol=1e-7):
                    return last, x, target, kwargs
    return None


def _below(core: fx.Node) -> Iterator[fx.Node]:
    """The core and what is computed from it, one user after the other."""
    node: fx.Node | None = core
    for _ in range(_DEPTH):
        if node is None or not is_call(node, *_ELEMENTWISE):
            return
        yield node
        node = m.only_user(node)


def _above(core: fx.Node) -> list[fx.Node]:
    """What the core may be a function of, the farthest first."""
    found: list[fx.Node] = []
    front: list[Any] = [core.args[0]]
    for _ in range(_DEPTH):
        found += [n for n in front if n not in found]
        front = [a for n in front if is_call(n, *_ELEMENTWISE) for a in n.all_input_nodes]
    return [n for n in found[::-1] if isinstance(n, fx.Node) and isinstance(val(n), Tensor)]


def _evaluate(node: Any, x: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The values of `node` at the sample points as a function of x; None where it depends on anything else."""
    if node is x:
        return _SAMPLES
    constant = m.number(node)
    if constant is not None:
        return constant
    if not is_call(node, *_ELEMENTWISE) or not val(node).is_floating_point() or len(known) > 3 * _DEPTH:
        return None
    if node not in known:
        known[node] = None
        tensors = [_evaluate(a, x, known) for a in node.args]
        if any(value is None for value in tensors):
            return None
        first, *rest = tensors
        first = first if isinstance(first, Tensor) else torch.tensor(first, dtype=torch.float64)
        known[node] = first if node.target in m.CASTS else node.target(first, *rest, **node.kwargs)
    return known[node]
