"""Calls of every op of the Triton backend, with inputs as odd as they come."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qfx.backends.triton
from qfx.backends.triton import gemm4, gemm8
from qfx.backends.triton.experts import pack_experts
from qfx.backends.triton.experts_gemm import pack_grouped
from qfx.backends.triton.float_attention import spans_of
from qfx.backends.triton.hadamard import pack_hadamard
from qfx.backends.triton.mixed_rows import pack_mixed
from qfx.backends.triton.weight_only_pack import pack_weight_only
from qfx.format import Format
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from qfx.packing import pack_weight
from tests.backends.triton.cases import DEVICE

for _path in Path(qfx.backends.triton.__file__).parent.glob("*.py"):  # registers the ops
    importlib.import_module(f"qfx.backends.triton.{_path.stem}".removesuffix(".__init__"))
OPS = torch.ops.qfx_triton
K = 40
_G = torch.Generator().manual_seed(0)


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=_G).to(DEVICE, dtype)


def merged(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A part of a wider tensor, as a linear of several merged ones gives it."""
    return floats(*shape[:-1], shape[-1] + 24, dtype=dtype)[..., 8 : 8 + shape[-1]]


def stored(n: int, text: str, k: int = K) -> tuple[Tensor, Tensor, Tensor | None]:
    packed = pack_weight(floats(n, k, dtype=torch.float32), Format.parse(text))
    return packed.data, packed.scale, packed.zero


def operand(text: str) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = OPS.quantize_dynamic(merged(2, 3, K), None, text)
    return found


def one(value: float = 0.02) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def zero(value: int = 99) -> Tensor:
    return torch.tensor(value, dtype=torch.uint8, device=DEVICE)


def mixed(*, whole: bool) -> list[Tensor]:
    segments = [(*stored(8, "i4/ch"), "i4/ch"), (*stored(8, "i8/ch"), "i8/ch")]
    return pack_mixed(segments, [(0, 0, 8), (1, 0, 8)], K, floats=not whole)


def cache(kv: Any, groups: int = 2) -> tuple[list[Tensor], str]:
    fmt = cache_formats(kv, 1)[0]
    like = floats(1, groups, 0, 32)
    return allocate(fmt, like, like, 64), spec_of(fmt, like, like, 64)


def heads(count: int, tokens: int = 3) -> Tensor:
    return floats(1, tokens, count, 32).transpose(1, 2)


def shown(tokens: int) -> Tensor:
    return (torch.arange(tokens, device=DEVICE) < 50)[None, None, None].expand(2, 1, 1, tokens)


def length(tokens: int = 0) -> Tensor:
    return torch.tensor(tokens, device=DEVICE)


def _cached(op: str, *first: Tensor, kv: Any = "i4") -> tuple[Any, ...]:
    memory, spec = cache(kv)
    return {
        "cache_append": (memory, *first, length(), spec),
        "cache_attention": (*first, memory, length(), None, 0.2, False, spec),
        "cache_read": (memory, length(), spec),
    }[op]


Call = tuple[str, Callable[[], tuple[Any, ...]]]


def _w8(text: str) -> list[Tensor]:
    return gemm8.pack_gemm8(*stored(24, text), text, K)


def _w4(text: str) -> list[Tensor]:
    return gemm4.pack_w4a8(*stored(24, text), text, K)


