"""qfx::quantized_attention: products of integers where both operands are symmetric integers, else of rounded floats.

    q, k integers     codes q u8, k s8 -> MatMulIntegerToFloat, times the steps of rows and columns
    p, v integers     the softmax as u8 codes, v s8 -> MatMulIntegerToFloat, times the steps
    others            operands rounded and scaled back, then as float attention multiplies them

In a file for other machines, and where sums of u8 x s8 saturate, both sides are u8: slower, and right on every
processor. The runtime "standard" has MatMulInteger, Cast and Mul in place of MatMulIntegerToFloat.
Sums are 32-bit: weights in u8/tok of more than 66,000 tokens that all count alike could overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qfx import processor
from qfx.backends.onnx import attention
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.quant_input import repeated
from qfx.backends.onnx.values import Dim, Value
from qfx.format import Format
from qfx.numerics import TINY
from qfx.ops import heads as attention_heads
from qfx.ops.attention import is_centred
from qfx.ops.heads import Static

_CENTRE = 128
_FLOAT8 = {"f8e4m3": (4, -6), "f8e5m2": (3, -14)}  # significant bits, exponent of the least normal number
_F32 = torch.float32


@dataclass(frozen=True)
class Rounding:
    """How one operand x is rounded: x / step, then to codes from which `offset` is still to be taken off.

    step broadcasts to x: [], [1, H, 1, 1] or [B, H, S, 1]. offset: the zero point, f32; None where there is none.
    """

    format: Format
    step: Value
    offset: Value | None = None

    @property
    def by_token(self) -> bool:
        """Each row has a step of its own."""
        return self.format.granularity == "tok"


def quantized_attention(
    b: Builder, q: Value, k: Value, v: Value, mask: Value | None, sinks: Value | None, q_scale: Sequence[float],
    q_zero: Sequence[int], k_scale: Sequence[float], k_zero: Sequence[int], v_scale: Sequence[float],
    v_zero: Sequence[int], scale: float, causal: bool, softcap: float, q_format: str, k_format: str, v_format: str,
    p_format: str,
) -> Value:  # fmt: skip
    """Attention [B, H, S, Dv] between operands rounded to their formats."""
    attention.need_fixed_heads(q, k, v)
    q, k, v = (b.cast(x, _F32) for x in (q, k, v))
    asked = [attention_heads.read(text) for text in (q_format, k_format, v_format, p_format)]
    numbers = (q_scale, q_zero, k_scale, k_zero, v_scale, v_zero)
    rest = (scale, causal, softcap)
    if alone := attention_heads.whole(asked, numbers):
        return _share(b, q, k, v, mask, sinks, alone, *rest)
    heads, own = q.dims[1], k.dims[1]
    if not isinstance(heads, int) or not isinstance(own, int):
        raise NotImplementedError("attention with formats by heads whose number is not fixed")
    parts, order = [], list[int]()
    for share in attention_heads.shares(asked, heads, own):
        some, of_keys = share.of("q"), share.of("k")
        operands = (_some(b, q, some, 1), _some(b, k, of_keys, 1), _some(b, v, of_keys, 1))
        by_head = mask is not None and mask.rank > 2 and mask.dims[-3] != 1
        bias = _some(b, mask, some, mask.rank - 3) if mask is not None and by_head else mask
        few = None if sinks is None else _some(b, sinks, some, 0)
        parts.append(_share(b, *operands, bias, few, share.static(asked, numbers), *rest))
        order += some
    joined = Value(b.op("Concat", *parts, axis=1).name, _F32, (*q.dims[:3], v.dims[3]))
    return _some(b, joined, sorted(range(heads), key=order.__getitem__), 1)


def _some(b: Builder, x: Value, places: list[int], axis: int) -> Value:
    """Some entries of an axis, in this order."""
    if places == list(range(len(places))) and x.dims[axis] == len(places):
        return x
    found = b.op("Gather", x, b.ints(places), axis=axis)
    return Value(found.name, x.dtype, (*x.dims[:axis], len(places), *x.dims[axis + 1 :]))


def _share(
    b: Builder, q: Value, k: Value, v: Value, mask: Value | None, sinks: Value | None, given: Sequence[Static],
    scale: float, causal: bool, softcap: float,
) -> Value:  # fmt: skip
    """Heads whose formats are the same."""
    qs, ks, vs, _ = given
    qf, kf, vf, pf = (one.format for one in given)
    mean = None
    if is_centred(kf):
        mean = Value(b.op("ReduceMean", k, b.ints([2]), keepdims=1).name, _F32, (*k.dims[:2], 1, k.dims[3]))
        k = Value(b.op("Sub", k, mean).name, _F32, k.dims)
    one, other = _rounding(b, q, qs), _rounding(b, k, ks)
    if _is_symmetric(qf) and _is_symmetric(kf):
        assert one is not None and other is not None
        scores = _integer_scores(b, q, k, one, other, scale)
    else:
        scores = attention.scores_of(b, _rounded(b, q, one, qf), _rounded(b, k, other, kf), scale)
    if mean is not None and (softcap > 0 or sinks is not None):
        scores = attention.shaped_like(scores, b.op("Add", scores, attention.scores_of(b, q, mean, scale)))
    if softcap > 0:
        cap = b.scalar(softcap, _F32)
        scores = attention.shaped_like(scores, b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap))
    bias, keep = attention.mask_bias(b, scores, mask, causal)
    if bias is not None:
        scores = attention.shaped_like(scores, b.op("Add", scores, bias))
    if sinks is not None:
        weights, keep = attention.softmax_with_sinks(b, scores, sinks), None
    else:
        weights = b.op("Softmax", scores, axis=-1)
    weights = attention.shaped_like(scores, weights)
    last = _rounding(b, v, vs)
    y = _integer_values(b, weights, v, pf, last) if _is_whole(pf, vf) else None
    if y is None:
        y = attention.weighted(b, _rounded_weights(b, weights, pf), weights, _rounded(b, v, last, vf))
    _say_floats(b, {"q": qf, "k": kf, "p": pf, "v": vf})
    return y if keep is None else b.op("Mul", y, keep)


def _is_symmetric(fmt: Format | None) -> bool:
    return fmt is not None and fmt.is_integer and fmt.symmetric


def _is_whole(p: Format | None, v: Format | None) -> bool:
    """Is the product of weights and values one of integers? A step of each token of v stands inside its sums."""
    return p is not None and p.is_integer and v is not None and _is_symmetric(v) and v.granularity != "tok"


def _say_floats(b: Builder, formats: dict[str, Format | None]) -> None:
    """What is rounded and multiplied in f32 all the same."""
    q, k, p, v = formats.values()
    apart = {} if _is_symmetric(q) and _is_symmetric(k) else {"q": q, "k": k}
    apart |= {} if _is_whole(p, v) else {"p": p, "v": v}
    asked = " ".join(f"{role}={fmt}" for role, fmt in apart.items() if fmt is not None and not fmt.is_plain)
    if asked:
        step = "none needed for the result; q=i8/tok k=i8/tok, and p=u8/tok v=i8/head, are multiplied as integers"
        b.note(f"{asked}: rounded as asked, multiplied in f32", step)


# ---- rounding --------------------------------------------------------------------------------------------------------


def _rounding(b: Builder, x: Value, given: Static) -> Rounding | None:
    """The step of an operand, from its values or as given. None for floats."""
    fmt, scale, zero = given
    if fmt is None or fmt.is_plain:
        return None
    if not fmt.dynamic:
        shape = [1, len(scale), 1, 1] if fmt.granularity == "head" else []
        step = b.const(torch.tensor(list(scale)).reshape(shape), _F32)
        offset = b.const(torch.tensor(list(zero)).reshape(shape), _F32) if fmt.has_zero else None
        return Rounding(fmt, step, offset)
    low, high = _extreme(b, "ReduceMin", x, fmt), _extreme(b, "ReduceMax", x, fmt)
    top, tiny = b.scalar(float(fmt.qmax), _F32), b.scalar(TINY, _F32)
    if not fmt.has_zero:
        return Rounding(fmt, b.op("Max", b.op("Div", b.op("Max", high, b.op("Neg", low)), top), tiny))
    nothing = b.scalar(0.0, _F32)
    low, high = b.op("Min", low, nothing), b.op("Max", high, nothing)
    step = b.op("Max", b.op("Sub", b.op("Div", high, top), b.op("Div", low, top)), tiny)
    return Rounding(fmt, step, b.op("Min", b.op("Round", b.op("Div", b.op("Neg", low), step)), top))


def _extreme(b: Builder, op_type: str, x: Value, fmt: Format) -> Value:
    """Greatest or least of everything [], of each head [1, H, 1, 1] or of each row [B, H, S, 1], as far as kept."""
    axes = {"": None, "head": [0, 2, 3], "tok": [3]}[fmt.granularity]
    kept: tuple[Dim, ...] = {"": (), "head": (1, x.dims[1], 1, 1), "tok": (*x.dims[:3], 1)}[fmt.granularity]
    found = b.op(op_type, x, None if axes is None else b.ints(axes), keepdims=0 if axes is None else 1)
    found = Value(found.name, _F32, kept)
    return found if fmt.clip == 100 else b.op("Mul", found, b.scalar(fmt.clip / 100, _F32))


def _steps(b: Builder, x: Value, how: Rounding) -> Value:
    """x / step, within the codes' range where the step does not see to that."""
    steps = b.op("Div", x, how.step)
    fmt = how.format
    if fmt.dynamic and fmt.clip == 100:
        return steps
    return b.op("Clip", steps, b.scalar(float(fmt.qmin), _F32), b.scalar(float(fmt.qmax), _F32))


