"""com.microsoft QAttention: three static 8-bit projections of one input and the attention over them as one kernel.

It writes the projections straight into the layout that attention reads, which saves three transposes and one pass over
the activations. The sums are those of MatMulIntegerToFloat; what follows is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.quant_input import quantized_input
from qfx.backends.onnx.quant_weights import Weight, together
from qfx.backends.onnx.values import Dim, Value, dim_of
from qfx.format import Format
from qfx.graph import is_call
from qfx.passes._match import arguments

_aten = torch.ops.aten
_SHARED = ("x", "x_scale", "x_zero", "smooth", "x_format", "w_format")  # arguments that the projections have in common


@dataclass(frozen=True)
class Projections:
    """The nodes of the query, key and value projections, their arguments, the heads and the size of each."""

    nodes: list[fx.Node]
    arguments: list[dict[str, Any]]
    heads: int
    size: int


def packed_attention(b: Builder, mask: Value | None, causal: bool, scale: float) -> Value | None:
    """The attention node being lowered as QAttention, [B, H, S, D]; None where it is not of that form."""
    found = _projections(b)
    if found is None or (mask is not None and not _is_padding(mask, found)):
        return None
    first = found.arguments[0]
    x = b.cast(b.value_of(first["x"]), torch.float32)
    fmt = Format.parse(first["x_format"])
    given = [None if first[name] is None else _value(b, first[name]) for name in _SHARED[1:4]]
    q = quantized_input(b, x, fmt, *given)
    weights = [_weight(b, a, x.dims[-1]) for a in found.arguments]
    codes, scales, bias = _stacked(b, weights, found)
    keys = None if mask is None else b.cast(b.reshape(mask, (mask.dims[0], mask.dims[-1])), torch.int32)
    width = found.heads * found.size
    y = b.op(
        "QAttention", q.codes, codes, bias, q.scale, scales, keys, q.zero, b.const(0, torch.int8),
        domain=MICROSOFT, dtype=torch.float32, num_heads=found.heads, scale=scale, unidirectional=int(causal),
    )  # fmt: skip
    y = Value(y.name, torch.float32, (*x.dims[:-1], width))
    if mask is not None:
        y = Value(b.op("Mul", y, _attends(b, mask)).name, torch.float32, y.shape)
    b.fused |= {node.name: b.node.name for node in found.nodes if b.node is not None}
    return by_heads(b, y, found.heads)


def by_heads(b: Builder, y: Value, heads: int) -> Value:
    """[B, S, H*D] as [B, H, S, D]. Who takes this view back (see `shapes.transpose` and `view`) gets y itself."""
    batch, length, width = y.dims
    split = b.reshape(y, (batch, length, heads, width // heads))
    turned = b.op("Transpose", split, perm=[0, 2, 1, 3])
    b.views |= {(turned.name, (0, 2, 1, 3)): split, (split.name, y.dims): y}
    return Value(turned.name, turned.dtype, (batch, heads, length, width // heads))


def _attends(b: Builder, mask: Value) -> Value:
    """f32 [B, 1, 1]: 1, or 0 for sequences without a key to attend to, which torch gives zeros."""
    key = ("attends", mask.name)
    if key not in b.memo:
        some = b.op("ReduceMax", mask, b.ints([3]), keepdims=1)
        some = Value(some.name, some.dtype, (mask.dims[0], 1, 1, 1))
        b.memo[key] = b.cast(b.reshape(some, (mask.dims[0], 1, 1)), torch.float32)
    found: Value = b.memo[key]
    return found


def _projections(b: Builder) -> Projections | None:
    """The three linears behind q, k and v, where they are alike in all but their weights."""
    node = b.node
    if node is None or node.meta["val"].dim() != 4:
        return None
    nodes = [_linear_behind(n) for n in node.args[:3]]
    if any(n is None for n in nodes):
        return None
    calls = [arguments(n) for n in nodes if n is not None]
    first = calls[0]
    if not b.has(first["x"]):
        return None
    if not _static_pair(first) or not all(_same(b, c[name], first[name]) for c in calls[1:] for name in _SHARED):
        return None
    if any(
        c["w_zero"] is not None or c["w_scale"].meta["val"].shape != first["w_scale"].meta["val"].shape for c in calls
    ):
        return None
    heads, size = (dim_of(node.meta["val"].shape[i]) for i in (1, 3))
    shapes = [tuple(map(dim_of, n.meta["val"].shape)) for n in node.args[:3]]  # type: ignore[union-attr]
    if not isinstance(heads, int) or not isinstance(size, int) or len(set(shapes)) > 1 or shapes[0][1] != heads:
        return None
    return Projections([n for n in nodes if n is not None], calls, heads, size)


def _same(b: Builder, one: Any, other: Any) -> bool:
    """Do two arguments stand for the same value? Tensors of equal content do."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return _value(b, one).name == _value(b, other).name
    return bool(one == other)


