"""What `qfx tune` measures: layers of a model, or random ones of the sizes and formats that models usually have.

A `Work` is a module whose eager forward is the reference of the kernels that its lowered graph launches.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfx.backends.triton.float_attention import MOST
from qfx.backends.triton.tuning import LARGEST
from qfx.errors import explain
from qfx.format import Format
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import FEW, allocate, spec_of
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantConv, QuantLinear
from qfx.live.parameters import PackedSpec
from qfx.packing import Packed, pack_weight

SIZES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336), (8192, 8192))  # N, K of usual models
FORMATS = (("", "u4/g128/f16"), ("", "i8/ch"), ("i8/tok", "i8/ch"), ("f8e4m3/tok", "f8e4m3/ch"), ("i8/tok", "i4/ch"))
_SAME_INPUT = (re.compile(r"(q|k|v|query|key|value)(_proj|_lin)?"), re.compile(r"(gate|up)_proj|w[13]"))
CACHES, CACHED, TOKENS = ("i8", "fp8", "i4"), ((32, 8), (32, 32), (64, 8)), 8192
PRODUCED = {False: (4096, 8192), True: (11008, 14336, 28672)}
HEADS = 16
WIDTHS = (64, 128)
Layer = QuantLinear | QuantMixed
ATTENTION = (("i8/tok", "i8/tok", "", ""), ("f8e4m3/tok", "f8e4m3/tok", "", ""))


@dataclass(frozen=True)
class Work:
    """What is tuned. module: quantized, on its device. width: of the rows [M, width] that it takes, in `dtype`.

    most: rows that it takes. only: the kernels whose choices are measured, all of them where it is empty.
    """

    name: str
    module: nn.Module
    width: int
    dtype: torch.dtype = torch.float16
    most: int = LARGEST
    only: tuple[str, ...] = ()

    @property
    def where(self) -> torch.device:
        """The device of the weights."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers())).device

    @property
    def read(self) -> int:
        """Bytes of all that a call reads beside its rows."""
        return sum(t.nbytes for t in itertools.chain(self.module.parameters(), self.module.buffers()))


class Beside(nn.Module):
    """Linear layers that read the same input, as those of queries, keys and values do: y of each."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [M, K] -> [[M, N of a layer], ...]."""
        return [layer(x) for layer in self.layers]


class Attention(nn.Module):
    """Attention of a prompt with rounded operands, as many heads of keys as of queries; formats: of q, k, v and p."""

    def __init__(self, width: int, causal: bool, formats: Sequence[str], where: torch.device) -> None:
        super().__init__()
        self.width, self.causal, self.formats = width, causal, formats
        self.register_buffer("place", torch.zeros(1, device=where))

    def forward(self, x: Tensor) -> Tensor:
        """x [M, 3 * HEADS * width], queries, keys and values of M tokens -> [1, HEADS, M, width]."""
        q, k, v = (part.unflatten(-1, (HEADS, self.width)).transpose(0, 1)[None] for part in x.chunk(3, -1))
        steps: list[list[float]] = [[]] * 6
        y: Tensor = torch.ops.qfx.quantized_attention(
            q, k, v, None, None, *steps, self.width**-0.5, self.causal, 0.0, *self.formats
        )
        return y


