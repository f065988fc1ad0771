"""qfx::quantized_attention for many queries at once (prefill): int8 q.k where both are integers, f16 p.v.

qfx_triton::quantized_attention, with the arguments of `qfx.ops.attention`. It computes what the reference does: codes
and scales are the same, sums are f32. What differs is the order of sums; the weights p of a row, which are f16 or bf16
where p has no format (f32 operands: tf32); values with scales by token, which are rounded to the same types. Where p
has a format its codes are those of the finished softmax, so keys are passed twice.

Scores are found block by block and never stored (FlashAttention-2, Dao 2023; SageAttention, Zhang et al. 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from qfx.backends.triton import tuning
from qfx.backends.triton.attention_operands import (
    Laid,
    Steps,
    common,
    constants,
    fixed,
    holding,
    indices,
    lay,
    steps_of,
)
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.quantized_attention import attention, mask_bounds
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.row_codes import FLOATS, dense
from qfx.errors import explain
from qfx.format import Format
from qfx.ops import attention as attention_ops
from qfx.ops import heads as attention_heads
from qfx.ops.heads import Static

WIDEST = 256
_LOG2E = math.log2(math.e)
_ALIGNED = 16
_BESIDE = 1024  # bytes of shared memory for what else there is
KERNEL = "quantized_attention"


def reason_against(width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """Why no kernel computes attention of this head size and dtype, or None. Formats are taken as the op takes them."""
    if not 0 < max(width, value_width) <= WIDEST or min(width, value_width) == 0:
        return f"heads of 1 to {WIDEST} channels have kernels, not of {width} and {value_width}"
    return None if dtype in FLOATS else f"operands in f16, bf16 or f32 have kernels, not in {dtype}"


def quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, q_scale: Sequence[float],
    q_zero: Sequence[int], k_scale: Sequence[float], k_zero: Sequence[int], v_scale: Sequence[float],
    v_zero: Sequence[int], scale: float, causal: bool, softcap: float, q_format: str, k_format: str, v_format: str,
    p_format: str,
) -> Tensor:  # fmt: skip
    """Attention between rounded operands, [B, H, S, Dv] in q.dtype; arguments as `qfx.ops.attention` has them.

    q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv] in f16, bf16 or f32, any strides; mask booleans that keep or
    added floats, broadcast to [B, H, S, L]. Raises ValueError for other shapes, dtypes, devices and formats.
    """
    given = (q_scale, q_zero, k_scale, k_zero, v_scale, v_zero)
    asked = attention_ops.checked(q, k, v, given, (q_format, k_format, v_format, p_format))
    device = _checked(q, k, v, mask, sinks)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    if 0 in out.shape:
        return out
    if k.shape[2] == 0:
        return out.zero_()
    if alone := attention_heads.whole(asked, given):
        _share(out, None, (q, k, v), mask, sinks, (scale, causal, softcap), alone, device)
        return out
    for share in attention_heads.shares(asked, q.shape[1], k.shape[1]):
        heads, own = (indices(tuple(share.of(role)), q.device) for role in "qk")
        parts = (q.index_select(1, heads), k.index_select(1, own), v.index_select(1, own))
        _share(out, heads, parts, mask, sinks, (scale, causal, softcap), share.static(asked, given), device)
    return out


def prepare(given: Sequence[Sequence[Any]], formats: Sequence[str], heads: int, own: int, where: torch.device) -> None:
    """Bring what calls with these scales and formats look up to the device, once: a CUDA graph cannot capture copies.

    given: scales of q, its zero points, those of k and of v. heads, own: how many q and k have.
    """
    asked = [attention_heads.read(text) for text in formats]
    alone = attention_heads.whole(asked, given)
    statics = [] if alone is None else [alone]
    for share in attention_heads.shares(asked, heads, own) if alone is None else ():
        for role in "qk":
            indices(tuple(share.of(role)), where)
        statics.append(share.static(asked, given))
    for one in itertools.chain.from_iterable(each[:3] for each in statics):
        if one.format is not None and not one.format.is_plain and not one.format.dynamic:
            fixed(one.format, one, where)


def _share(
    out: Tensor, heads: Tensor | None, operands: tuple[Tensor, Tensor, Tensor], mask: Tensor | None,
    sinks: Tensor | None, how: tuple[float, bool, float], given: Sequence[Static], device: Device,
) -> None:  # fmt: skip
    """Heads whose formats are the same, into their place in `out`. heads: which of its heads they are, None for all.

    operands: q, k, v. how: scale, causal, softcap.
    """
    (q, k, v), (qs, ks, vs, ps), (scale, causal, softcap) = operands, given, how
    share = q.shape[1] // k.shape[1]
    centred = attention_ops.is_centred(ks.format)
    mean = k.mean(-2, keepdim=True, dtype=torch.float32) if centred else None
    dtype = common(holding(qs.format, q.dtype, device), holding(ks.format, k.dtype, device))
    width = max(32, triton.next_power_of_2(q.shape[-1]))
    k_steps = steps_of(k, ks, mean)
    by_token = ks.format is not None and ks.format.granularity == "tok"
    keys = lay(k, ks.format, k_steps, dtype, width, mean=mean, centred=centred, stepped=by_token)
    biased = mean is not None and (softcap > 0 or sinks is not None)
    queries = lay(q, qs.format, steps_of(q, qs, None), dtype, width, mean=mean, stepped=True, factor=scale * _LOG2E,
                  times=k_steps, share=share, biased=biased)  # fmt: skip
    values, v_steps = _values(v, vs)
    _start(out, heads, queries, keys, values, v_steps, mask, sinks, scale, causal, softcap, ps.format, device)


def _values(v: Tensor, given: Static) -> tuple[Tensor, Steps]:
    """Values [B, G, L, width] as factors of the weights, and what the product is still to be multiplied by.

    Codes are exact in f16. A scale of each token is inside the sum: its values are multiplied, in the dtype of v.
    """
    fmt, width = given.format, max(16, triton.next_power_of_2(v.shape[-1]))
    if fmt is None and v.shape[-1] == width and v.stride(-1) == 1 and v.dtype == dot_dtype(v.dtype):
        return v, Steps()
    steps = steps_of(v, given, None)
    multiplied = fmt is not None and fmt.granularity == "tok"
    if fmt is None or multiplied:
        dtype = v.dtype
    else:
        dtype = {"f32": v.dtype}.get(fmt.type, fmt.code_dtype) if fmt.is_plain else torch.float16
    return lay(v, fmt, steps, dot_dtype(dtype), width, multiplied=multiplied).codes, steps


def _start(
    out: Tensor, heads: Tensor | None, q: Laid, k: Laid, v: Tensor, v_steps: Steps, mask: Tensor | None,
    sinks: Tensor | None, scale: float, causal: bool, softcap: float, p_format: Format | None, device: Device,
) -> None:  # fmt: skip
    """Launch the kernel that the operands need."""
    batch, count, rows, width = q.codes.shape
    fast = scale > 0 and not softcap > 0 and q.bias is None and (mask is None or mask.dtype == torch.bool)
    weights = _of_weights(p_format)
    traits = {"causal": causal, "mask": mask is not None, "capped": not fast, "p": weights["ROUNDED"]}
    config = configuration(q, v, [name for name, has in traits.items() if has], device, mask)
    spread, bounds = (None, None) if mask is None else _masks(mask, out.shape[:3], k.codes.shape[2], config)
    launch(attention, (triton.cdiv(rows, config["BLOCK_M"]) * batch * count,), q.codes, k.codes, v, q.step, k.step,
           v_steps.scale, q.bias, spread, bounds, dense(sinks), heads, out, rows, k.codes.shape[2], count, out.shape[1],
           *v.stride()[:3], v_steps.stride, *((0, 0, 0, 0) if spread is None else spread.stride()),
           *((0, 0) if bounds is None else bounds.expand(batch, out.shape[1], -1, -1).stride()[:2]),
           softcap * _LOG2E if softcap > 0 else None, SHARE=count // k.codes.shape[1], CAUSAL=causal, FAST=fast,
           BOOL=mask is not None and mask.dtype == torch.bool, WIDTH=width, VALUE_WIDTH=v.shape[-1],
           DV=out.shape[-1], **weights, config=config)  # fmt: skip


def _masks(mask: Tensor, shape: torch.Size, length: int, config: Config) -> tuple[Tensor, Tensor]:
    """The mask [B, H, S, L], booleans as bytes, and which keys it leaves for each block of rows; shape: B, H, S."""
    found = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    found = found[(None,) * (4 - found.dim())]
    if found.stride(-2) % _ALIGNED or found.stride(-1) > 1 or found.data_ptr() % _ALIGNED:  # would be read one by one
        found = F.pad(found, (0, -found.shape[-1] % _ALIGNED))[..., : found.shape[-1]]
    own = found.expand(-1, -1, shape[2], length)
    blocks = triton.cdiv(shape[2], config["BLOCK_M"])
    bounds = torch.empty((*own.shape[:2], blocks, 3), dtype=torch.int32, device=mask.device)
    launch(mask_bounds, (*own.shape[:2], blocks), own, bounds, shape[2], length, *own.stride(),
           BOOL=mask.dtype == torch.bool, BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"],
           config={"num_warps": 8, "num_stages": 1})  # fmt: skip
    return own.expand(*shape, length), bounds


def _of_weights(fmt: Format | None) -> dict[str, Any]:
    """How weights, between 0 and 1, become codes: constants of the kernel."""
    found = constants(fmt)
    kept = ("INTEGER", "BITS", "LEAST", "QMAX", "CLIP", "BY_ROW")
    return {"ROUNDED": found["SCALED"], **{key: found[key] for key in kept}}


def configuration(q: Laid, v: Tensor, kind: Sequence[str], device: Device, mask: Tensor | None = None) -> Config:
    """The measured configuration for a problem, else the heuristic one. kind: what makes another variant of it."""
    rows, width, dtype = q.codes.shape[2], q.codes.shape[3], q.codes.dtype
    problem = " ".join([f"d={width} dv={v.shape[-1]} {str(dtype)[6:]} {str(v.dtype)[6:]}", *kind])
    lean = dtype == torch.int8 and not set(kind) - {"causal"}
    given = (max(width * dtype.itemsize, v.shape[-1] * v.dtype.itemsize), lean, device)
    known = tuning.tuned(device, KERNEL, problem, rows, lambda most: candidates(most, *given))
    found = known or _heuristic(rows, *given)
    row = width * dtype.itemsize
    queries = row if device.from_shared or dtype == torch.float32 else 0  # else they are held in registers
    sizes = (queries, row, v.shape[-1] * v.dtype.itemsize, 0 if mask is None else mask.dtype.itemsize)
    return fitted(found, sizes, device)


def fitted(config: Config, sizes: tuple[int, int, int, int], device: Device) -> Config:
    """A configuration with as many stages, then rows, as there is shared memory for.

    sizes: bytes of a row of queries (0: not held there), of keys and of values, and of an element of the mask.
    """
    found, (q, k, v, mask) = dict(config), sizes

    def held() -> int:
        stages, rows = found["num_stages"], found["BLOCK_M"]
        # Triton has a tile of keys more on its way than of values, or as many of both
        tiles = max((k + v) * stages, k * (stages + 1) + v * (stages - 1)) + rows * mask * (stages - 1)
        return found["BLOCK_N"] * tiles + rows * q + _BESIDE

    while held() > device.shared and (found["num_stages"] > 2 or found["BLOCK_M"] > 16):
        if found["num_stages"] > 2:
            found["num_stages"] -= 1
        else:
            found["BLOCK_M"] //= 2
            found["num_warps"] = max(4, found["num_warps"] // 2)
    return found


def _heuristic(rows: int, wide: int, lean: bool, device: Device) -> Config:
    """wide: bytes of a row of keys or values, the greater. lean: integers, no mask, cap or p. No variant spills."""
    hopper = device.capability[0] == 9  # later ones multiply integers from registers
    if wide <= 128:
        block, columns, stages = 128, 64, 3
    elif wide <= 256 and (lean or hopper):
        block, columns, stages = 128, 64, 2 if not lean else 3 if hopper else 4
    elif wide <= 256:
        block, columns, stages = 64, 64, 3
    elif wide <= 512:
        block, columns, stages = 128 if lean and hopper else 64, 64 if lean else 32, 2
    else:
        block, columns, stages = 64, 16, 2
    least = min(max(triton.next_power_of_2(rows), 16), block)
    warps = 4 if wide <= 128 and lean and hopper else min(8, max(4, least // 8))  # two programs of 4 share a processor
    return {"BLOCK_M": least, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages}


def candidates(rows: int, wide: int, lean: bool, device: Device) -> list[Config]:
    """Configurations to measure, the heuristic one first; arguments as it has them."""
    first = _heuristic(rows, wide, lean, device)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    choices = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3),
               (128, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 32, 4, 3),
               (64, 64, 8, 2), (64, 32, 8, 3)]  # fmt: skip
    others = [dict(zip(names, one, strict=True)) for one in choices]
    fits = [one for one in others if 2 * one["BLOCK_N"] * one["num_stages"] * wide <= device.shared]
    return [first, *(one for one in fits if one != first)]


def _checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Device:
    """Raises ValueError for what the kernels do not take, UnsupportedError where the device has none."""
    device = device_of(q)
    reasons = [reason_against(q.shape[-1], v.shape[-1], x.dtype) for x in (q, k, v)]
    reason = next((reason for reason in reasons if reason), None)
    shapes = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (q, k, v))
    if reason is not None:
        raise ValueError(
            explain(
                f"qfx_triton::quantized_attention: {reason}",
                found=shapes,
                next_step="use torch.ops.qfx.quantized_attention",
            )
        )
    fits = (q.shape[0], k.shape[2], q.shape[3]) == (k.shape[0], v.shape[2], k.shape[3]) and k.shape[:2] == v.shape[:2]
    others = [x for x in (k, v, mask, sinks) if x is not None]
    if not fits or any(x.device != q.device for x in others):
        raise ValueError(
            explain(
                "qfx_triton::quantized_attention: the operands do not fit",
                expected="q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv], all on one device",
                found=shapes + "".join(f", {x.dtype} {list(x.shape)} on {x.device}" for x in others[2:]),
                next_step="bring them to one device, with as many keys as values",
            )
        )
    return device


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *rest: Any) -> Tensor:
    attention_ops.checked(q, k, v, rest[:6], rest[9:])
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


define(attention_ops.SCHEMA, quantized_attention, _fake)
