"""What `gpu_kernels.py` checks and times: each kernel on random data, its reference in f32, its peers.

A case is made when its turn comes: `make` gives calls of the kernel on as many copies of what it reads as pass the L2
cache twice, the result of the reference, the least bytes and the arithmetic of a call, and calls of the peers.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qfx.backends.triton import act_quantize, hadamard, lowering, norm_quantize, timing, tune
from qfx.backends.triton import cache_append as _append  # noqa: F401  (each registers its op)
from qfx.backends.triton import cache_attention as _cache  # noqa: F401
from qfx.backends.triton import quantized_attention as _attention  # noqa: F401
from qfx.capture import capture_export
from qfx.format import Format
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from qfx.modules import QuantEmbedding
from qfx.numerics import dequantize, quantize, run_time_qparams
from qfx.packing import pack_weight

Calls = list[timing.Call]
qfx_triton, reference = torch.ops.qfx_triton, torch.ops.qfx
CUBLAS, SDPA = "cuBLAS bf16", "SDPA"


@dataclass
class Made:
    """calls: of the kernel, on copies. expected: of the first. bytes, products: the least of one call."""

    calls: Calls
    expected: Callable[[], list[Tensor]]
    bytes: int
    products: int = 0
    peers: dict[str, Callable[[], Calls]] = field(default_factory=dict)
    kernel: str = ""


@dataclass(frozen=True)
class Case:
    """unit: what the arithmetic runs in ("bf16", "8 bit"), "" where bytes alone count. timed: else it is only checked.

    facts: sizes, for goals and peers. tolerance: of the relative error (Frobenius).
    """

    family: str
    title: str
    rows: int
    make: Callable[[torch.device], Made]
    unit: str = ""
    timed: bool = True
    tolerance: float = 1e-2
    facts: tuple[Any, ...] = ()


def _copies(read: int, where: torch.device) -> int:
    return timing.copies(read, timing.cache_bytes(where))


def _nbytes(*tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def _lowered(module: nn.Module, x: Tensor, count: int) -> tuple[Calls, str]:
    """A module lowered so many times, each with weights of its own, and what its kernels are called."""
    gm = capture_export(module, (x,), dynamic=False).gm
    made = [lowering.lower(gm, mode="eager") for _ in range(count)]
    names = [name for name in made[0].kernels.values() if "(Triton)" in name]
    if not names:
        raise ValueError(f"no kernel of Triton: {'; '.join(note.reason for note in made[0].notes)}")
    return [lambda run=run: run(x) for run in made], names[-1]  # type: ignore[misc]


def linear(n: int, k: int, rows: int, x_format: str, w_format: str, dtype: torch.dtype, where: torch.device) -> Made:
    """A linear layer as a compiled model runs it: rows are quantized, then multiplied."""
    work = tune.random_work(n, k, x_format, w_format, where, dtype)
    x = torch.randn(rows, k, device=where).to(dtype)
    calls, kernel = _lowered(work.module, x, _copies(work.read, where))
    peers: dict[str, Callable[[], Calls]] = {CUBLAS: lambda: _cublas(n, k, rows, where)}
    if x_format.startswith("i8") and rows > 16:
        peers["torch._int_mm"] = lambda: _int_mm(n, k, rows, where)
    if x_format.startswith("f8"):
        peers["torch._scaled_mm"] = lambda: _scaled_mm(n, k, rows, where)
    if not x_format and w_format in ("u4/g128", "i8/ch") and importlib.util.find_spec("torchao") is not None:
        peers["torchao"] = lambda: _torchao(n, k, rows, w_format, where)
    moved = work.read + x.nbytes + rows * n * dtype.itemsize
    return Made(calls, lambda: [work.module(x.float())], moved, 2 * rows * n * k, peers, kernel)


def product(n: int, k: int, rows: int, x_format: str, w_format: str, where: torch.device) -> Made:
    """Codes times codes alone, of rows that are quantized already."""
    from qfx.backends.triton.gemm8 import pack_gemm8

    work = tune.random_work(n, k, x_format, w_format, where, torch.bfloat16)
    layer: Any = work.module
    x = torch.randn(rows, k, device=where).to(torch.bfloat16)
    codes, scale, zero = qfx_triton.quantize_dynamic(x, None, x_format)
    weights = [
        pack_gemm8(layer.w_codes, layer.w_scale, layer.w_zero, w_format, k) for _ in range(_copies(work.read, where))
    ]
    calls: Calls = [
        lambda w=w: [qfx_triton.gemm8(codes, scale, zero, w, None, None, x_format, w_format, "", "bf16")]  # type: ignore[misc]
        for w in weights
    ]
    peer = ("torch._int_mm", _int_mm) if x_format.startswith("i8") else ("torch._scaled_mm", _scaled_mm)
    peers: dict[str, Callable[[], Calls]] = {CUBLAS: lambda: _cublas(n, k, rows, where)}
    if rows > 16:
        peers[peer[0]] = lambda: peer[1](n, k, rows, where)
    moved = work.read + codes.nbytes + rows * n * 2
    return Made(calls, lambda: [layer(x.float())], moved, 2 * rows * n * k, peers, f"gemm8 {x_format} x {w_format}")


def _cublas(n: int, k: int, rows: int, where: torch.device) -> Calls:
    x = torch.randn(rows, k, device=where, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=where, dtype=torch.bfloat16) for _ in range(_copies(2 * n * k, where))]
    return [lambda w=w: nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def _int_mm(n: int, k: int, rows: int, where: torch.device) -> Calls:
    x = torch.randint(-127, 128, (rows, k), device=where, dtype=torch.int8)
    count = _copies(n * k, where)
    weights = [torch.randint(-127, 128, (n, k), device=where, dtype=torch.int8) for _ in range(count)]
    return [lambda w=w: torch._int_mm(x, w.t()) for w in weights]  # type: ignore[misc]


def _scaled_mm(n: int, k: int, rows: int, where: torch.device) -> Calls:
    x = torch.randn(rows, k, device=where).to(torch.float8_e4m3fn)
    weights = [torch.randn(n, k, device=where).to(torch.float8_e4m3fn) for _ in range(_copies(n * k, where))]
    a, b = torch.ones(rows, 1, device=where), torch.ones(1, n, device=where)
    return [
        lambda w=w: torch._scaled_mm(x, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16)  # type: ignore[misc]
        for w in weights
    ]


def _torchao(n: int, k: int, rows: int, w_format: str, where: torch.device) -> Calls:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    x = torch.randn(rows, k, device=where, dtype=torch.bfloat16)
    layers = [nn.Linear(k, n, bias=False, device=where, dtype=torch.bfloat16) for _ in range(_copies(n * k, where))]
    for layer in layers:
        quantize_(layer, Int8WeightOnlyConfig() if w_format == "i8/ch" else Int4WeightOnlyConfig(group_size=128))
    return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]


def _values(made: Sequence[Tensor], fmt: Format, k: int) -> Tensor:
    """Codes of rows as floats."""
    codes, scale, *zero = made
    return dequantize(codes[..., :k], fmt, scale, zero[0] if fmt.has_zero else None)


def _rounded(y: Tensor, fmt: Format) -> Tensor:
    found = run_time_qparams(y, fmt)
    return dequantize(quantize(y, fmt, found.scale, found.zero), fmt, found.scale, found.zero)


def norm(rows: int, k: int, text: str, where: torch.device) -> Made:
    """x + residual, RMSNorm, codes of the rows."""
    fmt, weight = Format.parse(text), torch.rand(k, device=where).to(torch.bfloat16)
    count = _copies(4 * rows * k, where)
    pairs = [tuple(torch.randn(rows, k, device=where).to(torch.bfloat16) for _ in range(2)) for _ in range(count)]

    def run(x: Tensor, more: Tensor) -> list[Tensor]:
        return list(
            norm_quantize.norm_quantize(x, more, weight, None, 1e-6, False, None, None, None, text, False, True)
        )

    def expected() -> list[Tensor]:
        total = (pairs[0][0] + pairs[0][1]).float()
        mean = total.square().mean(-1, keepdim=True)
        y = (total * torch.rsqrt(mean + 1e-6)).to(torch.bfloat16) * weight
        return [_rounded(y.float(), fmt), total]

    calls: Calls = [lambda p=p: _as_values(run(*p), fmt, k) for p in pairs[:1]]  # type: ignore[misc]
    moved = rows * k * (3 * 2 + 1) + 4 * rows
    return Made([*calls, *(lambda p=p: run(*p) for p in pairs)], expected, moved, kernel="norm_quantize")  # type: ignore[misc]


def _as_values(made: list[Tensor], fmt: Format, k: int) -> list[Tensor]:
    first = 3 if fmt.has_zero else 2
    return [_values(made[:first], fmt, k), *made[first:]]


def activation(rows: int, k: int, text: str, where: torch.device) -> Made:
    """silu(x) * up, codes of the rows; both are halves of one tensor."""
    fmt, count = Format.parse(text), _copies(4 * rows * k, where)
    inputs = [torch.randn(rows, 2 * k, device=where).to(torch.bfloat16) for _ in range(count)]

    def run(x: Tensor) -> list[Tensor]:
        return list(act_quantize.act_quantize(x[:, :k], x[:, k:], "silu", None, None, None, text, False))

    def expected() -> list[Tensor]:
        x = inputs[0]
        return [_rounded((nn.functional.silu(x[:, :k]) * x[:, k:]).float(), fmt)]

    return Made(
        [lambda: _as_values(run(inputs[0]), fmt, k), *(lambda x=x: run(x) for x in inputs)],  # type: ignore[misc]
        expected, rows * k * 5 + 4 * rows, kernel="act_quantize",
    )  # fmt: skip


def alone(rows: int, k: int, text: str, where: torch.device) -> Made:
    """Codes of rows."""
    fmt, count = Format.parse(text), _copies(2 * rows * k, where)
    inputs = [torch.randn(rows, k, device=where).to(torch.bfloat16) for _ in range(count)]

    def run(x: Tensor) -> list[Tensor]:
        return [t for t in qfx_triton.quantize_dynamic(x, None, text) if t is not None]

    return Made(
        [lambda: [_values(run(inputs[0]), fmt, k)], *(lambda x=x: run(x) for x in inputs)],  # type: ignore[misc]
        lambda: [_rounded(inputs[0].float(), fmt)], rows * k * 3 + 4 * rows, kernel="quantize_dynamic",
    )  # fmt: skip


def rotation(rows: int, k: int, size: int, where: torch.device) -> Made:
    """Blocks of channels rotated."""
    inputs = [torch.randn(rows, k, device=where).to(torch.bfloat16) for _ in range(_copies(2 * rows * k, where))]
    packed = hadamard.pack_hadamard(size, 1, device=where)
    calls: Calls = [lambda x=x: [qfx_triton.hadamard(x, packed, size, False)] for x in inputs]  # type: ignore[misc]
    return Made(
        calls, lambda: [reference.hadamard(inputs[0].float(), size, 1, False)], rows * k * 4, kernel="hadamard"
    )


def embedding(table: int, k: int, rows: int, w_format: str, where: torch.device) -> Made:
    """Rows of a packed table."""
    packed = pack_weight(torch.randn(table, k, device=where), Format.parse(w_format))
    module = QuantEmbedding(packed, None, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, table, (rows,), device=where)
    calls, kernel = _lowered(module, ids, 1)
    moved = rows * (Format.parse(w_format).row_bytes(k) + 2 * k)
    return Made(calls, lambda: [module(ids)], moved, kernel=kernel)


def decode(batch: int, tokens: int, kv: Any, where: torch.device, heads: tuple[int, int] = (32, 8), width: int = 128,
           dtype: torch.dtype = torch.bfloat16) -> Made:  # fmt: skip
    """One query of each sequence over a cache of few bits."""
    fmt = cache_formats(kv, 1)[0]
    k, v = (torch.randn(batch, heads[1], tokens, width, device=where).to(dtype) for _ in range(2))
    memory, spec = allocate(fmt, k[:, :, :0], v[:, :, :0], tokens + 1), spec_of(fmt, k[:, :, :0], v[:, :, :0], tokens + 1)
    qfx_triton.cache_append(memory, k, v, torch.tensor(0, device=where), spec)
    one = torch.tensor(tokens, device=where)
    qfx_triton.cache_append(memory, k[:, :, :1], v[:, :, :1], one, spec)  # what came before is rounded now
    q = torch.randn(batch, heads[0], 1, width, device=where).to(dtype)
    length = one + 1
    read = _nbytes(*memory)
    memories = [memory, *([t.clone() for t in memory] for _ in range(_copies(read, where) - 1))]
    scale = width**-0.5
    calls: Calls = [
        lambda m=m: [qfx_triton.cache_attention(q, m, length, None, scale, False, spec)]  # type: ignore[misc]
        for m in memories
    ]
    wide = [t.float() if t.dtype == dtype else t for t in memory]
    products = 4 * batch * heads[0] * tokens * width
    return Made(
        calls, lambda: [reference.cache_attention(q.float(), wide, length, None, scale, False, spec)], read, products,
        {SDPA: lambda: _sdpa(batch, heads, 1, tokens + 1, width, torch.bfloat16, False, where)}, f"cache_attention {kv}",
    )  # fmt: skip


def append(tokens: int, kv: Any, where: torch.device) -> Made:
    """Tokens stored in few bits: what attention then reads."""
    fmt, length = cache_formats(kv, 1)[0], 2 * tokens + 1
    k, v = (torch.randn(1, 2, length, 64, device=where) for _ in range(2))
    like = k[:, :, :0]
    spec = spec_of(fmt, like, like, length)

    def stored(ops: Any) -> list[Tensor]:
        memory, at = allocate(fmt, like, like, length), 0
        for count in (tokens, 1, tokens):
            part = slice(at, at + count)
            ops.cache_append(memory, k[:, :, part], v[:, :, part], torch.tensor(at, device=where), spec)
            at += count
        return [t.float() for t in reference.cache_read(memory, torch.tensor(length, device=where), spec)]

    return Made([lambda: stored(qfx_triton)], lambda: stored(reference), 0, kernel=f"cache_append {kv}")


def prefill(tokens: int, formats: dict[str, str], where: torch.device, causal: bool, heads: tuple[int, int] = (32, 8),
            width: int = 128) -> Made:  # fmt: skip
    """Attention of a prompt, operands rounded."""
    q, k, v = (torch.randn(1, h, tokens, width, device=where, dtype=torch.float16) for h in (heads[0], *[heads[1]] * 2))
    texts = tuple(formats.get(role, "") for role in "qkvp")
    rest = (None, None, [], [], [], [], [], [], width**-0.5, causal, 0.0, *texts)
    share = heads[0] // heads[1]

    def expected() -> list[Tensor]:  # a head of keys at a time: the reference holds all weights
        parts = [
            reference.quantized_attention(
                q[:, g * share : (g + 1) * share].float(), k[:, g : g + 1].float(), v[:, g : g + 1].float(), *rest
            )
            for g in range(heads[1])
        ]
        return [torch.cat(parts, 1)]

    products = 4 * heads[0] * tokens * tokens * width // (2 if causal else 1)
    peers = {f"{SDPA} f16": lambda: _sdpa(1, heads, tokens, tokens, width, torch.float16, causal, where)}
    return Made([lambda: [qfx_triton.quantized_attention(q, k, v, *rest)]], expected, _nbytes(q, q, k, v), products,
                peers, "quantized_attention")  # fmt: skip


def _sdpa(
    batch: int, heads: tuple[int, int], queries: int, tokens: int, width: int, dtype: torch.dtype, causal: bool,
    where: torch.device,
) -> Calls:  # fmt: skip
    read = 2 * batch * heads[1] * tokens * width * dtype.itemsize
    q = torch.randn(batch, heads[0], queries, width, device=where, dtype=dtype)
    pairs = [
        [torch.randn(batch, heads[1], tokens, width, device=where, dtype=dtype) for _ in range(2)]
        for _ in range(_copies(read, where))
    ]
    run = nn.functional.scaled_dot_product_attention
    return [lambda p=p: run(q, *p, is_causal=causal, enable_gqa=True) for p in pairs]  # type: ignore[misc]


FLOATING = ("i8/ch", "u4/g128", "nf4/g64", "u3/g128", "u2/g64")
EIGHT = (("i8/tok", "i8/ch"), ("f8e4m3/tok", "f8e4m3/ch"))
CACHES = ("i8", "fp8", "i4")
TOKENS = {"q": "i8/tok", "k": "i8/tok"}


def _linears(n: int, k: int, rows: Sequence[int], formats: Sequence[tuple[str, str]], timed: bool,
             dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> list[Case]:  # fmt: skip
    found = []
    for (x, w), m, dtype in itertools.product(formats, rows, dtypes):
        family = "weight-only" if not x else "w4a8" if w.startswith("i4") else "w8a8" if x.startswith("i8") else "fp8"
        unit = "8 bit" if x else "bf16"

        def make(where: torch.device, given: Any = (n, k, m, x, w, dtype)) -> Made:
            return linear(*given, where)

        title = f"x={x or 'float'} w={w} {n}x{k} {str(dtype)[6:]}"
        tolerance = 1e-2 if dtype == torch.bfloat16 else 5e-3
        found.append(Case(family, title, m, make, unit, timed, tolerance, (x, w, n, k)))
    return found


def _others(sizes: dict[str, Any], timed: bool) -> list[Case]:
    """Every kernel that is no linear layer."""
    found = []
    for (rows, k), text in itertools.product(sizes["rows"], ("i8/tok", "f8e4m3/tok")):
        for what, make in (("norm", norm), ("act", activation), ("quantize", alone)):
            found.append(
                Case("norm", f"{what} + quantize {text} K={k}", rows, lambda d, a=(make, rows, k, text): a[0](*a[1:], d),
                     timed=timed, facts=(what, text, k))
            )  # fmt: skip
    for rows, k, size in sizes["rotation"]:
        found.append(Case("hadamard", f"blocks of {size}, K={k}", rows,
                          lambda d, a=(rows, k, size): rotation(*a, d), timed=timed))  # fmt: skip
    for w in ("i8/ch", "u4/g128"):
        found.append(Case("embedding", f"w={w} {sizes['table']}", sizes["ids"],
                          lambda d, a=(*sizes["table"], sizes["ids"], w): embedding(*a, d), timed=timed))  # fmt: skip
    for (batch, tokens), kv in itertools.product(sizes["caches"], CACHES):
        found.append(Case("decode", f"kv={kv} {tokens} tokens", batch,
                          lambda d, a=(batch, tokens, kv), more=sizes["heads"]: decode(*a, d, *more), timed=timed,
                          facts=(kv, tokens)))  # fmt: skip
    for tokens, causal in sizes["prompts"]:
        found.append(Case("prefill", f"q=i8/tok k=i8/tok{' causal' if causal else ''}", tokens,
                          lambda d, a=(tokens, TOKENS), c=causal, more=sizes["heads"][:2]: prefill(*a, d, c, *more),
                          "8 bit", timed, facts=(causal,)))  # fmt: skip
    if not timed:
        for kv in CACHES:
            found.append(Case("decode", f"append kv={kv}", 1, lambda d, kv=kv: append(40, kv, d), timed=False))
    return found


def checks(tiny: bool) -> list[Case]:
    """Odd shapes in every dtype that activations have; tiny ones for the interpreter."""
    both = [("", w) for w in FLOATING]
    more = [*both, *EIGHT, ("i8/tok", "i4/ch"), ("", "i4/g32/f16"), ("", "u4/g64/bf16"), ("i8", "u8/ch")][: None if tiny else 99]
    more = [pair for pair in more if pair != ("i8", "u8/ch")]
    if tiny:
        sizes: dict[str, Any] = {"rows": [(3, 72)], "rotation": [(3, 64, 32)], "table": (50, 72), "ids": 7,
                                 "caches": [(1, 70)], "heads": ((4, 2), 64, torch.float16), "prompts": [(40, True)]}  # fmt: skip
        return [*_linears(40, 264, (1, 20), more, False, (torch.float16,)), *_others(sizes, False)]
    sizes = {"rows": [(67, 1000)], "rotation": [(67, 4096, 4096), (67, 2560, 128)], "table": (1000, 520), "ids": 77,
             "caches": [(2, 777)], "heads": ((32, 8), 128, torch.bfloat16), "prompts": [(777, True), (777, False)]}  # fmt: skip
    dtypes = (torch.float16, torch.bfloat16)
    return [*_linears(264, 520, (1, 3, 17, 65, 300), more, False, dtypes), *_others(sizes, False)]


def measured() -> list[Case]:
    """What is timed."""
    large = (8192, 8192)
    found = [
        *_linears(*large, (1,), [("", w) for w in FLOATING], True),
        *_linears(28672, 8192, (1,), [("", w) for w in FLOATING], True),
        *_linears(*large, (4, 8, 16, 32, 64, 256, 2048, 4096), [("", "u4/g128")], True),
        *_linears(*large, (16, 4096), [("", "i8/ch")], True),
        *_linears(*large, (1, 16, 128, 4096), EIGHT, True),
        *_linears(*large, (1, 16, 4096), [("i8/tok", "i4/ch")], True),
    ]
    for (x, w), rows in itertools.product(EIGHT, (4096, 8192)):
        family = "w8a8" if x.startswith("i8") else "fp8"
        found.append(Case(family, f"product alone x={x} w={w} 8192x8192", rows,
                          lambda d, a=(*large, rows, x, w): product(*a, d), "8 bit",
                          facts=("product", w, *large)))  # fmt: skip
    sizes = {"rows": [(8192, 4096), (8192, 8192)], "rotation": [(8192, 4096, 4096), (8192, 4096, 128)],
             "table": (32000, 4096), "ids": 8192, "caches": [(1, 32768), (16, 8192)],
             "heads": ((32, 8), 128, torch.bfloat16), "prompts": [(8192, False), (8192, True), (32768, False)]}  # fmt: skip
    return [*found, *_others(sizes, True)]
