"""Annotated attention becomes qfx::quantized_attention.

    %y: f32[2,4,5,8] = aten.scaled_dot_product_attention(%q, %k, %v)  # q=i8/tok k=i8 p=u8
    ->
    %y: f32[2,4,5,8] = qfx.quantized_attention(%q, %k, %v, None, None, [], [], [0.04], [], [], [], 0.3535, False, 0.0, \
i8/tok, i8, , u8)  # q=i8/tok k=i8 p=u8

Scales of static formats are found beforehand and become numbers in the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Formats, each, show
from qfx.format import Format
from qfx.ops import attention as attention_ops
from qfx.ops import heads as attention_heads
from qfx.ops.attention import needs_scale
from qfx.ops.heads import ROLES
from qfx.passes import _match as m
from qfx.passes._build import SPELLED_OUT, call, take_place
from qfx.passes._calibrated import calibrated
from qfx.passes._sites import ATTENTION

BY_HAND, SDPA = "spelled-out", "sdpa"  # how a module computes its attention


def is_attention(node: fx.Node) -> bool:
    """Attention in float."""
    return graph.schema_name(node) in ATTENTION


def way_of(node: fx.Node) -> str:
    """How the model computes this attention."""
    return BY_HAND if node.meta.get(SPELLED_OUT) else SDPA


def reason_against(node: fx.Node, role: str, fmt: Formats) -> str | None:
    """Why attention cannot have these formats of an operand, or None. ValueError: those of other heads."""
    given = _operands(node)
    shapes = [m.shape(given[name]) for name in "qkv"]
    if role not in ROLES or not isinstance(fmt, Format | tuple):
        return "attention takes formats for q, k, v and p, one for all heads or one for each"
    if any(len(shape) != 4 for shape in shapes):
        return f"attention runs in float where its operands have not 4 dimensions, found {len(shapes[0])}"
    if given["dropout"] or (given["scale"] is None and not isinstance(m.known(shapes[0][-1]), int)):
        return "attention with dropout, or with a head size that is not a number, runs in float"
    if isinstance(fmt, tuple):
        heads, own = (m.known(shape[1]) for shape in shapes[:2])
        if not isinstance(heads, int) or not isinstance(own, int):
            return "formats by heads need a number of heads that is fixed"
        attention_heads.check({role: fmt}, heads, own, graph.fqn_of(node))
    return next((reason for one in each(fmt) if (reason := attention_ops.reason_against(role, one))), None)


def quantize_attention(gm: fx.GraphModule, node: fx.Node, tensors: Mapping[str, Tensor]) -> None:
    """Put the op in place of one annotated attention node.

    tensors: calibrated values by "<FQN>/k_scale", "<FQN>/k_zero", ... Raises UnsupportedError where one is missing.
    """
    given, formats = _operands(node), annotation.get(node)
    steps: list[Any] = []
    for role in "qkv":
        steps += numbers(tensors, graph.fqn_of(node), role, formats.get(role), node)
    scale = given["scale"]
    if scale is None:
        width = m.shape(given["q"])[-1]
        scale = 1.0 / math.sqrt(width) if width else 1.0
    texts = [show(formats[role]) if role in formats else "" for role in ROLES]
    rest = (float(scale), bool(given["causal"]), float(given["softcap"] or 0.0))
    args = (given["q"], given["k"], given["v"], given["mask"], given["sinks"], *steps, *rest, *texts)
    with gm.graph.inserting_before(node):
        new = call(gm, torch.ops.qfx.quantized_attention.default, *args, like=node)
    new.meta[graph.CALLED] = graph.op_name(node)
    take_place(node, new)


def numbers(
    tensors: Mapping[str, Tensor], fqn: str, role: str, formats: Formats | None, node: fx.Node | None = None
) -> tuple[list[float], list[int]]:
    """Scales and zero points of an operand as numbers; empty where its format needs none from data."""
    if formats is None or not needs_scale(role, formats):
        return [], []
    what, instead = "a static format of attention", f", or use '{each(formats)[0].type}/tok'"
    scale, zero = calibrated(tensors, fqn, role, formats, node, what=what, instead=instead)
    points = [] if zero is None else zero.reshape(-1).tolist()
    return [float(s) for s in scale.to(torch.float32).reshape(-1).tolist()], [int(z) for z in points]


def _operands(node: fx.Node) -> dict[str, Any]:
    """q, k, v, mask, sinks, scale, causal, softcap and dropout of either operator."""
    given = m.arguments(node)
    if "q" in given:
        return {**given, "dropout": 0.0}
    return {
        "q": given["query"], "k": given["key"], "v": given["value"], "mask": given["attn_mask"], "sinks": None,
        "scale": given["scale"], "causal": given["is_causal"], "softcap": 0.0, "dropout": given["dropout_p"],
    }  # fmt: skip
