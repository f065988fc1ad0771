"""Which op of this backend takes which quantized node: one rule for each qfx:: op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qfx import graph
from qfx.backends.triton.rules_attention import (
    attention,
    cache_append,
    cache_attention,
    cache_read,
    quantized_attention,
)
from qfx.backends.triton.rules_experts import grouped_linear, grouped_linear_quant
from qfx.backends.triton.rules_linear import embedding, linear
from qfx.backends.triton.rules_rotation import hadamard
from qfx.backends.triton.site import Rule, Site, Taken
from qfx.ops import floats as float_ops


def _inlined(function: Callable[..., Any]) -> Rule:
    """The op's own definition in torch, which Inductor fuses with what stands around it."""

    def rule(site: Site) -> Taken:
        kernel = f"{graph.op_name(site.node)} (torch, compiled)"
        site.node.target = function
        return Taken(kernel)

    return rule


def _attention(site: Site) -> Taken | str:
    return attention(site) or _inlined(float_ops.attention)(site)


def _without(what: str) -> Rule:
    return lambda site: f"there is no kernel for {what}"


RULES: dict[str, Rule] = {
    "qfx::linear": linear,
    "qfx::embedding": embedding,
    "qfx::hadamard": hadamard,
    "qfx::quantized_attention": quantized_attention,
    "qfx::cache_attention": cache_attention,
    "qfx::cache_append": cache_append,
    "qfx::cache_read": cache_read,
    "qfx::quantized_cached_attention": _without("attention over a cache that grows in codes"),
    "qfx::rope": _inlined(float_ops.rope),
    "qfx::attention": _attention,
    "qfx::cached_attention": _inlined(float_ops.cached_attention),
    "qfx::quick_gelu": _inlined(float_ops.quick_gelu),
    "qfx::grouped_linear": grouped_linear,
    "qfx::grouped_linear_quant": grouped_linear_quant,
    "qfx::moe": _without("experts in one op with their sum"),
    "qfx::dequantize": _without("weights that are read as floats"),
}
