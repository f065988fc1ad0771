"""Linear layers, norms, softmax, embedding, convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from qfx.backends.onnx.build import Builder, broadcast
from qfx.backends.onnx.math import Emit, operands
from qfx.backends.onnx.portable import product
from qfx.backends.onnx.shapes import axis_of
from qfx.backends.onnx.values import Dim, Value, is_static
from qfx.graph import is_call

_aten = torch.ops.aten


def transposed(b: Builder, node: Any) -> Value | None:
    """The value whose last two dimensions are swapped to give a 2-dimensional argument; None where there is none at
    hand (the swap may be of an earlier stage)."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta["val"].dim() != 2:
        return None
    if is_call(node, _aten.t.default) or (
        is_call(node, _aten.transpose.int, _aten.permute.default) and tuple(_flat(node.args[1:])) in _SWAPS
    ):
        source = node.args[0]
        return b.value_of(source) if isinstance(source, fx.Node) and b.has(source) else None
    return None


_SWAPS = {(0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0), (1, -2), (-2, 1)}


def _flat(args: Sequence[Any]) -> list[Any]:
    return [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]


def linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """x @ weight^T + bias. The weight is used as it lies in memory, transposed or not."""
    assert b.node is not None
    straight = transposed(b, b.node.args[1])  # weight = straight^T, so x @ straight
    rows = b.reshape(x, (1, *x.dims)) if x.rank == 1 else x
    if straight is not None and straight.rank == 2:
        y = b.op("MatMul", rows, straight)
    else:
        y = product(b, rows, weight)
    if x.rank == 1:
        y = b.op("Squeeze", y, b.ints([0]))
    return y if bias is None else b.op("Add", y, bias)


def matmul(b: Builder, x: Value, y: Value) -> Value:
    """Matrix product with torch's (NumPy's) broadcasting."""
    return b.op("MatMul", *operands(b, x, y, dtype=b.out_dtype))