class Cached(nn.Module):
    """Attention over a cache that holds codes of random tokens; heads: of queries, of keys and values."""

    def __init__(
        self, kv: str, heads: tuple[int, int], width: int, tokens: int, where: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        fmt, self.heads, self.width = cache_formats(kv, 1)[0], heads[0], width
        k, v = (torch.randn(1, heads[1], tokens, width, device=where).to(dtype) for _ in range(2))
        memory, self.spec = allocate(fmt, k[:, :, :0], v[:, :, :0], tokens), spec_of(fmt, k, v, tokens)
        torch.ops.qfx.cache_append(memory, k, v, torch.zeros((), dtype=torch.long, device=where), self.spec)
        for i, part in enumerate(memory):
            self.register_buffer(f"memory{i}", part)
        self.register_buffer("length", torch.full((), tokens, device=where))

    def forward(self, x: Tensor) -> Tensor:
        """x [M, heads * width], queries of the last M tokens -> [1, heads, M, width]."""
        q = x.unflatten(-1, (self.heads, self.width)).transpose(0, 1)[None]
        memory = [part for name, part in self.named_buffers() if name != "length"]
        y: Tensor = torch.ops.qfx.cache_attention(q, memory, self.length, None, self.width**-0.5, True, self.spec)
        return y


class CachedFloats(nn.Module):
    """Attention over a float cache of fixed length, filled; heads: of queries, of keys and values."""

    k: Tensor
    v: Tensor
    mask: Tensor

    def __init__(
        self, heads: tuple[int, int], width: int, tokens: int, where: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.heads, self.width = heads[0], width
        for name in ("k", "v"):
            self.register_buffer(name, torch.randn(1, heads[1], tokens, width, device=where).to(dtype))
        self.register_buffer("mask", torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=where))

    def forward(self, x: Tensor) -> Tensor:
        """x [M, heads * width], queries of M tokens -> [1, heads, M, width]."""
        q = x.unflatten(-1, (self.heads, self.width)).transpose(0, 1)[None]
        return nn.functional.scaled_dot_product_attention(q, self.k, self.v, self.mask, enable_gqa=True)


class Produced(nn.Module):
    """A linear layer that reads what a norm gives, or (act) what a gated activation function does."""

    def __init__(self, layer: nn.Module, width: int, where: torch.device, dtype: torch.dtype, *, act: bool) -> None:
        super().__init__()
        self.layer, self.act = layer, act
        self.norm = nn.RMSNorm(width, eps=1e-6, device=where, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K], or [M, 2 K] of which the first half goes through silu -> [M, N of the layer]."""
        if self.act:
            gate, up = x.chunk(2, -1)
            x = nn.functional.silu(gate) * up
        else:
            x = self.norm(x)
        y: Tensor = self.layer(x)
        return y


class Experts(nn.Module):
    """Packed matrices [E, N, K] of experts, times rows that go to them evenly."""

    numbers: Tensor

    def __init__(self, packed: Packed, x_format: str = "") -> None:
        super().__init__()
        self.x_format, self.w_format, self.count = x_format, str(packed.format), packed.shape[0]
        for name, tensor in (("codes", packed.data), ("scale", packed.scale), ("zero", packed.zero)):
            self.register_buffer(name, tensor)
        self.register_buffer("numbers", torch.arange(1, self.count + 1, device=packed.data.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]. Of fewer rows than experts each goes to another."""
        offs = (self.numbers * x.shape[0] // self.count).to(torch.int32)
        y: Tensor = torch.ops.qfx.grouped_linear_quant(
            x, self.codes, self.scale, self.zero, offs, self.x_format, self.w_format
        )
        return y


@dataclass(frozen=True)
class OfAttention(Work):
    """Attention. Its keys are read again and again, from the cache: no copies to pass that are wanted."""

    @property
    def read(self) -> int:
        """More than any cache holds."""
        return 1 << 40


@dataclass(frozen=True)
class OfExperts(Work):
    """Experts. Few rows read the matrices of few of them, those of eight at least: the others pass no cache."""

    @property
    def read(self) -> int:
        """Bytes of eight experts."""
        assert isinstance(self.module, Experts)
        return super().read * 8 // max(self.module.count, 8)


def works_of(model: nn.Module) -> list[Work]:
    """The distinct quantized linear layers of a model (of convolutions the linear over their windows), those of one
    parent that read the same rows, and experts.

    Raises ValueError for a model that has none.
    """
    found: dict[Any, Work] = {}
    for fqn, parent in model.named_modules():
        children = {n: _of_rows(m) for n, m in parent.named_children() if isinstance(m, Layer)}
        for name, layer in children.items():
            key = _kind(layer)
            found.setdefault(key, Work(f"{fqn}.{name}".lstrip("."), layer, layer.in_features, layer.dtype))
        for together in _together(children):
            layers = [children[n] for n in together]
            key = tuple(_kind(layer) for layer in layers)
            title = f"{fqn}.({'+'.join(together)})".lstrip(".")
            found.setdefault(key, Work(title, Beside(layers).eval(), layers[0].in_features, layers[0].dtype))
        for name, spec in _experts(parent):
            key = (*spec.shape, spec.format, spec.dtype)
            codes, scale, zero = (getattr(parent, f"{name}_w_{leaf}") for leaf in ("codes", "scale", "zero"))
            module = Experts(Packed(codes, scale, zero, Format.parse(spec.format), spec.shape)).eval()
            found.setdefault(key, OfExperts(f"{fqn}.{name}".lstrip("."), module, spec.shape[-1], spec.dtype))
    if not found:
        raise ValueError(
            explain(
                "there is nothing to tune: the model has no quantized layers",
                next_step="give --recipe, or the folder that `qfx quantize` wrote",
            )
        )
    return list(found.values())


def works_of_usual_models(where: torch.device, dtype: torch.dtype = torch.float16) -> Iterator[Work]:
    """Random layers of the sizes and formats that models usually have, made one after the other."""
    for (n, k), (x_format, w_format) in itertools.product(SIZES, FORMATS):
        yield random_work(n, k, x_format, w_format, where, dtype)
    for width, causal, formats in itertools.product(WIDTHS, (True, False), ATTENTION):
        yield attention_work(width, causal, formats, where, dtype)
    for kv, heads in itertools.product(CACHES, CACHED):
        yield cache_work(kv, heads, 128, TOKENS, where, dtype)
    for heads in CACHED:
        yield float_cache_work(heads, 128, TOKENS, where, dtype)
    for act, (x_format, w_format) in itertools.product((False, True), FORMATS[2:4]):
        for width in PRODUCED[act]:
            yield produced_work(width, x_format, w_format, where, dtype, act=act)


def cache_work(
    kv: str, heads: tuple[int, int], width: int, tokens: int, where: torch.device, dtype: torch.dtype = torch.float16
) -> Work:
    """Attention of few queries over a cache of so many tokens in few bits."""
    module = Cached(kv, heads, width, tokens, where, dtype).eval()
    return Work(f"cache {kv} {heads[0]}/{heads[1]} heads of {width}", module, heads[0] * width, dtype, most=FEW)


def float_cache_work(
    heads: tuple[int, int], width: int, tokens: int, where: torch.device, dtype: torch.dtype = torch.float16
) -> Work:
    """Attention of few queries over a float cache of so many tokens, with a mask."""
    module = CachedFloats(heads, width, tokens, where, dtype).eval()
    return Work(f"cache in float {heads[0]}/{heads[1]} heads of {width}", module, heads[0] * width, dtype, most=MOST)


def produced_work(
    k: int, x_format: str, w_format: str, where: torch.device, dtype: torch.dtype = torch.float16, *, act: bool
) -> Work:
    """The rows of codes that a norm, or a gated activation function, gives a linear layer."""
    layer = random_work(16, k, x_format, w_format, where, dtype).module
    module, kernel = Produced(layer, k, where, dtype, act=act).eval(), "act_quantize" if act else "norm_quantize"
    return Work(f"{kernel} {k} {x_format}", module, (1 + act) * k, dtype, only=(kernel,))


def attention_work(
    width: int, causal: bool, formats: Sequence[str], where: torch.device, dtype: torch.dtype = torch.float16
) -> Work:
    """Attention with heads of `width` channels; formats: of q, k, v and p."""
    named = " ".join(f"{role}={text}" for role, text in zip("qkvp", formats, strict=True) if text)
    title = f"attention {width} {'causal ' if causal else ''}{named}"
    module = Attention(width, causal, formats, where).eval()
    return OfAttention(title, module, 3 * HEADS * width, dtype)


def random_work(
    n: int, k: int, x_format: str, w_format: str, where: torch.device, dtype: torch.dtype = torch.float16
) -> Work:
    """A layer [n, k] of random weights."""
    weight = torch.randn(n, k, device=where, dtype=torch.float32) / k**0.5
    packed = pack_weight(weight, Format.parse(w_format))
    layer = QuantLinear(packed, None, x_format=x_format, dtype=dtype).eval()
    return Work(f"{n} x {k} x={x_format or 'float'} w={w_format}", layer, k, dtype)


def _experts(module: nn.Module) -> Iterator[tuple[str, PackedSpec]]:
    """(name, how it is packed) of the parameters that hold a matrix for each expert."""
    specs: dict[str, PackedSpec] = module.__dict__.get("qfx_packed", {})
    return ((name, spec) for name, spec in specs.items() if len(spec.shape) == 3)


def _of_rows(layer: Layer) -> Layer:
    """The layer; of a convolution the linear over its windows, which reads rows as any other."""
    if not isinstance(layer, QuantConv):
        return layer
    rows: QuantLinear = copy.copy(layer)
    rows.__class__ = QuantLinear
    return rows


def _kind(layer: Layer) -> tuple[Any, ...]:
    low = None if isinstance(layer, QuantMixed) or layer.low is None else layer.low[0].shape
    return layer.shape, layer.x_format, layer.stored, layer.dtype, layer.bias is None, low


def _together(children: dict[str, Layer]) -> list[list[str]]:
    """Names of those that read the same input, as models call them, and differ in their output alone."""
    groups: dict[Any, list[str]] = {}
    for name, layer in children.items():
        for kind in _SAME_INPUT:
            if kind.fullmatch(name):
                w_format = "" if isinstance(layer, QuantMixed) else layer.w_format  # rows of several formats join all
                key = kind, layer.in_features, layer.x_format, w_format, layer.dtype, layer.rotation
                groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