def _rounded(b: Builder, x: Value, how: Rounding | None, fmt: Format | None) -> Value:
    """An operand as it comes back from its format, f32."""
    if how is None:
        if fmt is None or fmt.type == "f32":
            return x
        return Value(b.cast(b.cast(x, fmt.code_dtype), _F32).name, _F32, x.dims)
    fmt = how.format
    if fmt.is_float:
        values = _float8(b, _steps(b, x, how), fmt)
    elif how.offset is None:
        values = b.op("Round", _steps(b, x, how))
    else:
        shifted = b.op("Add", b.op("Round", b.op("Div", x, how.step)), how.offset)
        shifted = b.op("Clip", shifted, b.scalar(0.0, _F32), b.scalar(float(fmt.qmax), _F32))
        values = b.op("Sub", shifted, how.offset)
    return Value(b.op("Mul", values, how.step).name, _F32, x.dims)


def _float8(b: Builder, x: Value, fmt: Format) -> Value:
    """Values within the range of an 8-bit float, rounded to it, half to even, exactly.

    c - (c - x) with c = x + 2^(24 - bits) max(|x|, 1.5 * least normal): the sum keeps as many bits of x as the type has
    (Dekker 1971, here with subnormals). Casts to the type and back are scalar code in ONNX Runtime, and far slower.
    """
    bits, least = _FLOAT8[fmt.type]
    size = b.op("Max", b.op("Abs", x), b.scalar(1.5 * 2.0**least, _F32))
    shift = b.op("Mul", size, b.scalar(2.0 ** (24 - bits), _F32))
    whole = b.op("Add", x, shift)
    return b.op("Sub", whole, b.op("Sub", whole, x))