def _linear_behind(node: Any) -> fx.Node | None:
    """The qfx::linear [B, S, H*D] of which `node` [B, H, S, D] is the view by heads."""
    if not is_call(node, _aten.transpose.int) or {dim % 4 for dim in node.args[1:]} != {1, 2}:
        return None
    split = node.args[0]
    if not is_call(split, _aten.reshape.default):
        return None
    source = split.args[0]
    if not is_call(source, torch.ops.qfx.linear.default):
        return None
    flat, by_heads = (tuple(map(dim_of, n.meta["val"].shape)) for n in (source, split))
    return source if len(flat) == 3 and len(by_heads) == 4 and flat[:2] == by_heads[:2] else None


def _static_pair(call: dict[str, Any]) -> bool:
    """One scale and zero point for all activations, symmetric 8-bit weights per channel."""
    if not call["x_format"]:
        return False
    x, w = Format.parse(call["x_format"]), Format.parse(call["w_format"])
    plain = x.scale_type == "f32" and w.scale_type == "f32" and not x.dynamic
    return plain and x.bits == 8 and x.is_integer and x.granularity == "" and str(w) == "i8/ch"


def _is_padding(mask: Value, found: Projections) -> bool:
    """bool [B, 1, 1, S]: the same keys for all heads and rows."""
    batch, length, _ = found.nodes[0].meta["val"].shape
    return mask.dtype == torch.bool and tuple(mask.dims) == (dim_of(batch), 1, 1, dim_of(length))


def _value(b: Builder, node: fx.Node) -> Value:
    if node.op == "get_attr" and node not in b.values:
        b.values[node] = b.weight(b.tensor(node), str(node.target))
    value: Value = b.value_of(node)
    return value


def _weight(b: Builder, call: dict[str, Any], k: Dim) -> Weight:
    return Weight.of(b, [call["w"], call["w_scale"], call["w_zero"]], Format.parse(call["w_format"]), k)


def _stacked(b: Builder, weights: list[Weight], found: Projections) -> tuple[Value, Value, Value]:
    """int8 codes [K, 3N], scales [3N] and biases [3N] of the three, in this order."""
    name, width = f"{weights[0].name}{together(w.name for w in weights)}", found.heads * found.size
    biases = [None if c["bias"] is None else b.tensor(c["bias"]) for c in found.arguments]
    codes = b.derived(
        name, torch.int8, (weights[0].k, 3 * width), lambda: torch.cat([w.codes().t() for w in weights], 1).contiguous()
    )
    scales = b.derived(
        f"{name}.scale", torch.float32, (3 * width,), lambda: torch.cat([w.factor().reshape(-1) for w in weights])
    )
    zeros = torch.zeros(width)
    added = (f"{w.name} {c['bias']}" for w, c in zip(weights, found.arguments, strict=True))
    bias = b.derived(
        f"{weights[0].name}{together(added)}.bias",
        torch.float32,
        (3 * width,),
        lambda: torch.cat([zeros if t is None else t.detach().float() for t in biases]),
    )
    return codes, scales, bias
