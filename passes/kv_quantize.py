"""The caches of fused attention (see `kv_cache`) are stored as integers, by scales that were found beforehand.

    %past_k: f32[s0,2,s4,32] = input
    %cached_attention: (f32[s0,6,s1,32], f32[s0,2,s1+s4,32], f32[s0,2,s1+s4,32]) = qfx.cached_attention(%q, %k, %v, \
%past_k, %past_v, %mask, None, 0.1767, False, 0.0)
    ->
    %past_k: i8[s0,2,s4,32] = input
    %quantized_cached_attention: (f32[s0,6,s1,32], i8[s0,2,s1+s4,32], i8[s0,2,s1+s4,32]) = \
qfx.quantized_cached_attention(%q, %k, %v, %past_k, %past_v, @past_k.scale, @past_v.scale, %mask, None, 0.1767, False, \
0.0, i8/ch, i8/ch)

With i4 two codes lie in a byte: u8[s0,2,s4,16].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from qfx.format import Format
from qfx.graph import add_tensor, is_call
from qfx.ops import cached as cache_ops
from qfx.passes import _match as m
from qfx.passes._build import matched, value_of

_FLOAT = torch.ops.qfx.cached_attention.default
_QUANTIZED = torch.ops.qfx.quantized_cached_attention.default


def kv_quantize(gm: fx.GraphModule, *, formats: Mapping[str, Format], scales: Mapping[str, Tensor]) -> bool:
    """Edit in place. Attention whose caches are read by others, or have no scales, is left as it is.

    formats: of "k" and "v", both of 8 or both of 4 bits. scales: f32 [G, D] by the name of a cache's placeholder.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if is_call(node, _FLOAT) and all(_is_free(past, scales) for past in node.args[3:5]):
            _quantize(gm, node, formats, scales)
            count += 1
    gm.recompile()
    return matched(gm, "kv_quantize", count)


def _is_free(past: object, scales: Mapping[str, Tensor]) -> bool:
    return isinstance(past, fx.Node) and past.name in scales and all(is_call(u, _FLOAT) for u in past.users)


def _quantize(gm: fx.GraphModule, node: fx.Node, formats: Mapping[str, Format], scales: Mapping[str, Tensor]) -> None:
    given = m.arguments(node)
    steps = []
    for what in ("k", "v"):
        past = given[f"past_{what}"]
        scale = scales[past.name].to(torch.float32)[None, :, None, :].contiguous()
        steps.append(add_tensor(gm, f"{past.name}.scale", scale, node))
        fake, fmt = past.meta["val"], formats[what]
        width = cache_ops.stored_width(fmt, scale.shape[-1])
        dtype = torch.int8 if fmt.bits == 8 else torch.uint8
        with fake.fake_mode:
            past.meta["val"] = fake.new_empty((*fake.shape[:3], width), dtype=dtype)
    names = ("q", "k", "v", "past_k", "past_v")
    rest = [given[name] for name in ("mask", "sinks", "scale", "causal", "softcap")]
    node.args = (*(given[n] for n in names), *steps, *rest, str(formats["k"]), str(formats["v"]))
    node.target, node.kwargs = _QUANTIZED, {}
    node.meta["val"] = value_of(_QUANTIZED, node.args, {}, node)
    for part in node.users:
        part.meta["val"] = node.meta["val"][part.args[1]]
