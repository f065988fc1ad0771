"""CacheFormat: what the cache of one layer stores, as a frozen value with its bytes.

    keys     /gN   one scale for each channel and N consecutive tokens (KIVI, Liu et al. 2024)   u4/g32/f16
             /tok  one scale for each token of each head                                        i8/tok/f16
    values   /gN   one scale for each token and N consecutive channels
             /tok  one scale for each token of each head

Scales are found when a token is stored, and never again. f16, bf16 and f32 store the values as they are. Zero points of
a cache are signed and may lie beyond the codes, so that a channel far from zero has all its steps between its extremes:
one byte each, two for u8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qfx.errors import explain, nearest
from qfx.format import Format

if TYPE_CHECKING:
    from qfx.plan import Plan

SHORT = {  # what a type alone stands for
    "i8": "i8/tok/f16",
    "i4": "u4/g32/f16",
    "i3": "u3/g32/f16",
    "i2": "u2/g32/f16",
    "fp8": "f8e4m3/tok/f16",
}
RESIDUAL, SINKS = 16, 4  # below 8 bits, unless said otherwise: the newest tokens weigh most
RESIDUAL_8 = 32  # of 8 bits
_WHAT = {"k": "keys", "v": "values"}
_KEYS = ("k", "v", "residual", "sinks")
_SCALES = ("f32", "f16", "bf16", "e8m0")


@dataclass(frozen=True)
class CacheFormat:
    """What the cache of one layer stores.

    keys, values: one format for each head of keys and values, or one for all. residual: newest tokens that stay in the
    model's dtype, beyond a group of tokens that is not complete. sinks: first tokens that stay in it. Raises ValueError
    for formats that no cache can have and for lists that disagree.
    """

    keys: tuple[Format, ...]
    values: tuple[Format, ...]
    residual: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        for what, formats in (("keys", self.keys), ("values", self.values)):
            if not formats:
                raise ValueError(explain(f"{what} of a cache", expected="one format at least", found="none"))
            for fmt in formats:
                _check(what, fmt)
        if len(self.keys) != len(self.values) and 1 not in (len(self.keys), len(self.values)):
            raise ValueError(
                explain(
                    "formats of a cache, head by head",
                    expected="as many for keys as for values, or one for all",
                    found=f"{len(self.keys)} for keys, {len(self.values)} for values",
                )
            )
        for name, count in (("residual", self.residual), ("sinks", self.sinks)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(explain(f"{name} of a cache", expected="a number of tokens, 0 or more", found=count))

    @property
    def heads(self) -> int | None:
        """Heads that the lists know; None where one format serves all."""
        count = max(len(self.keys), len(self.values))
        return count if count > 1 else None

    @property
    def step(self) -> int:
        """Tokens that are stored at once: the least number that ends a group, and a byte, of each head."""
        groups = [fmt.group or 1 for fmt in self.keys]
        return math.lcm(*groups, *(planes_of(fmt) for fmt in (*self.keys, *self.values)))

    def of_head(self, head: int) -> tuple[Format, Format]:
        """Formats of a head's keys and values."""
        return self.keys[head if len(self.keys) > 1 else 0], self.values[head if len(self.values) > 1 else 0]

    def check_heads(self, heads: int, where: str = "a layer") -> None:
        """Raises ValueError, naming `where`, for another number of heads than the lists know."""
        if self.heads not in (None, heads):
            raise ValueError(
                explain(
                    f"the cache of {where} has formats for other heads",
                    expected=f"{heads} heads of keys and values, as the model has",
                    found=f"{self.heads} formats",
                    next_step="give one format for each head, or one for all",
                )
            )

    def stored(self, tokens: Any) -> Any:
        """How many of `tokens` (int or sympy expression) are stored in the formats; the others stay as they are."""
        if isinstance(tokens, int):
            return max(tokens - self.sinks - self.residual, 0) // self.step * self.step
        import sympy

        return self.step * sympy.floor(sympy.Max(tokens - self.sinks - self.residual, 0) / self.step)

    def nbytes(
        self, heads: int, head_dim: int | tuple[int, int], tokens: Any, *, batch: int = 1,
        dtype: torch.dtype = torch.float16,
    ) -> Any:  # fmt: skip
        """Bytes of `tokens` tokens of `batch` sequences: codes, scales, zero points, and what stays in `dtype`.

        head_dim: channels of a head, (of keys, of values) where they differ. tokens: an int, or an expression of sympy,
        of which the result is one too. Raises ValueError for another number of heads than the lists know.
        """
        self.check_heads(heads)
        k_dim, v_dim = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
        stored = self.stored(tokens)
        total = (tokens - stored) * heads * (k_dim + v_dim) * dtype.itemsize
        for head in range(heads):
            k, v = self.of_head(head)
            group = k.group or 1
            total += stored * (k_dim * k.bits + v_dim * v.bits) // 8
            total += stored // group * (_scale_bytes(k) * (k_dim if k.group else 1))
            total += stored * (_scale_bytes(v) * scales_of_token(v, v_dim))
        return batch * total

    def to_json(self) -> dict[str, Any]:
        """{"k": a text or a list of texts, "v": ..., "residual": tokens, "sinks": tokens}."""
        texts = {
            name: str(formats[0]) if len(formats) == 1 else [str(fmt) for fmt in formats]
            for name, formats in (("k", self.keys), ("v", self.values))
        }
        return {**texts, "residual": self.residual, "sinks": self.sinks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CacheFormat:
        """What `to_json` wrote, and whatever `cache_formats` takes for one layer."""
        return _one(value)

    def __str__(self) -> str:
        parts = [f"k={_show(self.keys)}", f"v={_show(self.values)}"]
        parts += [f"{name}={count}" for name, count in (("residual", self.residual), ("sinks", self.sinks)) if count]
        return " ".join(parts)


def cache_formats(kv: str | Mapping[str, Any] | Sequence[Any] | CacheFormat | Plan, layers: int) -> list[CacheFormat]:
    """The format of each of `layers` layers that `kv` asks for.

    kv: "i8", "i4", "i3", "i2" or "fp8"; any text of a Format (for keys and values); {"k": ..., "v": ..., "residual":
    tokens, "sinks": tokens}, where k and v may be lists, one format for each head; a CacheFormat; a list of any of
    these, one for each layer; or a Plan, whose layers without a format stay float. RESIDUAL_8, below 8 bits RESIDUAL
    and SINKS, hold where nothing is said. Raises ValueError for anything else.
    """
    if hasattr(kv, "caches"):
        from qfx.kv.plans import layer_formats  # which imports this file

        kv = layer_formats(kv.caches, layers)
    if isinstance(kv, Sequence) and not isinstance(kv, str):
        if len(kv) != layers:
            raise ValueError(
                explain(
                    "formats of a cache, layer by layer",
                    expected=f"{layers}, one for each layer",
                    found=str(len(kv)),
                    next_step="give one for each layer, or a single one for all",
                )
            )
        return [_one(each) for each in kv]
    return [_one(kv)] * layers


def planes_of(fmt: Format) -> int:
    """Tokens whose codes share whole bytes: 2 of 4 bits, 4 of 2 bits, 8 of any other number below 8."""
    return {2: 4, 4: 2}.get(fmt.bits, 8) if fmt.bits < 8 else 1


def scales_of_token(fmt: Format, width: int) -> int:
    """Scales of one token's values of `width` channels; 0 for a plain format."""
    return 0 if fmt.is_plain else -(-width // fmt.group) if fmt.group else 1


def zero_dtype(fmt: Format) -> torch.dtype:
    """dtype of the zero points of a cache."""
    return torch.int8 if fmt.bits < 8 else torch.int16


def _scale_bytes(fmt: Format) -> int:
    """Bytes of one scale with its zero point."""
    if fmt.is_plain:
        return 0
    return fmt.scale_dtype.itemsize + (zero_dtype(fmt).itemsize if fmt.has_zero else 0)


def _one(kv: Any) -> CacheFormat:
    if isinstance(kv, CacheFormat):
        return kv
    if isinstance(kv, str | Format):
        kv = {"k": kv, "v": kv}
    if not isinstance(kv, Mapping):
        raise ValueError(
            explain(
                "the format of a cache",
                expected="'i8', 'i4', a format, {'k': ..., 'v': ...}, or a list of these, one for each layer",
                found=repr(kv),
            )
        )
    for key in kv:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r} in the format of a cache, {nearest(str(key), _KEYS)}")
    if missing := [key for key in ("k", "v") if key not in kv]:
        raise ValueError(
            explain(
                "the format of a cache",
                expected="formats for keys and for values",
                found=f"none for {_WHAT[missing[0]]}",
                next_step=f"add {missing[0]!r}; 'f16' stores them as they are",
            )
        )
    keys, values = _several("k", kv["k"]), _several("v", kv["v"])
    least = min(fmt.bits for fmt in (*keys, *values))
    residual = kv.get("residual", 0 if least > 8 else RESIDUAL_8 if least == 8 else RESIDUAL)
    return CacheFormat(keys, values, residual, kv.get("sinks", SINKS if least < 8 else 0))


def _several(what: str, value: Any) -> tuple[Format, ...]:
    if isinstance(value, list | tuple):
        return tuple(_format(one) for one in value)
    if not isinstance(value, str | Format):
        raise ValueError(
            explain(f"the format of {_WHAT[what]}", expected="a format, or a list of one for each head", found=value)
        )
    return (_format(value),)


def _format(value: str | Format) -> Format:
    return value if isinstance(value, Format) else Format.parse(SHORT.get(value, value))


def _check(what: str, fmt: Format) -> None:
    if reason := _against(fmt):
        kind = "u" if fmt.bits < 8 and fmt.is_integer else ""
        better = f"{kind}{fmt.bits}/g32/f16" if kind else f"{'i8' if fmt.is_plain else fmt.type}/tok/f16"
        raise ValueError(
            explain(
                f"a cache cannot store {what} as '{fmt}': {reason}",
                expected="/tok, or /gN, with scales of " + ", ".join(_SCALES),
                next_step=f"write '{better}'",
            )
        )


def _against(fmt: Format) -> str | None:
    """Why no cache can have this format, or None."""
    if fmt.is_plain:
        return None
    if fmt.scale_type not in _SCALES:
        return f"{fmt.scale_type} scales need the whole tensor at once, and a cache grows"
    if fmt.granularity == "tok" or (fmt.group and not fmt.dynamic):
        return None
    if fmt.group:
        return "scales of a cache are always found as tokens come, so /dyn says nothing"
    if fmt.granularity in ("ch", "head", ""):
        return "one fixed scale would need data beforehand (only files of `export_onnx` have that)"
    return "blocks do not grow token by token"


def _show(formats: tuple[Format, ...]) -> str:
    return str(formats[0]) if len(formats) == 1 else f"[{','.join(map(str, formats))}]"
