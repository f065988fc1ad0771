"""Attention over a quantized cache of keys and values: reference semantics in plain torch.

    qfx::quantized_cached_attention(q, k, v, past_k, past_v, k_scale, v_scale, mask?, sinks?, scale, causal, softcap,
                                    k_format, v_format) -> (y, keys, values)

A cache is stored as `pack_codes` of a static symmetric format stores it: int8 [B, G, L, D] for i8, uint8
[B, G, L, ceil(D / 2)] for i4. Its scales f32 [1, G, 1, D] (one for each channel of each head) are found beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import dequantize
from qfx.ops import floats as float_ops
from qfx.ops.library import UNSAFE, define
from qfx.packing import pack_codes, unpack_codes

PROMPT = 32  # new tokens from which float attention over the dequantized cache is faster


def encode(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """What a cache holds of x [B, G, S, D]; scale [1, G, 1, D]. Values beyond the range saturate, at -128 for i8."""
    middle = 1 << (fmt.bits - 1)
    codes = torch.round(x.to(torch.float32) / scale).clamp(-middle, middle - 1).to(torch.int8)
    return pack_codes(codes, _plain(fmt))


def decode(stored: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """f32 [B, G, L, D] of what a cache holds."""
    return dequantize(unpack_codes(stored, _plain(fmt), scale.shape[-1]), _plain(fmt), scale)


def quantized_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, k_scale: Tensor, v_scale: Tensor,
    mask: Tensor | None, sinks: Tensor | None, scale: float, causal: bool, softcap: float, k_format: str, v_format: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """qfx::cached_attention over a quantized cache; returns (y [B, H, S, D], keys, values), the stored caches grown.

    q [B, H, S, D], k and v [B, G, S, D] in float; past_k and past_v as stored. The new tokens are read as they come
    back from the cache too; but where nothing is cached yet, or PROMPT tokens or more are new, as they are in k and v.
    """
    ways = ((k, past_k, k_scale, Format.parse(k_format)), (v, past_v, v_scale, Format.parse(v_format)))
    grown = [torch.cat((past, encode(new, step, fmt)), -2) for new, past, step, fmt in ways]
    if past_k.shape[-2] == 0 or k.shape[-2] >= PROMPT:
        keys, values = (torch.cat((decode(past, step, fmt), new.float()), -2) for new, past, step, fmt in ways)
    else:
        keys, values = (decode(one, step, fmt) for one, (_, _, step, fmt) in zip(grown, ways, strict=True))
    return float_ops.attention(q, keys, values, mask, sinks, scale, causal, softcap), grown[0], grown[1]


def stored_width(fmt: Format, width: int) -> int:
    """Elements in which a cache holds a head of `width` channels."""
    return fmt.row_bytes(width)


def _plain(fmt: Format) -> Format:
    """The type alone: the scales broadcast as they are."""
    return Format(fmt.type)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, k_scale: Tensor, v_scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grown = [past.new_empty((*past.shape[:2], past.shape[2] + k.shape[2], past.shape[3])) for past in (past_k, past_v)]
    return q.new_empty((*q.shape[:-1], v.shape[-1])), grown[0], grown[1]


define(
    "quantized_cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor k_scale, "
    "Tensor v_scale, Tensor? mask, Tensor? sinks, float scale, bool causal, float softcap, str k_format, str v_format) "
    "-> (Tensor, Tensor, Tensor)",
    quantized_cached_attention,
    _fake,
    tags=UNSAFE,
)
