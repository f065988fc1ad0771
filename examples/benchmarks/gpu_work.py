"""What each case of `gpu_cases.py` runs: a kernel on random data, its reference in f32, its peers.

A function gives calls of the kernel on as many copies of what it reads as pass the L2 cache twice, the result of the
reference, the least bytes and the arithmetic of a call, and calls of the peers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmarks import gpu_peers
from examples.benchmarks.gpu_peers import CUBLAS, GROUPED_MM, INT_MM, SCALED_MM, SDPA, Calls, copies
from qfx.backends.triton import act_quantize as _act  # noqa: F401  (each registers its ops)
from qfx.backends.triton import cache_append as _append  # noqa: F401
from qfx.backends.triton import cache_attention as _cache  # noqa: F401
from qfx.backends.triton import float_attention as _floats  # noqa: F401
from qfx.backends.triton import gemm8, hadamard, lowering, timing, tune_works, tuning
from qfx.backends.triton import norm_quantize as _norm  # noqa: F401
from qfx.backends.triton import quantized_attention as _attention  # noqa: F401
from qfx.backends.triton.gemm8_config import KERNEL, Problem
from qfx.backends.triton.launch import Config
from qfx.capture import capture_export
from qfx.format import Format
from qfx.kv.formats import CacheFormat, cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantEmbedding, QuantLinear
from qfx.live.segments import segments, take
from qfx.numerics import dequantize, quantize, run_time_qparams
from qfx.packing import pack_weight

own, reference = torch.ops.qfx_triton, torch.ops.qfx


def _listed(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


@dataclass
class Made:
    """calls: of the kernel, on copies. expected: of the first. bytes, products: the least of one call.

    shown: what a call gives, in the form of `expected`.
    """

    kernel: str
    calls: Calls
    expected: Callable[[], list[Tensor]]
    bytes: int
    products: int = 0
    peers: dict[str, Callable[[], Calls]] = field(default_factory=dict)
    shown: Callable[[Any], list[Tensor]] = _listed

    def error(self) -> float:
        """The greatest relative error of what the first call gives into poisoned memory."""
        with timing.poisoned():
            found = self.shown(self.calls[0]())
        return max(timing.relative_error(a, b) for a, b in zip(found, self.expected(), strict=True))


def _lowered(module: nn.Module, x: Tensor, count: int) -> tuple[Calls, str]:
    """A module lowered so many times, each with weights of its own, and what its kernel is called."""
    gm = capture_export(module, (x,), dynamic=False).gm
    made = [lowering.lower(gm, mode="eager") for _ in range(count)]
    names = [name for name in made[0].kernels.values() if "(Triton)" in name]
    if not names:
        raise ValueError(f"no kernel of Triton: {'; '.join(note.reason for note in made[0].notes)}")
    return [partial(run, x) for run in made], names[-1]


def linear(n: int, k: int, rows: int, x_format: str, w_format: str, dtype: torch.dtype, where: torch.device) -> Made:
    """A linear layer as a compiled model runs it: rows are quantized, then multiplied."""
    work = tune_works.random_work(n, k, x_format, w_format, where, dtype)
    x = torch.randn(rows, k, device=where).to(dtype)
    calls, kernel = _lowered(work.module, x, copies(work.read, where))
    peers = _peers_of_linear(n, k, rows, x_format, where)
    if not x_format and w_format in ("u4/g128/f16", "i8/ch") and importlib.util.find_spec("torchao") is not None:
        peers["torchao"] = partial(gpu_peers.torchao, n, k, rows, w_format, where)
    moved = work.read + x.nbytes + rows * n * dtype.itemsize
    return Made(kernel, calls, lambda: [work.module(x.float())], moved, 2 * rows * n * k, peers)


def mixed(
    n: int, k: int, rows: int, x_format: str, w_formats: Sequence[str], dtype: torch.dtype, where: torch.device
) -> Made:
    """A linear layer whose weight has rows of several formats, in equal parts."""
    formats = tuple(map(Format.parse, w_formats))
    parts = segments(formats, (n, k), "weight")
    weight = torch.randn(n, k, device=where) / k**0.5
    packed = [pack_weight(take(weight, part, 0), part.format) for part in parts]
    module = QuantMixed(packed, parts, 0, None, x_format=x_format, dtype=dtype).eval()
    x, read = torch.randn(rows, k, device=where).to(dtype), sum(b.nbytes for b in module.buffers())
    calls, kernel = _lowered(module, x, copies(read, where))
    moved = read + x.nbytes + rows * n * dtype.itemsize
    peers = _peers_of_linear(n, k, rows, "", where)
    return Made(kernel, calls, lambda: [module(x.float())], moved, 2 * rows * n * k, peers)


def experts(
    sizes: tuple[int, int, int], rows: int, x_format: str, w_format: str, dtype: torch.dtype, where: torch.device
) -> Made:
    """Matrices [E, n, k] of sizes (E, n, k), in floats where w_format is "", times rows that go to them evenly."""
    count, n, k = sizes
    x, weight = torch.randn(rows, k, device=where).to(dtype), torch.randn(sizes, device=where) / k**0.5
    busy = min(count, rows)  # experts that have rows
    offs = (torch.arange(1, count + 1, device=where) * rows // count).to(torch.int32)
    if w_format:
        module = tune_works.Experts(pack_weight(weight, Format.parse(w_format)), x_format).eval()
        read = sum(b.nbytes for b in module.buffers()) * busy // count
        calls, kernel = _lowered(module, x, copies(read, where))
        moved, expected = read, lambda: [module(x.float())]
    else:
        floats = weight.to(dtype)
        moved, kernel, expected = floats.nbytes * busy // count, "grouped_floats", lambda: [_grouped(x, floats, offs)]
        calls = [partial(own.grouped_floats, x, floats.clone(), offs) for _ in range(copies(moved, where))]
    moved += x.nbytes + rows * n * dtype.itemsize
    peers: dict[str, Callable[[], Calls]] = {GROUPED_MM: partial(gpu_peers.grouped_mm, sizes, rows, where)}
    return Made(kernel, calls, expected, moved, 2 * rows * n * k, peers)


def _grouped(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    y: Tensor = reference.grouped_linear(x.float(), w.float(), offs)
    return y


def product(
    n: int, k: int, rows: int, x_format: str, w_format: str, where: torch.device, config: Config | None = None
) -> Made:
    """Codes times codes alone, of rows that are quantized already; config: with descriptors, as if tuned."""
    work = tune_works.random_work(n, k, x_format, w_format, where, torch.bfloat16)
    layer = work.module
    assert isinstance(layer, QuantLinear)
    x = torch.randn(rows, k, device=where).to(torch.bfloat16)
    codes, scale, zero = own.quantize_dynamic(x, None, x_format)
    packed = (layer.w_codes, layer.w_scale, layer.w_zero, w_format, k)
    weights = [gemm8.pack_gemm8(*packed) for _ in range(copies(work.read, where))]
    rest = (None, None, x_format, w_format, "", "bf16")
    calls: Calls = [partial(own.gemm8, codes, scale, zero, w, *rest) for w in weights]
    if config is not None:
        problem = Problem(n, weights[0][0].shape[1], codes.dtype != torch.int8)
        choice = (KERNEL, str(problem), str(tuning.bucket(rows)))
        calls = [partial(_tried, choice, config, call) for call in calls]
    peers = _peers_of_linear(n, k, rows, x_format, where)
    moved = work.read + codes.nbytes + rows * n * 2
    kernel = "gemm8" if config is None else "gemm8_described"
    return Made(kernel, calls, lambda: [layer(x.float())], moved, 2 * rows * n * k, peers)


def _tried(choice: tuning.Choice, config: Config, call: timing.Call) -> object:
    with tuning.trying(choice, config):
        return call()


def _peers_of_linear(n: int, k: int, rows: int, x_format: str, where: torch.device) -> dict[str, Callable[[], Calls]]:
    found: dict[str, Callable[[], Calls]] = {CUBLAS: partial(gpu_peers.cublas, n, k, rows, where)}
    if x_format.startswith("i8") and rows > 16:
        found[INT_MM] = partial(gpu_peers.int_mm, n, k, rows, where)
    if x_format.startswith("f8") and rows > 16:
        found[SCALED_MM] = partial(gpu_peers.scaled_mm, n, k, rows, where)
    return found


def _values(made: Sequence[Tensor], fmt: Format, k: int) -> list[Tensor]:
    """The rows that codes [M, k or more] and scales stand for; then the rest of what an op gave, but zero points."""
    codes, scale, _, *rest = made
    return [dequantize(codes[..., :k], fmt, scale, None), *rest]


def _rounded(y: Tensor, fmt: Format) -> Tensor:
    scale = run_time_qparams(y, fmt).scale
    return dequantize(quantize(y, fmt, scale), fmt, scale, None)


def norm(rows: int, k: int, text: str, dtype: torch.dtype, where: torch.device) -> Made:
    """x + residual, RMSNorm, codes of the rows; the sum stays."""
    fmt, weight = Format.parse(text), torch.rand(k, device=where).to(dtype)
    count = copies(4 * rows * k, where)
    pairs = [[torch.randn(rows, k, device=where).to(dtype) for _ in range(2)] for _ in range(count)]
    rest = (weight, None, 1e-6, False, None, None, None, text, False, True)

    def expected() -> list[Tensor]:
        total = (pairs[0][0] + pairs[0][1]).float()
        mean = total.square().mean(-1, keepdim=True)
        y = (total * torch.rsqrt(mean + 1e-6) * weight.float()).to(dtype)
        return [_rounded(y.float(), fmt), total]

    calls: Calls = [partial(own.norm_quantize, *pair, *rest) for pair in pairs]
    moved = rows * k * (3 * dtype.itemsize + 1) + 4 * rows
    return Made("norm_quantize", calls, expected, moved, shown=partial(_values, fmt=fmt, k=k))


def activation(rows: int, k: int, text: str, dtype: torch.dtype, where: torch.device) -> Made:
    """silu(x) * up, codes of the rows; both are halves of one tensor."""
    fmt, count = Format.parse(text), copies(4 * rows * k, where)
    inputs = [torch.randn(rows, 2 * k, device=where).to(dtype) for _ in range(count)]

    def expected() -> list[Tensor]:
        x = inputs[0]
        return [_rounded((nn.functional.silu(x[:, :k]) * x[:, k:]).float(), fmt)]

    calls: Calls = [
        partial(own.act_quantize, x[:, :k], x[:, k:], "silu", None, None, None, text, False) for x in inputs
    ]
    moved = rows * k * (2 * dtype.itemsize + 1) + 4 * rows
    return Made("act_quantize", calls, expected, moved, shown=partial(_values, fmt=fmt, k=k))


def alone(rows: int, k: int, text: str, dtype: torch.dtype, where: torch.device) -> Made:
    """Codes of rows."""
    fmt, count = Format.parse(text), copies(2 * rows * k, where)
    inputs = [torch.randn(rows, k, device=where).to(dtype) for _ in range(count)]
    calls: Calls = [partial(own.quantize_dynamic, x, None, text) for x in inputs]
    moved = rows * k * (dtype.itemsize + 1) + 4 * rows
    return Made("quantize_dynamic", calls, lambda: [_rounded(inputs[0].float(), fmt)], moved,
                shown=partial(_values, fmt=fmt, k=k))  # fmt: skip


def rotation(rows: int, k: int, size: int, dtype: torch.dtype, where: torch.device) -> Made:
    """Blocks of channels rotated."""
    inputs = [torch.randn(rows, k, device=where).to(dtype) for _ in range(copies(2 * rows * k, where))]
    packed = hadamard.pack_hadamard(size, 1, device=where)
    calls: Calls = [partial(own.hadamard, x, packed, size, False) for x in inputs]
    moved = 2 * rows * k * dtype.itemsize
    return Made("hadamard", calls, lambda: [reference.hadamard(inputs[0].float(), size, 1, False)], moved)


def embedding(table: int, k: int, rows: int, w_format: str, dtype: torch.dtype, where: torch.device) -> Made:
    """Rows of a packed table."""
    packed = pack_weight(torch.randn(table, k, device=where), Format.parse(w_format))
    module = QuantEmbedding(packed, None, dtype=dtype).eval()
    read = rows * Format.parse(w_format).row_bytes(k)
    several = [torch.randint(0, table, (rows,), device=where) for _ in range(copies(read, where))]
    (run,), kernel = _lowered(module, several[0], 1)
    calls: Calls = [partial(run.func, ids) for ids in several]  # type: ignore[attr-defined]
    return Made(kernel, calls, lambda: [module(several[0])], read + rows * dtype.itemsize * k)


def decode(
    batch: int, tokens: int, kv: Any, heads: tuple[int, int], width: int, dtype: torch.dtype, where: torch.device
) -> Made:
    """One query of each sequence over a cache of few bits."""
    fmt = cache_formats(kv, 1)[0]
    k, v = (torch.randn(batch, heads[1], tokens, width, device=where).to(dtype) for _ in range(2))
    like, one = k[:, :, :0], torch.tensor(tokens, device=where)
    memory, spec = allocate(fmt, like, like, tokens + 1), spec_of(fmt, like, like, tokens + 1)
    own.cache_append(memory, k, v, torch.zeros_like(one), spec)
    own.cache_append(memory, k[:, :, :1], v[:, :, :1], one, spec)  # what came before is rounded now
    q, read = torch.randn(batch, heads[0], 1, width, device=where).to(dtype), sum(t.nbytes for t in memory)
    memories = [memory, *([t.clone() for t in memory] for _ in range(copies(read, where) - 1))]
    rest = (one + 1, None, width**-0.5, False, spec)
    wide = [t.float() if t.dtype == dtype else t for t in memory]
    peer = partial(gpu_peers.sdpa, batch, heads, 1, tokens + 1, width, torch.bfloat16, False, where)
    return Made(
        f"cache_attention {kv}", [partial(own.cache_attention, q, m, *rest) for m in memories],
        lambda: [reference.cache_attention(q.float(), wide, *rest)], held(memory, fmt, tokens + 1) + 2 * q.nbytes,
        4 * batch * heads[0] * tokens * width, {SDPA: peer, f"{SDPA} folded": partial(peer, form="folded")},
    )  # fmt: skip


def decode_floats(
    batch: int, tokens: int, filled: int, heads: tuple[int, int], width: int, dtype: torch.dtype, where: torch.device
) -> Made:
    """One query of each sequence over a float cache of fixed length, of which so many places are filled."""
    q = torch.randn(batch, heads[0], 1, width, device=where).to(dtype)
    read = 2 * batch * heads[1] * filled * width * dtype.itemsize
    pairs = [
        [torch.randn(batch, heads[1], tokens, width, device=where).to(dtype) for _ in range(2)]
        for _ in range(copies(read, where))
    ]
    mask = (torch.arange(tokens, device=where) < filled)[None, None, None]
    rest = (mask, own.mask_spans(mask), None, width**-0.5, False, 0.0)
    k, v = (x[:, :, :filled].float() for x in pairs[0])
    peer = partial(gpu_peers.sdpa_of_filled, batch, heads, tokens, filled, width, dtype, where)
    return Made(
        "float_attention", [partial(own.float_attention, q, *pair, *rest) for pair in pairs],
        lambda: [reference.attention(q.float(), k, v, None, None, width**-0.5, False, 0.0)], read + 2 * q.nbytes,
        4 * batch * heads[0] * filled * width, {SDPA: peer, f"{SDPA} folded": partial(peer, form="folded")},
    )  # fmt: skip


def held(memory: Sequence[Tensor], fmt: CacheFormat, tokens: int) -> int:
    """Bytes of a cache's memory that so many tokens take: it has room for more of both kinds, codes and floats."""
    stored, *floats = memory[:5]
    coded = int(stored)
    counts = (fmt.sinks, fmt.sinks, *[tokens - fmt.sinks - coded] * 2)
    found = sum(t.nbytes // max(t.shape[2], 1) * count for t, count in zip(floats, counts, strict=True))
    room = -(-tokens // fmt.step) * fmt.step
    return found + sum(t.nbytes * coded // room for t in memory[5:])


def append(tokens: int, kv: Any, where: torch.device) -> Made:
    """Tokens stored in few bits, as they are read again."""
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

    return Made(f"cache_append {kv}", [partial(stored, own)], partial(stored, reference), 0)


def prefill(
    tokens: int, heads: tuple[int, int], width: int, q_format: str, k_format: str, causal: bool, where: torch.device
) -> Made:
    """Attention of a prompt, queries and keys rounded, keys without their mean."""
    q = torch.randn(1, heads[0], tokens, width, device=where).half()
    count = copies(4 * heads[1] * tokens * width, where)  # as many as the peer has
    pairs = [[torch.randn(1, heads[1], tokens, width, device=where).half() for _ in range(2)] for _ in range(count)]
    k, v = pairs[0]
    rest = (None, None, *([] for _ in range(6)), width**-0.5, causal, 0.0, q_format, k_format, "", "")
    share = heads[0] // heads[1]

    def expected() -> list[Tensor]:  # head by head: the reference holds all weights of a head
        parts = []
        for h in range(heads[0]):
            g = h // share
            part = (x.float() for x in (q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1]))
            parts.append(reference.quantized_attention(*part, *rest).half())
        return [torch.cat(parts, 1)]

    products = 4 * heads[0] * tokens * tokens * width // (2 if causal else 1)
    peer = partial(gpu_peers.sdpa, 1, heads, tokens, tokens, width, torch.float16, causal, where)
    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    calls: Calls = [partial(own.quantized_attention, q, *pair, *rest) for pair in pairs]
    peers: dict[str, Callable[[], Calls]] = {f"{SDPA} f16": peer, f"{SDPA} f16 cuDNN": partial(peer, form="cuDNN")}
    return Made("quantized_attention", calls, expected, moved, products, peers)
