"""The caches of a plan: what each layer stores, by the name of its attention.

"model.layers.0.self_attn": {"index": 0, "heads": 2, "widths": [32, 32], "window": None, "cross": False,
                             "format": {"k": "u4/g32/f16", "v": "u2/g32/f16", "residual": 32, "sinks": 4}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch

from qfx.errors import explain
from qfx.kv.formats import CacheFormat

Caches = dict[str, dict[str, Any]]  # FQN of an attention -> what stands above
_PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def plain_of(dtype: torch.dtype) -> str:
    """The format that keeps floats of this dtype as they are; f32 for any other dtype."""
    return _PLAIN.get(dtype, "f32")


def asked_format(asked: Mapping[str, Any], dtype: torch.dtype) -> CacheFormat:
    """The format of a layer of whose keys ("k") and values ("v") something is asked; the rest stays in `dtype`."""
    plain = plain_of(dtype)
    return CacheFormat.from_json({"k": plain, "v": plain, **asked})


@dataclass(frozen=True)
class CacheLayer:
    """One layer of a model's cache. fqn: of the attention that fills it. index: its number. heads: of keys and values.

    widths: channels of a head's keys and values. window: tokens that are kept; None: all. cross: it holds what an
    encoder gave, once, instead of growing.
    """

    fqn: str
    index: int
    heads: int
    widths: tuple[int, int]
    window: int | None = None
    cross: bool = False

    def to_json(self) -> dict[str, Any]:
        """All but the name."""
        return {name: list(v) if name == "widths" else v for name, v in asdict(self).items() if name != "fqn"}

    @classmethod
    def from_json(cls, fqn: str, value: Mapping[str, Any]) -> CacheLayer:
        """What `to_json` gave. Raises ValueError for what is no layer."""
        try:
            keys, values = (int(width) for width in value["widths"])
            window = None if value["window"] is None else int(value["window"])
            found = cls(fqn, int(value["index"]), int(value["heads"]), (keys, values), window, bool(value["cross"]))
        except (KeyError, TypeError, ValueError) as error:
            what = f"the layer {fqn!r} of a cache cannot be read"
            raise ValueError(explain(what, expected="index, heads, widths, window, cross", found=value)) from error
        if min(found.index, found.heads - 1, keys - 1, values - 1) < 0:
            raise ValueError(explain(f"the layer {fqn!r} of a cache has impossible sizes", found=dict(value)))
        return found


@dataclass(frozen=True)
class Cached:
    """One layer of a cache, and what it stores."""

    layer: CacheLayer
    format: CacheFormat

    @property
    def is_plain(self) -> bool:
        """Nothing is quantized."""
        return all(fmt.is_plain for fmt in (*self.format.keys, *self.format.values))

    def to_json(self) -> dict[str, Any]:
        """JSON-able, without the name."""
        return {**self.layer.to_json(), "format": self.format.to_json()}

    def nbytes(self, tokens: Any, *, batch: int = 1, dtype: torch.dtype = torch.float16) -> Any:
        """Bytes of a context of so many tokens (int or sympy expression); a window keeps its newest ones."""
        return self.format.nbytes(self.layer.heads, self.layer.widths, self._kept(tokens), batch=batch, dtype=dtype)

    @property
    def float_token_bytes(self) -> int:
        """Bytes of a token in 16 bits."""
        return self.layer.heads * sum(self.layer.widths) * 2

    @property
    def token_bytes(self) -> Fraction:
        """Bytes of a stored token, those of its share of a group's scales included; a window is not looked at."""
        first, step = self.format.sinks + self.format.residual, self.format.step
        before, after = (self.format.nbytes(self.layer.heads, self.layer.widths, first + n * step) for n in (1, 2))
        return Fraction(after - before, step)

    def _kept(self, tokens: Any) -> Any:
        if self.layer.window is None:
            return tokens
        if isinstance(tokens, int):
            return min(tokens, self.layer.window)
        import sympy

        return sympy.Min(tokens, self.layer.window)


def read(caches: Mapping[str, Any], where: str = "the plan") -> list[Cached]:
    """The layers of a plan's caches, those of self-attention first, in order. Raises ValueError for what is none."""
    found = []
    for fqn, value in caches.items():
        if not isinstance(value, Mapping):
            raise ValueError(explain(f"the cache of {fqn!r} in {where} cannot be read", found=repr(value)))
        layer = CacheLayer.from_json(fqn, value)
        fmt = CacheFormat.from_json(value.get("format", {}))
        fmt.check_heads(layer.heads, fqn)
        found.append(Cached(layer, fmt))
    numbers = [(one.layer.cross, one.layer.index) for one in found]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two caches in {where} are of one layer: {numbers}")
    return sorted(found, key=lambda one: (one.layer.cross, one.layer.index))


def layer_formats(caches: Mapping[str, Any], count: int, *, cross: bool = False, plain: str = "f32") -> list[Any]:
    """What `QuantizedCache` takes for a model of `count` layers; those without a cache in the plan stay `plain`."""
    whole = CacheFormat.from_json({"k": plain, "v": plain})
    own = {one.layer.index: one.format for one in read(caches) if one.layer.cross is cross}
    return [own.get(index, whole) for index in range(count)]


def grown_formats(caches: Mapping[str, Any], count: int) -> list[CacheFormat] | None:
    """The formats of the caches that grow, in order, where the plan knows so many of them."""
    own = [one.format for one in read(caches) if not one.layer.cross]
    return own if own and len(own) == count else None
