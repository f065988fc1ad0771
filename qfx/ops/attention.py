"""Attention between rounded operands: reference semantics in plain torch.

    qfx::quantized_attention(q, k, v, mask?, sinks?, q_scale, q_zero, k_scale, k_zero, v_scale, v_zero,
                             scale, causal, softcap, q_format, k_format, v_format, p_format) -> Tensor

p are the weights, the softmax of the scores. A format "" leaves its operand in float; "[i8,f16]" are those of its heads
(`qfx.ops.heads`). Scales of static formats are numbers, one for the tensor or one for each head of the operand;
[] where the scale is found at run time.

Keys that are rounded are centred first: the mean over their tokens is taken off each channel, which moves all scores of
a row by the same q.mean and so leaves the softmax as it was (SageAttention, Zhang et al. 2024, section 4.2). Where the
scores are capped, or a sink stands beside them, q.mean is added again.

    s = (q k^T) q_step k_step scale        y = (p v) p_step v_step        products of codes, exact for integers
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfx.annotation import Formats, each, show
from qfx.errors import explain
from qfx.format import Format
from qfx.numerics import QParams, dequantize, quantize, range_qparams, run_time_qparams
from qfx.ops import heads as attention_heads
from qfx.ops.floats import gradient_by_replay, masked, softmax
from qfx.ops.heads import ROLES, Given, Static
from qfx.ops.library import UNSAFE, define

SCHEMA = (
    "quantized_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float[] q_scale, int[] q_zero, "
    "float[] k_scale, int[] k_zero, float[] v_scale, int[] v_zero, float scale, bool causal, float softcap, "
    "str q_format, str k_format, str v_format, str p_format) -> Tensor"
)
_TYPES = ("f8e4m3", "f8e5m2")
_EXACT = 1 << 24  # sums of integers below it are exact in f32


def reason_against(role: str, fmt: Format) -> str | None:
    """Why attention takes no such format for an operand (one of ROLES), or None."""
    if fmt.is_plain:
        return None
    if not fmt.is_integer and fmt.type not in _TYPES:
        return f"attention multiplies integers or 8-bit floats, not {fmt.type}"
    if fmt.scale_type != "f32":
        return f"attention takes scales in f32, not {fmt.scale_type}"
    if role == "p" and (fmt.granularity not in ("", "tok") or (fmt.dynamic and not fmt.granularity)):
        return "the weights lie between 0 and 1: one fixed scale ('u8'), or one for each row ('u8/tok')"
    if fmt.granularity not in ("", "tok", "head"):
        axis = "channels" if fmt.granularity == "ch" else "groups"
        return f"scales of {axis} stand inside the sums of attention: one for the tensor, 'tok' or 'head'"
    return None


def needs_scale(role: str, formats: Formats) -> bool:
    """Whether the scale of an operand, or of one of its heads, is found from data beforehand."""
    return role != "p" and any(not fmt.is_plain and not fmt.dynamic for fmt in each(formats))


def is_centred(fmt: Format | None) -> bool:
    """Whether keys of this format are centred over the tokens before they are rounded."""
    return fmt is not None and not fmt.is_plain


def centre(k: Tensor, chosen: bool | Tensor = True) -> tuple[Tensor, Tensor]:
    """Keys [.., L, D] in f32 without their mean over the tokens, and that mean [.., 1, D].

    chosen: where it is a tensor, which heads: f32 [H, 1, 1], 1 or 0; the mean of the others counts as 0.
    """
    wide = k.to(torch.float32)
    mean = wide.mean(-2, keepdim=True)
    if isinstance(chosen, Tensor):
        mean = mean * chosen
    return wide - mean, mean


class Operand(NamedTuple):
    """values: f32, whole numbers where `reach`, the greatest magnitude, says so (else 0). step: f32 factor of them."""

    values: Tensor
    step: Tensor | None = None
    reach: int = 0


Round = Callable[[Tensor, Format, QParams], Operand]


class Rounders(NamedTuple):
    """How q, k, v and the weights p become operands."""

    q: Callable[[Tensor], Operand]
    k: Callable[[Tensor], Operand]
    v: Callable[[Tensor], Operand]
    p: Callable[[Tensor], Operand]


class Stored(NamedTuple):
    """Keys and values [B, G, L, D] as a cache gives them back. read: bool [S, L], by which queries."""

    keys: Tensor
    values: Tensor
    read: Tensor


def quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, q_scale: Sequence[float],
    q_zero: Sequence[int], k_scale: Sequence[float], k_zero: Sequence[int], v_scale: Sequence[float],
    v_zero: Sequence[int], scale: float, causal: bool, softcap: float, q_format: str, k_format: str, v_format: str,
    p_format: str,
) -> Tensor:  # fmt: skip
    """qfx::attention between operands rounded to their formats; returns [B, H, S, Dv] in q.dtype.

    q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv] float, H a multiple of G; mask, sinks, scale, causal and softcap as
    in qfx::attention. Rows that may attend to nothing give zeros. Raises ValueError for formats that attention does not
    take, for scales that do not fit them and for other shapes.
    """
    given = (q_scale, q_zero, k_scale, k_zero, v_scale, v_zero)
    formats = (q_format, k_format, v_format, p_format)
    return _attend(_codes, q, k, v, mask, sinks, given, scale, causal, softcap, formats)


def _straight(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, q_scale: Sequence[float],
    q_zero: Sequence[int], k_scale: Sequence[float], k_zero: Sequence[int], v_scale: Sequence[float],
    v_zero: Sequence[int], scale: float, causal: bool, softcap: float, q_format: str, k_format: str, v_format: str,
    p_format: str,
) -> Tensor:  # fmt: skip
    """The same value up to rounding, and differentiable: gradients go straight through the rounding."""
    given = (q_scale, q_zero, k_scale, k_zero, v_scale, v_zero)
    formats = (q_format, k_format, v_format, p_format)
    return _attend(_through, q, k, v, mask, sinks, given, scale, causal, softcap, formats)


def _attend(
    how: Round, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, given: Sequence[Any],
    scale: float, causal: bool, softcap: float, formats: Sequence[str],
) -> Tensor:  # fmt: skip
    asked = checked(q, k, v, given, formats)
    rest = (scale, causal, softcap)
    if alone := attention_heads.whole(asked, given):
        return _share(how, q, k, v, mask, sinks, alone, *rest)
    parts, order = [], list[int]()
    for share in attention_heads.shares(asked, q.shape[1], k.shape[1]):
        heads, own = share.of("q"), share.of("k")
        some = mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., heads, :, :]
        few = None if sinks is None else sinks[heads]
        parts.append(_share(how, q[:, heads], k[:, own], v[:, own], some, few, share.static(asked, given), *rest))
        order += heads
    return torch.cat(parts, 1)[:, sorted(range(len(order)), key=order.__getitem__)]


def _share(
    how: Round, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, given: Sequence[Static],
    scale: float, causal: bool, softcap: float,
) -> Tensor:  # fmt: skip
    """Heads whose formats are the same."""
    qs, ks, vs, ps = given

    def weights(p: Tensor) -> Operand:
        return Operand(p) if ps.format is None else how(p, ps.format, of_weights(p, ps.format))

    of_q, of_k, of_v = (functools.partial(_operand, how, given=one) for one in (qs, ks, vs))
    rounders = Rounders(of_q, of_k, of_v, weights)
    return attend(rounders, q, k, v, mask, sinks, scale, causal, softcap, centred=is_centred(ks.format))


def attend(
    each: Rounders, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float,
    causal: bool, softcap: float, *, centred: bool | Tensor, dropout: float = 0.0, stored: Stored | None = None,
) -> Tensor:  # fmt: skip
    """Attention between operands that `each` rounds, [B, H, S, Dv] in q.dtype; the arguments of qfx::attention.

    centred: whether keys are centred before they are rounded, or which (see `centre`). dropout: share of the weights
    that is dropped behind their rounding. stored: what some queries read in the place of keys and values, in float.
    """
    float_q = q.to(torch.float32)
    k, mean = (k, None) if centred is False else centre(k, centred)
    one, other = each.q(q), each.k(k)
    scores = _scaled(_product(one, Operand(other.values.transpose(-1, -2), None, other.reach)), one.step)
    if other.step is not None:
        scores = scores * _spread(other.step.transpose(-1, -2) if other.step.dim() else other.step, q)
    scores = scores * scale
    if mean is not None and (softcap > 0 or sinks is not None or stored is not None):
        scores = scores + _product(Operand(float_q), Operand(mean.transpose(-1, -2))) * scale
    if stored is not None:
        keys = stored.keys.to(torch.float32).transpose(-1, -2)
        scores = torch.where(stored.read, _product(Operand(float_q), Operand(keys)) * scale, scores)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    weights = softmax(masked(scores, mask, causal), sinks)
    rounded = each.p(weights)
    if dropout > 0:
        kept = torch.nn.functional.dropout(torch.ones_like(weights), dropout)
        weights, rounded = weights * kept, rounded._replace(values=rounded.values * kept, reach=0)
    if stored is None:
        return _values(rounded, each.v(v), q)
    fresh = rounded._replace(values=rounded.values.masked_fill(stored.read, 0.0))
    held = _product(Operand(weights * stored.read), Operand(stored.values.to(torch.float32)))
    return (_values(fresh, each.v(v), q).to(torch.float32) + held).to(q.dtype)


def _values(weights: Operand, v: Operand, q: Tensor) -> Tensor:
    """Weights times values, [B, H, S, Dv] in q.dtype. A step for each token stands inside the sum."""
    if v.step is not None and v.step.dim() == v.values.dim():
        v = Operand(v.values * v.step)
    y = _scaled(_product(weights, v), weights.step)
    return (y if v.step is None else y * _spread(v.step, q)).to(q.dtype)


def _product(a: Operand, b: Operand) -> Tensor:
    """a [B, H, S, K] @ b [B, G, K, N], f32; H / G rows of a share one of b, which is not copied.

    Sums of integers are exact: in f32 below 2^24, else in f64.
    """
    left, right = a.values, b.values
    if a.reach and b.reach and left.shape[-1] * a.reach * b.reach >= _EXACT:
        left, right = left.double(), right.double()
    heads, own = left.shape[1], right.shape[1]
    if heads == own:
        return torch.matmul(left, right).to(torch.float32)
    rows = left.reshape(left.shape[0], own, heads // own * left.shape[2], left.shape[3])
    found = torch.matmul(rows, right).to(torch.float32)
    return found.reshape(found.shape[0], heads, left.shape[2], right.shape[-1])


def _scaled(x: Tensor, step: Tensor | None) -> Tensor:
    return x if step is None else x * step


def _spread(step: Tensor, q: Tensor) -> Tensor:
    """A step of the heads of k or v for the heads of q."""
    if step.dim() < 3 or step.shape[-3] == q.shape[1]:
        return step
    return step.repeat_interleave(q.shape[1] // step.shape[-3], -3)


def _operand(how: Round, x: Tensor, given: Static) -> Operand:
    if given.format is None:
        return Operand(x.to(torch.float32))
    return how(x, given.format, _params(x, given, given.format))


def _params(x: Tensor, given: Static, fmt: Format) -> QParams:
    if fmt.is_plain:
        return QParams(x.new_ones((), dtype=torch.float32), None)
    if fmt.dynamic:
        return run_time_qparams(x, fmt)
    shape = fmt.scale_shape(x.shape)
    scale = torch.tensor(list(given.scale), dtype=torch.float32, device=x.device).reshape(shape)
    zero = torch.tensor(list(given.zero), dtype=torch.uint8, device=x.device).reshape(shape) if fmt.has_zero else None
    return QParams(scale, zero)


def of_weights(p: Tensor, fmt: Format) -> QParams:
    """Scales of weights p: of the range from 0 to 1, or of each row at run time."""
    if fmt.is_plain or fmt.dynamic:
        return _params(p, Static(fmt), fmt)
    return range_qparams(p.new_zeros(()), p.new_ones(()), fmt)


def _codes(x: Tensor, fmt: Format, params: QParams) -> Operand:
    """Codes without their zero point."""
    if fmt.is_plain:
        return Operand(x.to(fmt.code_dtype).to(torch.float32))
    values = quantize(x, fmt, *params).to(torch.float32)
    if params.zero is not None:
        values = values - params.zero.to(torch.float32)
    reach = 0 if fmt.is_float else fmt.qmax if fmt.has_zero else -fmt.qmin
    return Operand(values, params.scale, reach)


def _through(x: Tensor, fmt: Format, params: QParams) -> Operand:
    """Values in f32, as they come back, with the gradient of x."""
    wide = x.to(torch.float32)
    with torch.no_grad():
        plain = quantize(wide, fmt) if fmt.is_plain else dequantize(quantize(wide, fmt, *params), fmt, *params)
        difference = plain.to(torch.float32) - wide
    return Operand(wide + difference)


def checked(q: Tensor, k: Tensor, v: Tensor, given: Sequence[Any], formats: Sequence[str]) -> list[Given]:
    """Formats of q, k, v and p. Raises ValueError for what does not fit."""
    if any(x.dim() != 4 or not x.is_floating_point() for x in (q, k, v)) or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            explain(
                "qfx::quantized_attention: the operands do not fit",
                expected="floats q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv], H a multiple of G",
                found=", ".join(f"{x.dtype} {list(x.shape)}" for x in (q, k, v)),
            )
        )
    asked = {role: attention_heads.read(text) for role, text in zip(ROLES, formats, strict=True)}
    attention_heads.check(asked, q.shape[1], k.shape[1], "qfx::quantized_attention")
    for i, (role, formats_) in enumerate(asked.items()):
        for fmt in () if formats_ is None else each(formats_):
            if reason := reason_against(role, fmt):
                raise ValueError(explain(f"qfx::quantized_attention: {role}={fmt}: {reason}", next_step="give another"))
        if formats_ is not None and needs_scale(role, formats_):
            _check_scale(role, formats_, given[2 * i], given[2 * i + 1], (q, k, v)[i].shape[1])
    if reason := attention_heads.reason_against(asked):
        raise ValueError(f"qfx::quantized_attention: {reason}")
    return list(asked.values())


def _check_scale(role: str, formats: Formats, scale: Sequence[float], zero: Sequence[int], heads: Any) -> None:
    by_head = isinstance(formats, tuple) or any(fmt.granularity == "head" for fmt in each(formats))
    count, has_zero = heads if by_head else 1, any(fmt.has_zero for fmt in each(formats))
    if len(scale) == count and (not has_zero or len(zero) == count):
        return
    points = f", {len(zero)} zero point(s)" if has_zero else ""
    raise ValueError(
        explain(
            f"qfx::quantized_attention: the static format {role}={show(formats)} has not the scales that it needs",
            expected=f"{count} scale(s){' and zero points' if has_zero else ''}",
            found=f"{len(scale)}{points}",
            next_step=f"calibrate it, or use '{each(formats)[0].type}/tok' to find scales at run time",
        )
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *rest: Any) -> Tensor:
    checked(q, k, v, rest[:6], rest[9:])
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


define(
    SCHEMA,
    torch.no_grad()(quantized_attention),
    _fake,
    tags=UNSAFE,
    gradient=gradient_by_replay(_straight),
)
