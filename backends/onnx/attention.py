"""Attention: scores, mask, softmax, values as explicit products, right for every rank and broadcast."""

from __future__ import annotations

import math

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.packed_attention import packed_attention
from qfx.backends.onnx.portable import product
from qfx.backends.onnx.values import Dim, Value

_LOWEST = torch.finfo(torch.float32).min


def sdpa(
    b: Builder, q: Value, k: Value, v: Value, mask: Value | None = None, dropout: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """scaled_dot_product_attention. Rows with nothing to attend to give zeros, as torch's CPU kernels do."""
    if dropout:
        raise NotImplementedError("attention dropout")
    scale = _scale_of(q) if scale is None else float(scale)
    packed = None if b.standard else packed_attention(b, mask, is_causal, scale)
    if packed is not None:
        return packed
    if enable_gqa:
        k, v = (repeated_heads(b, q, x) for x in (k, v))
    scores = scores_of(b, q, k, scale)
    bias, keep = mask_bias(b, scores, mask, is_causal)
    if bias is not None:
        scores = shaped_like(scores, b.op("Add", scores, bias))
    y = weighted(b, b.op("Softmax", scores, axis=-1), scores, v)
    return y if keep is None else b.op("Mul", y, keep)


def attention(
    b: Builder, q: Value, k: Value, v: Value, mask: Value | None, sinks: Value | None, scale: float, causal: bool,
    softcap: float,
) -> Value:  # fmt: skip
    """qfx::attention: SDPA with a soft cap on the scores and sinks (one extra logit per head that takes weight)."""
    k, v = (repeated_heads(b, q, x) for x in (k, v))
    scores = scores_of(b, q, k, float(scale))
    if softcap:
        cap = b.scalar(softcap, scores.dtype)
        scores = shaped_like(scores, b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap))
    bias, keep = mask_bias(b, scores, mask, causal)
    if bias is not None:
        scores = shaped_like(scores, b.op("Add", scores, bias))
    if sinks is not None:
        return weighted(b, softmax_with_sinks(b, scores, sinks), scores, v)
    y = weighted(b, b.op("Softmax", scores, axis=-1), scores, v)
    return y if keep is None else b.op("Mul", y, keep)


def repeated_heads(b: Builder, q: Value, x: Value) -> Value:
    """Keys or values with a head for each head of q where query heads share them, and how many is not known.

    Of known numbers nothing is copied, see `scores_of`. Torch's own decomposition is no way round: that of torch 2.11
    takes the number of heads that it is traced with for the only one.
    """
    if x.dims[-3] == q.dims[-3] or all(isinstance(value.dims[-3], int) for value in (q, x)):
        return x
    heads, own = b.dim(q.dims[-3]), b.op("Max", b.dim(x.dims[-3]), b.ints([1]))
    whole = b.op("Concat", b.shape(x.dims[:-2]), b.op("Div", heads, own), b.shape(x.dims[-2:]), axis=0)
    times = b.op("Expand", b.op("Unsqueeze", x, b.ints([x.rank - 2])), whole)
    return b.reshape(times, (*x.dims[:-3], q.dims[-3], *x.dims[-2:]))


def need_fixed_heads(q: Value, k: Value, v: Value) -> None:
    """Raises NotImplementedError for query heads that share heads of k and v, and how many is not known."""
    if any(x.dims[-3] != q.dims[-3] and not isinstance(d, int) for x in (k, v) for d in (x.dims[-3], q.dims[-3])):
        raise NotImplementedError("attention of grouped heads whose number is not fixed")


def softmax_with_sinks(b: Builder, scores: Value, sinks: Value) -> Value:
    """Softmax over [scores, sink] with the sink's column cut off; sinks [H] for scores [.., H, L, S]."""
    column = b.op("Unsqueeze", sinks, b.ints([1, 2]))
    column = b.op("Expand", column, b.shape([*scores.dims[:-1], 1]))
    whole = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
    return b.op("Slice", whole, b.ints([0]), b.ints([-1]), b.ints([-1]))


def _scale_of(q: Value) -> float:
    width = q.dims[-1]
    if not isinstance(width, int):
        raise NotImplementedError("attention with a head size that is not a number")
    return 1.0 / math.sqrt(width) if width else 1.0


def scores_of(b: Builder, q: Value, k: Value, scale: float) -> Value:
    """scale * q @ k^T, [.., H, L, S]. Query heads that share a key head are stacked on its rows; no key is copied."""
    share = share_of(q, k)
    rows = b.reshape(q, grouped_dims(q.dims, k.dims, share)) if share > 1 else q
    scores = product(b, rows, k, scale)
    sizes = (*lead_dims(q, k, share), q.dims[-2], k.dims[-2])
    return b.reshape(scores, sizes) if share > 1 else Value(scores.name, scores.dtype, sizes)


def weighted(b: Builder, weights: Value, scores: Value, v: Value) -> Value:
    """weights v, [.., H, S, Dv] as the scores have H, where v may have fewer heads."""
    share = share_of(scores, v)
    if share == 1:
        return b.op("MatMul", weights, v)
    y = b.op("MatMul", b.reshape(weights, grouped_dims(scores.dims, v.dims, share)), v)
    return b.reshape(y, (*scores.dims[:-1], v.dims[-1]))


