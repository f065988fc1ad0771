"""What the kernels of `gpu_kernels.py` are compared with: calls on copies of the weights, random data."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qfx.backends.triton import timing

Calls = list[timing.Call]
CUBLAS, SDPA = "cuBLAS bf16", "SDPA"
INT_MM, SCALED_MM, GROUPED_MM = "torch._int_mm", "torch._scaled_mm", "torch._grouped_mm"


def copies(read: int, where: torch.device) -> int:
    """So many of `read` bytes pass the L2 cache twice."""
    return timing.copies(read, timing.cache_bytes(where))


def cublas(n: int, k: int, rows: int, where: torch.device) -> Calls:
    """x [rows, k] times a weight [n, k] of bf16."""
    x = torch.randn(rows, k, device=where, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=where, dtype=torch.bfloat16) for _ in range(copies(2 * n * k, where))]
    return [partial(nn.functional.linear, x, w) for w in weights]


def int_mm(n: int, k: int, rows: int, where: torch.device) -> Calls:
    """Codes times codes, int32 results."""
    x = torch.randint(-127, 128, (rows, k), device=where, dtype=torch.int8)
    weights = [torch.randint(-127, 128, (n, k), device=where, dtype=torch.int8) for _ in range(copies(n * k, where))]
    return [partial(torch._int_mm, x, w.t()) for w in weights]


def scaled_mm(n: int, k: int, rows: int, where: torch.device) -> Calls:
    """e4m3 times e4m3 with scales of rows and of columns."""
    x = torch.randn(rows, k, device=where).to(torch.float8_e4m3fn)
    weights = [torch.randn(n, k, device=where).to(torch.float8_e4m3fn) for _ in range(copies(n * k, where))]
    scales: dict[str, Any] = {"scale_a": torch.ones(rows, 1, device=where), "scale_b": torch.ones(1, n, device=where)}
    return [partial(torch._scaled_mm, x, w.t(), **scales, out_dtype=torch.bfloat16) for w in weights]


def grouped_mm(sizes: tuple[int, int, int], rows: int, where: torch.device) -> Calls:
    """Rows in equal parts times matrices (E, n, k) of bf16: before capability 9.0 it waits for the host."""
    count, n, k = sizes
    x = torch.randn(rows, k, device=where, dtype=torch.bfloat16)
    offs = (torch.arange(1, count + 1, device=where) * rows // count).to(torch.int32)
    made = copies(2 * min(count, rows) * n * k, where)
    weights = [torch.randn(sizes, device=where, dtype=torch.bfloat16) for _ in range(made)]
    return [partial(torch._grouped_mm, x, w.mT, offs=offs) for w in weights]


def torchao(n: int, k: int, rows: int, w_format: str, where: torch.device) -> Calls:
    """torchao's weight-only layer of 8 or 4 bits."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    x = torch.randn(rows, k, device=where, dtype=torch.bfloat16)
    layers = [nn.Linear(k, n, bias=False, device=where, dtype=torch.bfloat16) for _ in range(copies(n * k // 2, where))]
    for layer in layers:
        quantize_(layer, Int8WeightOnlyConfig() if w_format == "i8/ch" else Int4WeightOnlyConfig(group_size=128))
    return [partial(layer, x) for layer in layers]


def sdpa(
    batch: int, heads: tuple[int, int], queries: int, tokens: int, width: int, dtype: torch.dtype, causal: bool,
    where: torch.device, form: str = "",
) -> Calls:  # fmt: skip
    """torch's attention over floats; heads: of queries, and of keys and values.

    form: "folded" for one query, whose heads that share keys become rows; "cuDNN" for that library's kernel.
    """
    read = 2 * batch * heads[1] * tokens * width * dtype.itemsize
    q = torch.randn(batch, heads[0], queries, width, device=where, dtype=dtype)
    pairs = [
        [torch.randn(batch, heads[1], tokens, width, device=where, dtype=dtype) for _ in range(2)]
        for _ in range(copies(read, where))
    ]
    run: Any = nn.functional.scaled_dot_product_attention
    if form == "folded":
        assert queries == 1, "rows of other queries see other tokens"
        rows = q.reshape(batch, heads[1], heads[0] // heads[1], width)
        return [partial(run, rows, *pair) for pair in pairs]
    calls: Calls = [partial(run, q, *pair, is_causal=causal, enable_gqa=True) for pair in pairs]
    return [partial(_by_cudnn, call) for call in calls] if form == "cuDNN" else calls


def sdpa_of_filled(
    batch: int, heads: tuple[int, int], tokens: int, filled: int, width: int, dtype: torch.dtype, where: torch.device,
    form: str = "",
) -> Calls:  # fmt: skip
    """torch's attention of one query over a float cache of fixed length, which a mask says is filled so far.

    Keys and values are repeated for the heads that share them, as models do; form: "folded", those heads as rows.
    """
    read = 2 * batch * heads[1] * filled * width * dtype.itemsize
    q = torch.randn(batch, heads[0], 1, width, device=where, dtype=dtype)
    pairs = [
        [torch.randn(batch, heads[1], tokens, width, device=where, dtype=dtype) for _ in range(2)]
        for _ in range(copies(read, where))
    ]
    mask = (torch.arange(tokens, device=where) < filled)[None, None, None]
    run: Any = nn.functional.scaled_dot_product_attention
    if form == "folded":
        rows = q.reshape(batch, heads[1], heads[0] // heads[1], width)
        return [partial(run, rows, *pair, mask) for pair in pairs]

    def repeated(k: Tensor, v: Tensor) -> object:
        share = heads[0] // heads[1]
        k, v = (x if share == 1 else x.repeat_interleave(share, 1) for x in (k, v))
        return run(q, k, v, mask)

    return [partial(repeated, *pair) for pair in pairs]


def _by_cudnn(call: timing.Call) -> object:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return call()
