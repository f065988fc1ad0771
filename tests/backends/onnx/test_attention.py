"""Attention against torch: masks of every kind, rows without anything to see, shared key heads, sinks and soft caps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qfx.ops.floats  # registers qfx::rope and qfx::attention
from qfx.backends.onnx import lower
from tests.backends.onnx.checks import Case, check, floats, same, traced

assert qfx.ops.floats.rope is not None
sdpa = F.scaled_dot_product_attention


def qkv(n: int) -> list[Tensor]:
    return [floats(n, 4, 5, 8, seed=1), floats(n, 4, 7, 8, seed=2), floats(n, 4, 7, 6, seed=3)]


def shared(n: int) -> list[Tensor]:
    return [floats(n, 4, 5, 8, seed=1), floats(n, 2, 7, 8, seed=2), floats(n, 2, 7, 8, seed=3)]


def single(n: int) -> list[Tensor]:
    return [floats(n, 4, 5, 8, seed=1), floats(n, 1, 7, 8, seed=2), floats(n, 1, 7, 8, seed=3)]


def square(n: int) -> list[Tensor]:
    return [floats(n, 4, 6, 8, seed=i) for i in (1, 2, 3)]


def padding(k: Tensor) -> Tensor:
    """bool [B, 1, 1, S]: later rows of the batch see less, the last none at all."""
    length = torch.arange(k.shape[0]).flip(0) * 3
    return (torch.arange(k.shape[2]) < length[:, None])[:, None, None]


def some(q: Tensor, k: Tensor) -> Tensor:
    """bool [B, 1, L, S] with some rows that see nothing."""
    seen = (torch.arange(q.shape[2])[:, None] * 3 + torch.arange(k.shape[2])) % 4 < 2
    return (seen & (torch.arange(q.shape[2]) > 0)[:, None]).expand(q.shape[0], 1, -1, -1)


PER_HEAD, SINKS, SQUARE = floats(4, 1, 1, seed=4), floats(4, seed=5), floats(1, 1, 6, 6, seed=6)

CASES: list[Case] = [
    ("plain", sdpa, qkv),
    ("scale", lambda q, k, v: sdpa(q, k, v, scale=0.3), qkv),
    ("causal", lambda q, k, v: sdpa(q, k, v, is_causal=True), square),
    ("causal, more keys", lambda q, k, v: sdpa(q, k, v, is_causal=True), qkv),
    ("causal, one query", lambda q, k, v: sdpa(q[:, :, :1], k, v, is_causal=True), qkv),
    ("bool mask", lambda q, k, v: sdpa(q, k, v, some(q, k)), qkv),
    ("padding, a batch row sees nothing", lambda q, k, v: sdpa(q, k, v, padding(k)), qkv),
    ("float mask", lambda q, k, v: sdpa(q, k, v, torch.where(some(q, k), 0.5, -2.0)), qkv),
    ("-inf mask", lambda q, k, v: sdpa(q, k, v, torch.where(some(q, k), 0.0, -torch.inf)), qkv),
    (
        "finfo.min mask",
        lambda q, k, v: sdpa(q, k, v, torch.where(some(q, k), 0.0, torch.finfo(torch.float32).min)),
        qkv,
    ),
    ("mask per head", lambda q, k, v: sdpa(q, k, v, PER_HEAD.expand(4, q.shape[2], k.shape[2])), qkv),
    ("3 dimensions", lambda q, k, v: sdpa(q[0], k[0], v[0]), qkv),
    ("2 dimensions", lambda q, k, v: sdpa(q[0, 0], k[0, 0], v[0, 0]), qkv),
    ("5 dimensions", lambda q, k, v: sdpa(q[None], k[None], v[None]), qkv),
    ("grouped", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), shared),
    ("grouped, masked", lambda q, k, v: sdpa(q, k, v, some(q, k), enable_gqa=True), shared),
    ("grouped, causal", lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), shared),
    ("one key head", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), single),
    ("broadcast key head", lambda q, k, v: sdpa(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)), single),
    ("f64", lambda q, k, v: sdpa(q.double(), k.double(), v.double(), some(q, k)), qkv),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_sdpa_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)


def attention(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    how = {"mask": None, "sinks": None, "scale": 0.3, "causal": False, "softcap": 0.0, **how}
    y: Tensor = torch.ops.qfx.attention(q, k, v, *how.values())
    return y


OWN: list[Case] = [
    ("plain", attention, qkv),
    ("soft cap", lambda q, k, v: attention(q, k, v, softcap=0.7), qkv),
    ("soft cap, causal", lambda q, k, v: attention(q, k, v, softcap=0.7, causal=True), square),
    ("causal with a mask", lambda q, k, v: attention(q, k, v, causal=True, mask=some(q, k)), square),
    ("causal with a float mask", lambda q, k, v: attention(q, k, v, causal=True, mask=SQUARE), square),
    ("sinks", lambda q, k, v: attention(q, k, v, sinks=SINKS), qkv),
    ("sinks and rows that see nothing", lambda q, k, v: attention(q, k, v, sinks=SINKS, mask=some(q, k)), qkv),
    (
        "grouped with everything",
        lambda q, k, v: attention(q, k, v, sinks=SINKS, mask=some(q, k), softcap=2.0),
        shared,
    ),
    ("rope", lambda q, k, v: torch.ops.qfx.rope(q, k[:, :1, :5].cos(), k[:, :1, :5].sin(), False), qkv),
    ("rope interleaved", lambda q, k, v: torch.ops.qfx.rope(q, k[:, :1, :5].cos(), k[:, :1, :5].sin(), True), qkv),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in OWN], ids=[c[0] for c in OWN])
def test_own_attention_matches_the_reference(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)


@pytest.mark.parametrize("own", [True, False], ids=["attention", "sdpa"])
def test_grouped_heads_with_sizes_that_vary(own: bool) -> None:
    """Batch, both lengths and the number of heads may vary."""

    def make(batch: int, new: int, old: int, times: int = 1) -> list[Tensor]:
        sizes = ((batch, 4 * times, new, 8), (batch, 2 * times, old, 8), (batch, 2 * times, old, 6))
        return [floats(*size, seed=i) for i, size in enumerate(sizes)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, softcap=2.0) if own else sdpa(q, k, v, enable_gqa=True)

    lowered = lower(traced(function, make(2, 5, 7), make(3, 6, 9)), strict=True)
    for sizes in ((2, 5, 7), (1, 1, 33), (4, 8, 8)):
        same(lowered(*make(*sizes))[0], function(*make(*sizes)))
    heads = lower(traced(function, make(2, 5, 7), make(2, 5, 7, times=2)), strict=True)
    for times in (1, 3):
        same(heads(*make(2, 5, 7, times))[0], function(*make(2, 5, 7, times)))


def test_a_mask_is_prepared_once_for_all_layers() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = some(q, k)
        return sdpa(sdpa(q, k, v[..., :1].expand(-1, -1, -1, 8), mask), k, v, mask)

    lowered = check(layers, qkv)
    (model,) = lowered.models
    assert [n.op_type for n in model.model.graph.node].count("ReduceMax") == 1