def share_of(q: Value, k: Value) -> int:
    """How many query heads share a key head."""
    if q.rank < 3 or k.rank < 3:
        return 1
    heads, own = q.dims[-3], k.dims[-3]
    if not isinstance(heads, int) or not isinstance(own, int) or own in (0, heads):
        return 1
    return heads // own


def grouped_dims(query: tuple[Dim, ...], key: tuple[Dim, ...], share: int) -> tuple[Dim, ...]:
    """Dimensions of queries or weights whose `share` heads to one of keys stand below each other, as rows."""
    return (*query[:-3], key[-3], query[-2] * share, query[-1])


def lead_dims(q: Value, k: Value, share: int) -> tuple[Dim, ...]:
    """The leading dimensions of the scores."""
    left, right = list(q.dims[:-2]), list(k.dims[:-2])
    size = max(len(left), len(right))
    left, right = [1] * (size - len(left)) + left, [1] * (size - len(right)) + right
    return tuple(a if share > 1 or c == 1 else c for a, c in zip(left, right, strict=True))


def mask_bias(b: Builder, scores: Value, mask: Value | None, causal: bool) -> tuple[Value | None, Value | None]:
    """What is added to scores [.., L, S] (finite), and 1 or 0 for rows that may or may not attend. Once per mask."""
    if mask is None and not causal:
        return None, None
    rows, columns = scores.dims[-2:]
    key = ("bias", mask.name if mask is not None else "", causal, rows, columns, scores.dtype)
    if key not in b.memo:
        seen = _seen(b, rows, columns) if causal else None
        b.memo[key] = _prepared(b, mask, seen, scores.dtype)
    found: tuple[Value, Value | None] = b.memo[key]
    return found


def bias_of(b: Builder, mask: Value | None, sizes: tuple[Dim, Dim]) -> Value | None:
    """What a mask adds to scores [.., L, S], f32 of rank 4 with all of its last two sizes; None without one."""
    if mask is None:
        return None
    key = ("whole bias", mask.name)
    if key not in b.memo:
        added, _ = _prepared(b, mask, None, torch.float32)
        lifted = (*(1,) * (4 - mask.rank), *mask.dims)
        added = b.reshape(Value(added.name, torch.float32, mask.shape), lifted)
        whole = (*lifted[:-2], *sizes)
        if lifted != whole:
            added = Value(b.op("Expand", added, b.shape(whole)).name, torch.float32, whole)
        b.memo[key] = added
    found: Value = b.memo[key]
    return found


def _prepared(b: Builder, mask: Value | None, seen: Value | None, dtype: torch.dtype) -> tuple[Value, Value | None]:
    zero, lowest = b.scalar(0.0, dtype), b.scalar(_LOWEST, dtype)
    if mask is None:
        assert seen is not None
        return b.op("Where", seen, zero, lowest), None
    axis = b.ints([mask.rank - 1])
    if mask.dtype == torch.bool:
        kept = mask if seen is None else b.op("And", mask, seen)
        return b.op("Where", kept, zero, lowest), b.cast(b.op("ReduceMax", kept, axis, keepdims=1), dtype)
    nothing = b.scalar(-math.inf, dtype)
    bias = b.cast(mask, dtype) if seen is None else b.op("Where", seen, b.cast(mask, dtype), nothing)
    some = b.op("Greater", b.op("ReduceMax", bias, axis, keepdims=1), nothing, dtype=torch.bool)
    return b.op("Max", bias, lowest), b.cast(some, dtype)


def _seen(b: Builder, rows: Dim, columns: Dim) -> Value:
    """Row i sees the columns 0 to i."""
    zero, one = b.scalar(0, torch.int64), b.scalar(1, torch.int64)
    down = b.op("Unsqueeze", b.op("Range", zero, b.scalar(rows, torch.int64), one), b.ints([1]))
    across = b.op("Range", zero, b.scalar(columns, torch.int64), one)
    return b.op("GreaterOrEqual", down, across, dtype=torch.bool)


def shaped_like(scores: Value, value: Value) -> Value:
    """A value that is known to have the shape of the scores."""
    return Value(value.name, value.dtype, scores.shape)


def rope(b: Builder, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """x * cos + rotate(x) * sin; halves are rotated, or even and odd elements where interleaved."""
    width = x.dims[-1]
    if not isinstance(width, int):
        raise NotImplementedError("rotary embedding of a head size that is not a number")
    if interleaved:
        pairs = b.reshape(x, (*x.dims[:-1], width // 2, 2))
        even, odd = b.ops("Split", pairs, b.ints([1, 1]), dtypes=[x.dtype] * 2, axis=-1)
        turned = b.reshape(b.op("Concat", b.op("Neg", odd), even, axis=-1), x.dims)
    else:
        first, second = b.ops("Split", x, b.ints([width // 2, width - width // 2]), dtypes=[x.dtype] * 2, axis=-1)
        turned = b.op("Concat", b.op("Neg", second), first, axis=-1)
    return b.op("Add", b.op("Mul", x, b.cast(cos, x.dtype)), b.op("Mul", turned, b.cast(sin, x.dtype)))


EMIT: dict[str, Emit] = {
    "aten.scaled_dot_product_attention.default": sdpa,
    "qfx.attention.default": attention,
    "qfx.rope.default": rope,
}
