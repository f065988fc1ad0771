"""The caches of a plan: what each layer stores, by the name of its attention.

"model.layers.0.self_attn": {"index": 0, "heads": 2, "widths": [32, 32], "window": None, "cross": False,
                             "format": {"k": "u4/g32/f16", "v": "u2/g32/f16", "residual": 32, "sinks": 4}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qfx.errors import Note, explain, nearest
from qfx.kv.asked import is_cache
from qfx.kv.formats import CacheFormat, cache_formats
from qfx.kv.held import Caches
from qfx.kv.sites import CacheLayer, cache_layers
from qfx.recipe import Recipe, matches

PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


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

    def float_bytes(self, tokens: Any, *, batch: int = 1, itemsize: int = 2) -> Any:
        """The same without a format."""
        return batch * self._kept(tokens) * self.layer.heads * sum(self.layer.widths) * itemsize

    def _kept(self, tokens: Any) -> Any:
        if self.layer.window is None:
            return tokens
        if isinstance(tokens, int):
            return min(tokens, self.layer.window)
        import sympy  # type: ignore[import-untyped]

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


def plan_caches(model: nn.Module, recipe: Recipe, calls: Sequence[Any] = ()) -> tuple[Caches, list[Note]]:
    """What a recipe's rules give the layers of a model's cache, and notes about rules that cannot be had. Layers that
    no rule names stay in the dtype of the model; without any that is named there is nothing.

    Raises ValueError for lists of formats that are not of the model's heads, or of heads that change places.
    """
    if not recipe.cache_rules:
        return {}, []
    _check_order(recipe)
    layers, missing = cache_layers(model, calls)
    if missing is not None:
        return {}, [missing]
    plain = PLAIN.get(dtype_of(model), "f32")
    found: Caches = {}
    some = False
    for layer in layers:
        asked = recipe.cache_for(layer.fqn)
        fmt = cache_formats({"k": plain, "v": plain, **asked}, 1)[0]
        fmt.check_heads(layer.heads, layer.fqn)
        found[layer.fqn] = Cached(layer, fmt).to_json()
        some = some or bool(asked)
    return found if some else {}, _unmatched(recipe, layers)


def check_model(model: nn.Module, caches: Mapping[str, Any]) -> None:
    """Raises ValueError where a model has no attention of a name that caches are planned for, or other sizes.

    The names are those of modules; a cache's number of heads is what the model's configuration says, where it does.
    """
    names = {name for name, _ in model.named_modules()}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    count = getattr(text, "num_hidden_layers", None)
    for one in read(caches):
        if one.layer.fqn not in names:
            step = "plan again for this model"
            what = f"the plan has a cache for {one.layer.fqn!r}, which {type(model).__name__} lacks"
            raise ValueError(explain(what, expected=nearest(one.layer.fqn, names), next_step=step))
        if isinstance(count, int) and one.layer.index >= count:
            what = f"the plan has a cache for layer {one.layer.index}"
            raise ValueError(explain(what, expected=f"{count} layers, as the model has"))


def layer_formats(caches: Mapping[str, Any], count: int, *, cross: bool = False, plain: str = "f32") -> list[Any]:
    """What `QuantizedCache` takes for a model of `count` layers; those without a cache in the plan stay `plain`."""
    whole = CacheFormat.from_json({"k": plain, "v": plain})
    own = {one.layer.index: one.format for one in read(caches) if one.layer.cross is cross}
    return [own.get(index, whole) for index in range(count)]


def grown_formats(caches: Mapping[str, Any], count: int) -> list[CacheFormat] | None:
    """The formats of the caches that grow, in order, where the plan knows so many of them."""
    own = [one.format for one in read(caches) if not one.layer.cross]
    return own if own and len(own) == count else None


def _check_order(recipe: Recipe) -> None:
    """Raises ValueError for formats by heads beside what gives heads another order."""
    planned = recipe.allocation is not None and recipe.allocation.units == "heads"
    if not planned and "permute-heads" not in recipe.rewrites:
        return
    for rule in recipe.cache_rules:
        if any(isinstance(text, tuple) for text in rule.texts.values()):
            what = f"the rule for {rule.target!r} lists formats by heads, and the recipe gives heads another order"
            step = "leave out 'permute-heads', plan units='layers', or take cache_bits, which sees the final order"
            raise ValueError(explain(what, next_step=step))


def _unmatched(recipe: Recipe, layers: Sequence[CacheLayer]) -> list[Note]:
    """Rules whose names are those of no attention."""
    targets = dict.fromkeys(t for t in (*(r.target for r in recipe.cache_rules), *recipe.ignore) if is_cache(t))
    missing = [t for t in targets if not any(matches(t, "cache", layer.fqn) for layer in layers)]
    step = f"the caches are those of {layers[0].fqn}, ..., {layers[-1].fqn}"
    return [Note(repr(target), "this target of the recipe matches no cache of the model", step) for target in missing]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floats, as its first parameter has it."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