_ATTENTION: tuple[Any, ...] = ([], [], [], [], [], [], 0.2, True, 0.0)
CALLS: tuple[Call, ...] = (
    ("quantize_dynamic", lambda: (merged(2, 3, K, dtype=torch.float16), None, "i8/tok")),
    *(("quantize_dynamic", lambda t=t: (merged(2, 3, K), floats(K).abs() + 1, t))
      for t in ("i8/tok", "u8/tok", "i8/dyn", "u8/dyn", "f8e4m3/tok", "f8e4m3/g32/dyn")),
    ("quantize_static", lambda: (merged(2, 3, K), None, one(), zero(), "u8")),
    ("quantize_static", lambda: (merged(3, K), None, one(), None, "f8e4m3")),
    ("act_quantize", lambda: (merged(2, 3, K), merged(2, 3, K), "silu", None, None, None, "u8/tok", True)),
    ("act_quantize", lambda: (merged(3, K), None, "gelu", one(), None, None, "i8", False)),
    ("norm_quantize", lambda: (merged(2, 3, K), merged(2, 3, K), floats(K), None, 1e-5, False, None, None, None,
                               "i8/tok", True, True)),
    ("norm_quantize", lambda: (merged(3, K), None, floats(K), floats(K), 1e-5, True, one(), None, None, "i8", False,
                               True)),
    *(("gemm8", lambda x=x, w=w: (*operand(x), _w8(w), floats(24), merged(2, 3, 24), x, w, "silu", "f16"))
      for x, w in (("i8/tok", "i8/ch"), ("u8/tok", "u8/ch"), ("f8e4m3/tok", "f8e4m3/ch"))),
    *(("gemm4", lambda x=x, w=w: (*operand(x), _w4(w), floats(24), merged(2, 3, 24), x, w, K, "", "bf16"))
      for x, w in (("i8/tok", "i4/ch"), ("u8/tok", "u4/g32"))),
    *(("gemm8", lambda x=x, w=w: (*operand(x), _w8(w), floats(24), floats(2, 3, 24), x, w, "gelu", "bf16"))
      for x, w in (("u8/tok", "i8/ch"), ("f8e4m3/tok", "f8e4m3/ch"))),
    *(("gemm4", lambda x=x, w=w: (*operand(x), _w4(w), None, floats(2, 3, 24), x, w, K, "silu", "f32"))
      for x, w in (("u8/tok", "i4/ch"), ("i8/tok", "u4/g32"))),
    *(("gemm_mixed", lambda more=more: (*operand("i8/tok"), mixed(whole=True), None, more(2, 3, 16), "i8/tok",
                                        "i4/ch,i8/ch", K, "", "f16")) for more in (merged, floats)),
    ("linear_mixed", lambda: (merged(2, 3, K), mixed(whole=False), floats(16), None, None,
                              "i4/ch,i8/ch", "")),
    *(("linear_weight_only", lambda m=m, d=d: (merged(m, K, dtype=d), *_only("u4/g32"), 24))
      for m, d in ((1, torch.float16), (9, torch.float16), (65, torch.float32))),
    *(("grouped_weight_only", lambda t=t, d=d: (merged(t, K, dtype=d), *_experts("u4/g16"), 8))
      for t, d in ((2, torch.float16), (9, torch.float32))),
    *(("grouped_gemm", lambda x=x, w=w: (*OPS.quantize_dynamic(merged(5, K), None, x), *_grouped(w), x, w, K, "bf16"))
      for x, w in (("u8/tok", "u4/g32"), ("f8e4m3/tok", "f8e4m3/ch"))),
    ("grouped_floats", lambda: (merged(5, K), merged(3, 8, K), torch.tensor([1, 1, 2], device=DEVICE))),
    ("grouped_floats", lambda: (merged(50, K), merged(2, K, 8).mT, torch.tensor([1, 49], device=DEVICE))),
    ("grouped_floats", lambda: (merged(5, K), merged(2, 8, K), torch.tensor([1, 4], dtype=torch.int32, device=DEVICE))),
    *(("rounded_input", lambda t=t: (floats(2, 3, K, dtype=torch.float32), None, None, None, t))
      for t in ("f32", "f16", "f8e5m2/tok", "nf4/tok")),
    ("embedding", lambda: (torch.arange(6, device=DEVICE).view(2, 3).t(), *stored(9, "nf4/g16/dq"), "nf4/g16/dq", K,
                           torch.float16)),
    ("embedding", lambda: (torch.arange(6, device=DEVICE).view(2, 3), *stored(9, "u4/g16"), "u4/g16", K,
                           torch.float32)),
    ("hadamard", lambda: (merged(2, 3, 64).transpose(0, 1), pack_hadamard(64, 0, device=DEVICE), 64, False)),
    *(("hadamard_quantize", lambda t=t: (merged(2, 3, 64), pack_hadamard(64, 0, device=DEVICE), 64, False, t))
      for t in ("i8/tok", "u8/tok")),
    ("quantized_attention", lambda: (heads(4), heads(2), heads(2), None, None, *_ATTENTION, "i8/tok", "i8/tok", "",
                                     "")),
    ("quantized_attention", lambda: (heads(4), heads(2), heads(2), None, None, *_ATTENTION, "", "", "", "f8e4m3")),
    ("float_attention", lambda: (heads(4), heads(2, 70), heads(2, 70), shown(70)[:1], spans_of(shown(70)[:1]),
                                 floats(4), 0.2, False, 30.0)),
    ("mask_spans", lambda: (shown(70),)),
    ("cache_append", lambda: _cached("cache_append", heads(2), heads(2))),
    *(("cache_attention", lambda n=n: _cached("cache_attention", heads(4, n))) for n in (1, 3)),
    ("cache_read", lambda: _cached("cache_read")),
)  # fmt: skip


def _only(text: str) -> tuple[list[Tensor], Tensor, None, str]:
    tensors, now = pack_weight_only(*stored(24, text), text, K)
    return tensors, floats(24), None, now


def _experts(text: str) -> tuple[list[Tensor], Tensor, str]:
    packed = pack_weight(floats(3, 8, K, dtype=torch.float32), Format.parse(text))
    tensors, now = pack_experts(packed.data, packed.scale, packed.zero, text, K)
    return tensors, torch.tensor([1, 1, 2], dtype=torch.int32, device=DEVICE), now


def _grouped(text: str) -> tuple[list[Tensor], Tensor]:
    packed = pack_weight(floats(3, 8, K, dtype=torch.float32), Format.parse(text))
    tensors, _ = pack_grouped(packed.data, packed.scale, packed.zero, text, K)
    return tensors, torch.tensor([1, 1, 2], dtype=torch.int32, device=DEVICE)