def _codes(b: Builder, x: Value, how: Rounding, dtype: torch.dtype) -> tuple[Value, Value]:
    """Symmetric codes as u8 around 128 or as s8, with their zero point."""
    point = b.const(_CENTRE if dtype == torch.uint8 else 0, dtype)
    return _quantized(b, x, how, point), point


def _quantized(b: Builder, x: Value, how: Rounding, point: Value) -> Value:
    """Codes of x around a zero point. Steps of rows are QuantizeLinear's own, where a reader is known to take them."""
    fmt = how.format
    if how.by_token and fmt.clip == 100 and not b.standard:
        count = math.prod(x.dims[:-1])
        rows, steps = b.reshape(x, (count, x.dims[-1])), b.reshape(how.step, (count,))
        codes = b.op("QuantizeLinear", rows, steps, repeated(b, point, count), dtype=point.dtype, axis=0)
        return b.reshape(Value(codes.name, point.dtype, (count, x.dims[-1])), x.dims)
    codes = b.op("QuantizeLinear", _steps(b, x, how), b.scalar(1.0, _F32), point, dtype=point.dtype)
    return Value(codes.name, point.dtype, x.dims)


def _second(b: Builder) -> torch.dtype:
    """Type of the right operand of integer products: s8 has the fastest kernels, u8 is right on every processor."""
    return torch.uint8 if b.portable or processor.saturates() else torch.int8


# ---- products --------------------------------------------------------------------------------------------------------


def _integer_product(
    b: Builder, left: tuple[Value, Value], right: tuple[Value, Value], sizes: tuple[Dim, ...], factor: Value,
    columns: Value | None = None,
) -> Value:  # fmt: skip
    """factor * columns * (codes a @ codes b), f32 of these sizes. factor: []; columns: [.., 1, N]"""
    (a, a_zero), (c, c_zero) = left, right
    if b.standard:
        y = b.op("Mul", b.cast(b.op("MatMulInteger", a, c, a_zero, c_zero, dtype=torch.int32), _F32), factor)
        y = y if columns is None else b.op("Mul", y, columns)
    else:
        steps = b.scalar(1.0, _F32) if columns is None else columns
        y = b.op("MatMulIntegerToFloat", a, c, factor, steps, a_zero, c_zero, domain=MICROSOFT, dtype=_F32)
    return Value(y.name, _F32, sizes)


