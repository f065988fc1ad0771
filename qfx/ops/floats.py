"""Float operators that ATen lacks: what normalization makes of spelled-out code, and grouped matmuls of experts.

    qfx::rope(x, cos, sin, interleaved) -> Tensor
    qfx::attention(q, k, v, mask?, sinks?, scale, causal, softcap) -> Tensor
    qfx::quick_gelu(x) -> Tensor
    qfx::grouped_linear(x, w, offs) -> Tensor
    qfx::grouped_linear_quant(x, w, w_scale, w_zero?, offs, x_format, w_format) -> Tensor
    qfx::moe(x, ids, weights, up.., down.., interleaved, alpha, beta, limit, up_format, down_format) -> Tensor

The kernels are reference semantics in plain torch; backends replace them. All but the last two can be differentiated
(qfx::grouped_outer is the weight's gradient of qfx::grouped_linear).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.format import Format
from qfx.numerics import effective_scale, run_time_qparams
from qfx.ops import packed as ops
from qfx.ops.library import UNSAFE, Gradient, define


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x * cos + rotate(x) * sin. x [.., D]; cos and sin broadcast to x, D wide.

    rotate takes the halves (a, b) to (-b, a); interleaved, it takes each pair (a, b) of neighbours to (-b, a).
    Computed and returned in the dtype that x, cos and sin promote to.
    """
    return x * cos + _rotate(x, interleaved) * sin


def _rotate(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> Tensor:
    """Attention with what aten.scaled_dot_product_attention cannot say; returns [B, H, S, Dv] in q.dtype.

    q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv], H a multiple of G (query heads in order share one of k, v).
    Scores q k^T * scale are capped as softcap * tanh(scores / softcap) where softcap > 0, then masked (mask: additive
    floats or booleans that keep, broadcast to [B, H, S, L]; causal: keep columns up to the row). sinks [H]: one more
    score per head that takes part in the softmax and is dropped after it. Scores and softmax are f32.
    """
    if k.shape[1] != q.shape[1]:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    weights = softmax(masked(scores, mask, causal), sinks)
    return torch.matmul(weights, v.float()).to(q.dtype)


def masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores f32 [B, H, S, L] with -inf where a row may not look, and with the mask added where it is floats.

    mask: additive floats or booleans that keep, broadcast to the scores. causal: keep columns up to the row.
    """
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of scores f32 [B, H, S, L], zeros in rows of nothing but -inf.

    sinks [H]: one more score per head that takes part and is dropped (gpt-oss), so that a row sums to less than 1.
    """
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat((scores, column), -1)
    weights: Tensor = torch.ops.aten._safe_softmax.default(scores, -1)
    return weights if sinks is None else weights[..., :-1]


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """qfx::attention over the cached and the new tokens; returns (y [B, H, S, Dv], keys, values), the caches grown.

    q [B, H, S, D], k and v [B, G, S, D], past_k and past_v [B, G, P, D]; the grown caches are [B, G, P + S, D].
    """
    keys, values = torch.cat((past_k, k), -2), torch.cat((past_v, v), -2)
    return attention(q, keys, values, mask, sinks, scale, causal, softcap), keys, values


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), any shape and float dtype."""
    return x * torch.sigmoid(1.702 * x)


def grouped_linear(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Rows of x [T, K], sorted by expert, times the weight of their expert w [E, N, K]; returns [T, N] in x.dtype.

    offs int32 [E]: where the rows of each expert end. Rows after the last end give zeros.
    """
    parts = [F.linear(x[start:end], w[e]) for e, start, end in _spans(offs)]
    return _joined(x, w.shape[1], parts)