def addmm(b: Builder, base: Value, x: Value, y: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    """beta * base + alpha * (x @ y): addmm, baddbmm, addmv."""
    product = b.op("MatMul", x, y)
    if alpha != 1:
        product = b.op("Mul", product, b.scalar(alpha, product.dtype))
    if beta == 0:
        return product
    if beta != 1:
        base = b.op("Mul", base, b.scalar(beta, base.dtype))
    return b.op("Add", product, base)


def embedding(b: Builder, weight: Value, ids: Value, *_: Any) -> Value:
    """Rows of a table."""
    return b.op("Gather", weight, ids, axis=0)


def layer_norm(
    b: Builder, x: Value, shape: Sequence[Dim], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    """Layer norm over the last len(shape) dimensions."""
    scale = weight if weight is not None else _ones(b, shape, x.dtype)
    return b.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(eps))


def native_layer_norm(b: Builder, x: Value, shape: Sequence[Dim], weight: Any, bias: Any, eps: float) -> list[Value]:
    """Layer norm with mean and 1 / deviation."""
    scale = weight if weight is not None else _ones(b, shape, x.dtype)
    attrs: dict[str, Any] = {"axis": -len(shape), "epsilon": float(eps)}
    return b.ops("LayerNormalization", x, scale, bias, dtypes=[x.dtype, torch.float32, torch.float32], **attrs)


def rms_norm(
    b: Builder, x: Value, shape: Sequence[Dim], weight: Value | None = None, eps: float | None = None
) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight."""
    scale = weight if weight is not None else _ones(b, shape, x.dtype)
    epsilon = torch.finfo(b.out.dtype).eps if eps is None else eps
    if not b.portable:
        return b.op("SimplifiedLayerNormalization", x, scale, axis=-len(shape), epsilon=float(epsilon), stash_type=1)
    axes = b.ints(range(-len(shape), 0))  # the spelling that ONNX Runtime and OpenVINO make one kernel of
    mean = b.op("ReduceMean", b.op("Pow", x, b.scalar(2.0, x.dtype)), axes, keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.scalar(float(epsilon), x.dtype)))
    return b.op("Mul", b.op("Div", x, root), scale)


def _ones(b: Builder, shape: Sequence[Dim], dtype: torch.dtype) -> Value:
    """Ones in the shape of a norm, whose sizes may vary."""
    if not is_static(shape):
        return b.op("Expand", b.scalar(1, dtype), b.shape(shape))
    return b.weight(torch.ones([int(s) for s in shape], dtype=dtype), f"ones_{'x'.join(map(str, shape))}")


def group_norm(
    b: Builder,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    """Norm over groups of channels: layer norm of each group, then scale and shift per channel."""
    batch, channels = x.dims[:2]
    size = b.op("Reshape", x, b.shape([batch, groups, -1]))
    width = channels // groups
    for d in x.dims[2:]:
        width = width * d
    ones = b.op("Expand", b.scalar(1, x.dtype), b.shape([width]))
    normal = b.op("LayerNormalization", size, ones, None, axis=-1, epsilon=float(eps))
    y = b.reshape(normal, x.dims)
    return _affine_channels(b, y, x.rank, weight, bias)


def batch_norm(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, training: bool, _: float,
    eps: float, *__: Any,
) -> Value:  # fmt: skip
    """Batch norm by its running statistics."""
    if training:
        raise NotImplementedError("batch norm in training")
    deviation = b.op("Sqrt", b.op("Add", var, b.scalar(eps, var.dtype)))
    centred = b.op("Sub", x, _per_channel(b, mean, x.rank))
    return _affine_channels(b, b.op("Div", centred, _per_channel(b, deviation, x.rank)), x.rank, weight, bias)


def frozen_batch_norm(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, momentum: float, eps: float
) -> list[Value]:
    """Batch norm by its running statistics, with the two empty results that torch gives beside it."""
    empty = b.const(torch.zeros(0), x.dtype)
    return [batch_norm(b, x, weight, bias, mean, var, False, momentum, eps), empty, empty]


def instance_norm(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, own: bool, momentum: float,
    eps: float, *_: Any,
) -> Value:  # fmt: skip
    """Every channel normalized by itself, or by running statistics."""
    if not own:
        return batch_norm(b, x, weight, bias, mean, var, False, momentum, eps)
    return group_norm(b, x, x.dims[1], weight, bias, eps)


def cosine_similarity(b: Builder, x: Value, y: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    """x . y / (max(|x|, eps) max(|y|, eps)) along a dimension."""
    common = broadcast([x.dims, y.dims])
    axis = b.ints([axis_of(dim, len(common))])
    x, y = (v if v.dims == common else b.op("Expand", v, b.shape(common)) for v in operands(b, x, y))
    floor = b.scalar(eps, x.dtype)
    sizes = [b.op("Max", b.op("ReduceL2", v, axis, keepdims=0), floor) for v in (x, y)]
    dot = b.op("ReduceSum", b.op("Mul", x, y), axis, keepdims=0)
    return b.op("Div", dot, b.op("Mul", *sizes))


def _per_channel(b: Builder, value: Value, rank: int) -> Value:
    return b.op("Unsqueeze", value, b.ints(list(range(1, rank - 1)))) if rank > 2 else value


def _affine_channels(b: Builder, y: Value, rank: int, weight: Value | None, bias: Value | None) -> Value:
    if weight is not None:
        y = b.op("Mul", y, _per_channel(b, weight, rank))
    return y if bias is None else b.op("Add", y, _per_channel(b, bias, rank))


def softmax(b: Builder, x: Value, dim: int, *_: Any, op_type: str = "Softmax") -> Value:
    """Softmax in the dtype of the result."""
    if x.rank == 0:
        return b.op("Squeeze", b.op(op_type, b.op("Unsqueeze", b.cast(x, b.out_dtype), b.ints([0])), axis=0))
    return b.op(op_type, b.cast(x, b.out_dtype), axis=axis_of(dim, x.rank))


def log_softmax(b: Builder, x: Value, dim: int, *_: Any) -> Value:
    """log(softmax(x))."""
    return softmax(b, x, dim, op_type="LogSoftmax")


def conv(
    b: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """conv1d, conv2d, conv3d with a batch dimension; padding in numbers, 'valid' or 'same'."""
    n = weight.rank - 2
    if x.rank != weight.rank:
        raise NotImplementedError("a convolution without batch dimension")
    stride, dilation = _each(stride, n), _each(dilation, n)
    if isinstance(padding, str):
        spans = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.dims[2:], strict=True)]
        pads = [s // 2 for s in spans] + [s - s // 2 for s in spans]
    else:
        pads = _each(padding, n) * 2
    return b.op("Conv", x, weight, bias, strides=stride, pads=pads, dilations=dilation, group=groups)


def convolution(
    b: Builder, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,
    is_transposed: bool, output_padding: Any, groups: int, *_: Any,
) -> Value:  # fmt: skip
    """The general convolution."""
    if not is_transposed:
        return conv(b, x, weight, bias, stride, padding, dilation, groups)
    n = weight.rank - 2
    return b.op(
        "ConvTranspose", x, weight, bias, strides=_each(stride, n), pads=_each(padding, n) * 2,
        dilations=_each(dilation, n), output_padding=_each(output_padding, n), group=groups,
    )  # fmt: skip


def conv_transpose(
    b: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    """conv_transpose1d, 2d, 3d."""
    return convolution(b, x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _each(value: Any, n: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * n if len(values) == 1 else values)]


def max_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    *, n: int,
) -> Value:  # fmt: skip
    """Max pooling over the last n dimensions."""
    return _pool(
        b, "MaxPool", x, n, kernel_shape=_each(kernel, n), strides=_each(stride or kernel, n),
        pads=_each(padding, n) * 2, dilations=_each(dilation, n), ceil_mode=int(ceil_mode),
    )  # fmt: skip


def avg_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor: Any = None, *, n: int,
) -> Value:  # fmt: skip
    """Average pooling over the last n dimensions."""
    if divisor is not None:
        raise NotImplementedError("average pooling with a divisor")
    return _pool(
        b, "AveragePool", x, n, kernel_shape=_each(kernel, n), strides=_each(stride or kernel, n),
        pads=_each(padding, n) * 2, count_include_pad=int(count_include_pad), ceil_mode=int(ceil_mode),
    )  # fmt: skip


def _pool(b: Builder, op_type: str, x: Value, n: int, **attrs: Any) -> Value:
    """A pool, which ONNX has of a batch only."""
    if x.rank == n + 2:
        return b.op(op_type, x, **attrs)
    return b.op("Squeeze", b.op(op_type, b.op("Unsqueeze", x, b.ints([0])), **attrs), b.ints([0]))


def adaptive_avg_pool(b: Builder, x: Value, size: Any) -> Value:
    """Average pooling to size 1."""
    if any(s != 1 for s in size):
        raise NotImplementedError("adaptive pooling to more than one place")
    return b.op("ReduceMean", x, b.ints(list(range(x.rank - len(size), x.rank))), keepdims=1)


EMIT: dict[str, Emit] = {
    "aten.linear.default": linear, "aten.matmul.default": matmul, "aten.mm.default": matmul, "aten.bmm.default": matmul,
    "aten.mv.default": matmul, "aten.dot.default": matmul, "aten.addmm.default": addmm, "aten.baddbmm.default": addmm,
    "aten.addmv.default": addmm, "aten.embedding.default": embedding, "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": native_layer_norm, "aten.rms_norm.default": rms_norm,
    "aten.group_norm.default": group_norm, "aten.batch_norm.default": batch_norm,
    "aten._native_batch_norm_legit_no_training.default": frozen_batch_norm, "aten.instance_norm.default": instance_norm,
    "aten.cosine_similarity.default": cosine_similarity,
    "aten.softmax.int": softmax, "aten._softmax.default": softmax, "aten.log_softmax.int": log_softmax,
    "aten._log_softmax.default": log_softmax, "aten.special_softmax.default": softmax,
    **{f"aten.conv{n}d.{o}": conv for n in (1, 2, 3) for o in ("default", "padding")},
    "aten.convolution.default": convolution, "aten._convolution.default": convolution,
    "aten.conv_transpose1d.default": conv_transpose, "aten.conv_transpose2d.input": conv_transpose,
    "aten.conv_transpose3d.input": conv_transpose,
    **{f"aten.max_pool{n}d.default": partial(max_pool, n=n) for n in (1, 2, 3)},
    **{f"aten.avg_pool{n}d.default": partial(avg_pool, n=n) for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": adaptive_avg_pool for n in (1, 2, 3)},
}  # fmt: skip