def _stacked(b: Builder, x: Value, own: Value) -> Value:
    """Query heads that share a head of `own` on each other's rows: [B, H, S, N] as [B, G, H / G * S, N]."""
    share = attention.share_of(x, own)
    return b.reshape(x, attention.grouped_dims(x.dims, own.dims, share)) if share > 1 else x


def _integer_scores(b: Builder, q: Value, k: Value, one: Rounding, other: Rounding, scale: float) -> Value:
    """q k^T * scale, [B, H, S, L]."""
    codes, zero = _codes(b, q, one, torch.uint8)
    keys, key_zero = _codes(b, k, other, _second(b))
    rows = _stacked(b, codes, k)
    turned = b.op("Transpose", keys, perm=[0, 1, 3, 2])
    factor = b.scalar(scale, _F32)
    for step in (s for s in (one.step, other.step) if s.dims == ()):
        factor = Value(b.op("Mul", factor, step).name, _F32, ())
    columns = None
    if other.by_token:
        columns = b.op("Transpose", other.step, perm=[0, 1, 3, 2])
    elif other.step.dims:
        columns = b.op("Expand", other.step, b.shape([1, 1, 1, k.dims[2]]))
    whole = (*rows.dims[:3], k.dims[2])
    scores = _integer_product(b, (rows, zero), (turned, key_zero), whole, factor, columns)
    sizes = (*attention.lead_dims(q, k, attention.share_of(q, k)), q.dims[2], k.dims[2])
    scores = b.reshape(scores, sizes) if rows is not codes else Value(scores.name, _F32, sizes)
    return scores if not one.step.dims else attention.shaped_like(scores, b.op("Mul", scores, one.step))


def _integer_values(b: Builder, weights: Value, v: Value, fmt: Format | None, how: Rounding | None) -> Value | None:
    """p v, [B, H, S, Dv]."""
    assert fmt is not None and how is not None
    codes, zero, step = _weight_codes(b, weights, fmt)
    rows = _stacked(b, codes, v)
    values = _codes(b, v, how, _second(b))
    factor = b.scalar(1.0, _F32)
    for one in (s for s in (step, how.step) if s.dims == ()):
        factor = Value(b.op("Mul", factor, one).name, _F32, ())
    columns = b.op("Expand", how.step, b.shape([1, 1, 1, v.dims[3]])) if how.step.dims else None
    y = _integer_product(b, (rows, zero), values, (*rows.dims[:3], v.dims[3]), factor, columns)
    y = b.reshape(y, (*weights.dims[:3], v.dims[3])) if rows is not codes else y
    return y if step.dims == () else b.op("Mul", y, step)


def _weight_step(b: Builder, weights: Value, fmt: Format) -> Value:
    """1 / qmax, or a part of the greatest of each row."""
    if not fmt.dynamic:
        return b.scalar(float(torch.tensor(1.0) / fmt.qmax), _F32)
    top = b.op("Div", _extreme(b, "ReduceMax", weights, fmt), b.scalar(float(fmt.qmax), _F32))
    return Value(b.op("Max", top, b.scalar(TINY, _F32)).name, _F32, (*weights.dims[:3], 1))


def _weight_codes(b: Builder, weights: Value, fmt: Format) -> tuple[Value, Value, Value]:
    """The weights as u8 codes from 0 on, their zero point and step."""
    step, zero = _weight_step(b, weights, fmt), b.const(0, torch.uint8)
    if fmt.dynamic:
        return _quantized(b, weights, Rounding(fmt, step), zero), zero, step
    codes = b.op("QuantizeLinear", weights, step, zero, dtype=torch.uint8)
    return Value(codes.name, torch.uint8, weights.dims), zero, step


def _rounded_weights(b: Builder, weights: Value, fmt: Format | None) -> Value:
    if fmt is None or fmt.is_plain:
        return _rounded(b, weights, None, fmt)
    step = _weight_step(b, weights, fmt)
    if fmt.is_float:
        return _rounded(b, weights, Rounding(fmt, step), fmt)
    values = b.op("Round", _steps(b, weights, Rounding(fmt, step)))
    return Value(b.op("Mul", values, step).name, _F32, weights.dims)


EMIT: dict[str, Emit] = {"qfx.quantized_attention.default": quantized_attention}