def grouped_outer(y: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """For each expert the sum of y[t] x[t]^T over its rows: y [T, N], x [T, K] give [E, N, K] in x.dtype."""
    return torch.stack([y[start:end].t() @ x[start:end] for _, start, end in _spans(offs)])


@torch.no_grad()
def grouped_linear_quant(
    x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None, offs: Tensor, x_format: str, w_format: str
) -> Tensor:
    """qfx::grouped_linear with a packed weight [E, N, ..]: for each expert what qfx::linear gives; returns [T, N].

    w_scale and w_zero [E, ..], or [] for one scale. x_format "" is weight-only; its scales are found at run time.
    """
    w_scale, w_zero, wf = alone(w_scale, w_zero, Format.parse(w_format))
    x_scale = x_zero = None
    if x_format and Format.parse(x_format).granularity == "":
        x_scale, x_zero, x_format = _whole_range(x, Format.parse(x_format))
    parts = [
        ops.linear(
            x[start:end],
            w[e],
            *of_expert(w_scale, w_zero, e),
            None,
            x_scale,
            x_zero,
            None,
            x_format,
            str(wf),
        )
        for e, start, end in _spans(offs)
        if end > start
    ]
    return _joined(x, w.shape[1], parts)


@torch.no_grad()
def moe(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, up_scale: Tensor, up_zero: Tensor | None,
    up_bias: Tensor | None, down: Tensor, down_scale: Tensor, down_zero: Tensor | None, down_bias: Tensor | None,
    interleaved: bool, alpha: float, beta: float, limit: float, up_format: str, down_format: str,
) -> Tensor:  # fmt: skip
    """A mixture of gated experts: for each row of x [T, H] the sum of weights[t, i] * expert ids[t, i] (x[t]); [T, H].

    ids int64 [T, k]. Packed weights of the experts: up [E, 2I, H] gives gate and value, each row's halves or, if
    interleaved, neighbours; down [E, H, I]. With gate at most `limit` and value within it (none where it is infinite),
    the hidden state is gate * sigmoid(alpha * gate) * (value + beta). Biases [E, 2I] and [E, H].
    """
    by_expert, order = ids.reshape(-1).sort()
    offs = torch.searchsorted(by_expert, torch.arange(up.shape[0], device=ids.device), right=True, out_int32=True)
    rows = x[order // ids.shape[1]]
    both = grouped_linear_quant(rows, up, up_scale, up_zero, offs, "", up_format)
    both = both if up_bias is None else both + up_bias[by_expert]
    gate, value = (both[:, ::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    hidden = gate * torch.sigmoid(alpha * gate) * (value + beta)
    y = grouped_linear_quant(hidden, down, down_scale, down_zero, offs, "", down_format)
    y = y if down_bias is None else y + down_bias[by_expert]
    y = (y * weights.reshape(-1)[order].unsqueeze(-1))[order.argsort()]
    return y.reshape(*ids.shape, x.shape[1]).sum(1).to(x.dtype)


def _whole_range(x: Tensor, fmt: Format) -> tuple[Tensor | None, Tensor | None, str]:
    """One dynamic scale over the rows of all experts, handed on as a static one."""
    if not fmt.dynamic:
        return None, None, str(fmt)  # qfx::linear says what is missing
    params = run_time_qparams(x.float(), fmt)
    return params.scale, params.zero, str(Format.parse(str(fmt).removesuffix("/dyn")))


def alone(scale: Tensor, zero: Tensor | None, fmt: Format) -> tuple[Tensor, Tensor | None, Format]:
    """Scale, zero and format of packed weights [E, N, ..] from which one expert's can be taken.

    Nested scales, whose blocks go across experts, are written out.
    """
    if not fmt.nested:
        return scale, zero, fmt
    return effective_scale(scale, zero, fmt), None, Format(fmt.type, fmt.granularity)


def of_expert(scale: Tensor, zero: Tensor | None, e: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of an expert's packed weight; one value is that of all."""
    return scale[e] if scale.dim() else scale, zero[e] if zero is not None and zero.dim() else zero


def _spans(offs: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end) for every expert."""
    ends = offs.tolist()
    return list(zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True))


def _joined(x: Tensor, width: int, parts: Sequence[Tensor]) -> Tensor:
    done = sum(part.shape[0] for part in parts)
    return torch.cat([*parts, x.new_zeros((x.shape[0] - done, width))])


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x * cos, memory_format=torch.contiguous_format)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _cached_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_fake(q, k, v), torch.cat((past_k, k), -2), torch.cat((past_v, v), -2)


def _quick_gelu_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _grouped_linear_fake(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _grouped_outer_fake(y: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty((offs.shape[0], y.shape[1], x.shape[1]))


def _moe_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def gradient_by_replay(kernel: Callable[..., Any]) -> Gradient:
    """(setup_context, backward) that run the kernel once more with gradients on."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*[v for v in inputs if isinstance(v, Tensor)])
        ctx.others = [None if isinstance(v, Tensor) else (v,) for v in inputs]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        wanted = list(ctx.needs_input_grad)
        inputs = [
            next(tensors).detach().requires_grad_(want) if other is None else other[0]
            for other, want in zip(ctx.others, wanted, strict=True)
        ]
        with torch.enable_grad():
            output = kernel(*inputs)
        found = iter(torch.autograd.grad(output, [v for v, w in zip(inputs, wanted, strict=True) if w], gradient))
        return tuple(next(found) if want else None for want in wanted)

    return setup_context, backward


def _grouped_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offs = ctx.saved_tensors
    for_x = torch.ops.qfx.grouped_linear(gradient, w.transpose(1, 2), offs) if ctx.needs_input_grad[0] else None
    for_w = torch.ops.qfx.grouped_outer(gradient, x, offs) if ctx.needs_input_grad[1] else None
    return for_x, for_w, None


define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    rope,
    _rope_fake,
    gradient=gradient_by_replay(rope),
)
define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, bool causal, float softcap) "
    "-> Tensor",
    attention,
    _attention_fake,
    gradient=gradient_by_replay(attention),
)
define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor? mask, Tensor? sinks, "
    "float scale, bool causal, float softcap) -> (Tensor, Tensor, Tensor)",
    cached_attention,
    _cached_attention_fake,
)
define("quick_gelu(Tensor x) -> Tensor", quick_gelu, _quick_gelu_fake, gradient=gradient_by_replay(quick_gelu))
define(
    "grouped_linear(Tensor x, Tensor w, Tensor offs) -> Tensor",
    grouped_linear,
    _grouped_linear_fake,
    tags=UNSAFE,
    gradient=(_grouped_setup, _grouped_backward),
)
define(
    "grouped_linear_quant(Tensor x, Tensor w, Tensor w_scale, Tensor? w_zero, Tensor offs, str x_format, "
    "str w_format) -> Tensor",
    grouped_linear_quant,
    _grouped_linear_fake,
    tags=UNSAFE,
)
define(
    "moe(Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor up_scale, Tensor? up_zero, Tensor? up_bias, "
    "Tensor down, Tensor down_scale, Tensor? down_zero, Tensor? down_bias, bool interleaved, float alpha, float beta, "
    "float limit, str up_format, str down_format) -> Tensor",
    moe,
    _moe_fake,
    tags=UNSAFE,
)
define("grouped_outer(Tensor y, Tensor x, Tensor offs) -> Tensor", grouped_outer, _grouped_outer_fake, tags=UNSAFE)
