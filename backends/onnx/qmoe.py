"""qfx::moe as com.microsoft QMoE: one kernel from the router's scores to the sum over the experts.

It holds weights of 2, 4 or 8 bits in blocks and rounds activations to 8 bits per block, which the notes say. A router
that is a softmax and a top-k goes in as its scores; any other chooses before it, and the chosen have the score one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.moe import expert
from qfx.backends.onnx.nbits import BLOCKS, NBits
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.values import Value
from qfx.errors import Note, source_line
from qfx.format import Format
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes.moe import PARTS

aten = torch.ops.aten


def fits(up: fx.Node, down: fx.Node, weights: fx.Node) -> bool:
    """Does QMoE hold the weights of two qfx::grouped_linear_quant, and take this mixture of them?

    It leaves experts out whose weight in the mixture is below zero: none may be.
    """
    sizes = [m.shape(node.args[0])[-1] for node in (up, down)]
    if not all(isinstance(size, int) for size in sizes) or not _is_positive(weights):
        return False
    return _layout([Format.parse(str(node.args[6])) for node in (up, down)], sizes) is not None


_POSITIVE = (aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.relu.default, aten.exp.default)
_CHOOSE = (operator.getitem, aten.topk.default, aten.gather.default, aten.sum.dim_IntList, *m.CASTS, *m.RESHAPES)


def _is_positive(node: Any) -> bool:
    """Is no value of it below zero, whatever the input?"""
    constant = m.number(node)
    if constant is not None:
        return constant >= 0
    if is_call(node, *_POSITIVE):
        return True
    if is_call(node, *_CHOOSE):
        return _is_positive(node.args[0])
    return is_call(node, *m.ADD, *m.MUL, *m.DIV) and all(map(_is_positive, node.args[:2]))


def _layout(formats: list[Format], sizes: list[int]) -> NBits | None:
    """Bits and block size of both weights, whose inputs have these sizes; None where they have none in common."""
    if any(not f.is_integer or f.block or f.has_global_scale for f in formats) or len({f.bits for f in formats}) > 1:
        return None
    whole = [*sizes, *(f.group for f in formats if f.group)]
    block = next((size for size in BLOCKS if all(n % size == 0 for n in whole)), None)
    if block is None:
        return None
    bits = next(size for size in (2, 4, 8) if formats[0].bits <= size)
    return NBits(4 if bits == 2 and block == 16 else bits, block)


def moe(
    b: Builder, x: Value, ids: Value, weights: Value, up: Any, up_scale: Any, up_zero: Any, up_bias: Value | None,
    down: Any, down_scale: Any, down_zero: Any, down_bias: Value | None, interleaved: bool, alpha: float, beta: float,
    limit: float, up_format: str, down_format: str,
) -> Value:  # fmt: skip
    """QMoE, its gate and value rows interleaved."""
    assert b.node is not None
    wide = b.tensor(b.node.args[7]).shape[-2]  # type: ignore[arg-type]
    assert isinstance(wide, int)
    first = Weight.of(b, b.node.args[3:6], Format.parse(up_format), wide)
    second = Weight.of(b, b.node.args[7:10], Format.parse(down_format), first.n // 2)
    layout = _layout([first.format, second.format], [first.k, second.k])
    if b.standard or layout is None:
        raise NotImplementedError("experts as one operator")
    count = first.data.shape[0]
    order = None if interleaved else torch.arange(first.n).reshape(2, -1).t().reshape(-1)
    fc1 = layout.experts(b, [expert(first, e) for e in range(count)], order)
    fc2 = layout.experts(b, [expert(second, e) for e in range(count)])
    if up_bias is not None and order is not None:
        up_bias = b.op("Gather", up_bias, b.ints(order.tolist()), axis=1)
    scores, mixed, normalized = _routing(b, ids, weights, count)
    _tell(b)
    y = b.op(
        "QMoE", b.cast(x, torch.float32), scores, *fc1[:2], _float(b, up_bias), *fc2[:2], _float(b, down_bias),
        None, None, None, fc1[2], fc2[2], None, mixed,
        domain=MICROSOFT, dtype=torch.float32, k=int(ids.dims[1]), normalize_routing_weights=int(normalized),
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=alpha, activation_beta=beta,
        swiglu_limit=limit if math.isfinite(limit) else None, expert_weight_bits=layout.bits, block_size=layout.block,
        accuracy_level=4,
    )  # fmt: skip
    return Value(y.name, y.dtype, x.shape)


def _float(b: Builder, value: Value | None) -> Value | None:
    return None if value is None else b.cast(value, torch.float32)


def _routing(b: Builder, ids: Value, weights: Value, count: int) -> tuple[Value, Value | None, bool]:
    """(scores [T, E] to choose from, weights [T, E] or None, whether the kernel makes those of the chosen sum to one).

    A router that is a softmax and a top-k is QMoE's own; others choose outside.
    """
    assert b.node is not None
    found = _softmax_router(*b.node.args[1:3])
    if found is not None and all(b.has(one) for one in found):
        logits, *plain = (b.cast(b.value_of(one), torch.float32) for one in found)
        return (plain[0], plain[0], False) if plain else (logits, None, True)
    zeros = b.op("Expand", b.scalar(0.0, torch.float32), b.shape((ids.dims[0], count)))
    ones = b.op("Expand", b.scalar(1.0, torch.float32), b.shape(ids.dims))
    chosen = b.cast(ids, torch.int64)
    scores = b.op("ScatterElements", zeros, chosen, ones, axis=1)
    return scores, b.op("ScatterElements", zeros, chosen, b.cast(weights, torch.float32), axis=1), False


def _softmax_router(ids: Any, weights: Any) -> tuple[fx.Node, ...] | None:
    """(logits,) of a softmax and a top-k whose weights sum to one, (logits, softmax) of one whose weights do not."""
    if not is_call(ids, operator.getitem) or not is_call(ids.args[0], aten.topk.default) or ids.args[1] != 1:
        return None
    top = ids.args[0]
    given = m.arguments(top)
    if not m.is_last(given["dim"], given["self"]) or not given["largest"]:
        return None
    weights, source = m.skip_upcasts(weights), given["self"]
    if _is_softmax(weights) and _is_best(m.skip_upcasts(weights.args[0]), top):
        return (source,)
    if not _is_softmax(source):
        return None
    logits = source.args[0]
    if _is_best(weights, top):
        return logits, source
    if not m.plain_binary(weights, aten.div.Tensor) or not _is_best(weights.args[0], top):
        return None
    total = weights.args[1]
    by_token = is_call(total, aten.sum.dim_IntList) and total.args[0] is weights.args[0]
    return (logits,) if by_token and list(total.args[1]) in ([-1], [1]) else None


def _is_best(node: Any, top: fx.Node) -> bool:
    """Is it the values of a top-k?"""
    return is_call(node, operator.getitem) and node.args[0] is top and node.args[1] == 0


def _is_softmax(node: Any) -> bool:
    return is_call(node, aten.softmax.int, aten._softmax.default) and m.is_last(node.args[1], node)


def _tell(b: Builder) -> None:
    """The kernels of both products, and that they round."""
    assert b.node is not None
    where = source_line(b.node) or ""
    for name, fqn in b.node.meta.get(PARTS, []):
        b.fused[name] = b.node.name
        reason = "float activations were asked; QMoE rounds them to 8 bits per block inside (about 35 dB)"
        step = "none where that is enough; options={'backend': 'reference'} computes them in f32"
        b.notes.append(Note(fqn, reason, step, where, minor=True))


EMIT: dict[str, Emit] = {"qfx.moe.default": moe}
