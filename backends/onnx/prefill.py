"""Weight-only products of many rows by integers: 4-bit weights where few tokens are read, 8-bit ones for a prompt.

    MatMulNBits(x, codes, scales)
    ->
    If(rows >= 16):  MatMulIntegerToFloat(codes of x per token, codes of the weight per channel)
    else:            MatMulNBits(x, codes, scales)

MatMulNBits unpacks its weight for every block of rows, which a prompt pays for; an integer product does not. The 8-bit
weight is computed from the codes in the file when a session is made, which keeps it in memory beside them: 8 more bits
per weight. Both roundings are of 8 bits: about 40 dB for the activations, 45 dB and more for the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qfx.backends.onnx.branch import choose
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.nbits import NBits
from qfx.backends.onnx.quant_input import quantized_input
from qfx.backends.onnx.values import Value
from qfx.format import Format

MANY = 16  # rows from which the integer product is faster
_INPUT = Format.parse("i8/tok")


def has_prompts(b: Builder, x: Value, zeros: Value | None) -> bool:
    """May the rows of x [.., K] be many, and is the weight one that can be taken over: without zero points?"""
    sizes = x.dims[:-1]
    one_token = len(sizes) > 1 and sizes[-1] == 1  # the last layer reads the last token only
    known = all(isinstance(size, int) for size in sizes)
    few = one_token or (known and math.prod(int(s) for s in sizes) < MANY)
    return b.prefill and zeros is None and not few


def product(
    b: Builder, x: Value, layout: NBits, k: int, data: Value, scales: Value, bias: Value | None,
    few: Callable[[], Value],
) -> Value:  # fmt: skip
    """x [.., K] times a weight [N, K] in MatMulNBits' layout: `few` where the rows are few, integers where not."""
    n = data.dims[0]
    assert isinstance(n, int)
    codes, scale = _columns(b, layout, k, data, scales)
    rows = b.dim(math.prod(x.dims[:-1]))
    key = ("many", rows.name)
    if key not in b.memo:
        b.memo[key] = b.op("GreaterOrEqual", rows, b.ints([MANY]), dtype=torch.bool)
    shape = (*x.dims[:-1], n)

    def many() -> Value:
        q = quantized_input(b, x, _INPUT, None, None, None)
        y = b.op("MatMulIntegerToFloat", q.codes, codes, q.scale, scale, q.zero, domain=MICROSOFT, dtype=torch.float32)
        y = b.op("Mul", y, q.rows)
        y = y if bias is None else b.op("Add", y, bias)
        assert q.rows is not None
        return b.reshape(Value(y.name, y.dtype, (q.rows.dims[0], n)), shape)

    def alike() -> Value:
        y = few()
        return Value(y.name, y.dtype, shape)

    return choose(b, b.memo[key], x, many, alike)


def _columns(b: Builder, layout: NBits, k: int, data: Value, scales: Value) -> tuple[Value, Value]:
    """int8 codes [K, N] and scales [N], of one scale per row: constants that a session computes once."""
    bits, per_byte, middle = layout.bits, 8 // layout.bits, 1 << (layout.bits - 1)
    n, blocks, _ = data.dims
    greatest = float(middle if bits < 8 else middle - 1)  # the codes of 8 bits are symmetric
    top = b.op("ReduceMax", b.op("Abs", scales), b.ints([1]), keepdims=1)
    row = b.op("Mul", top, b.const(greatest / 127, torch.float32))
    row = b.op("Max", row, b.const(torch.finfo(torch.float32).tiny, torch.float32))
    factor = b.op("Unsqueeze", b.op("Div", scales, row), b.ints([2]))
    codes = data if per_byte == 1 else _unpacked(b, data, bits)
    codes = b.op("Reshape", codes, b.ints([int(n), int(blocks), layout.block]))
    values = b.op("Sub", b.cast(codes, torch.float32), b.scalar(float(middle), torch.float32))
    values = b.cast(b.op("Round", b.op("Mul", values, factor)), torch.int8)
    values = b.op("Reshape", values, b.ints([int(n), int(blocks) * layout.block]))
    if int(blocks) * layout.block != k:
        values = b.op("Slice", values, b.ints([0]), b.ints([k]), b.ints([1]))
    columns = b.op("Transpose", values, perm=[1, 0])
    scale = b.op("Reshape", row, b.ints([int(n)]))
    return Value(columns.name, torch.int8, (k, n)), Value(scale.name, torch.float32, (n,))


def _unpacked(b: Builder, data: Value, bits: int) -> Value:
    """u8 [N, blocks, bytes] -> [N, blocks, bytes, codes per byte], the low bits first."""
    mask: Any = b.const((1 << bits) - 1, torch.uint8)
    parts = []
    for shift in range(0, 8, bits):
        one = b.op("BitShift", data, b.const(shift, torch.uint8), direction="RIGHT") if shift else data
        one = b.op("BitwiseAnd", one, mask) if shift + bits < 8 else one
        parts.append(b.op("Unsqueeze", one, b.ints([3])))
    return b.op("Concat", *parts, axis=3)
