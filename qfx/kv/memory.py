"""What a decoder takes in memory, as expressions in batch and context, and how long a context a memory has room for.

    memory = Memory.of(model)                             a live model, or Memory.of_config(config): no weights are read
    memory.cache(formats)                                 batch*(2048*context + ...)     bytes, true ones
    memory.total(formats, batch=1, context=8192)          weights + cache + activations of one token
    memory.longest(formats, 8 * 2**30, batch=1)           tokens of each sequence

formats: one `CacheFormat` for each layer, None for keys and values as the model makes them. A layer with a sliding
window keeps no more than that. A `QuantizedCache` grows by 256 tokens, for which it holds room ahead. Activations are
those of a call that reads one new token, at their peak, as `qfx.allocation.costs` counts them. What a runtime takes for
itself comes on top.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import nn

from qfx.allocation.costs import Asked, Costs
from qfx.allocation.model_costs import costs_of, formats_of_plan, weights_of
from qfx.allocation.peak import peak
from qfx.allocation.sizes import BATCH, CONTEXT, SEQUENCE, Expr, checked, numbers
from qfx.errors import Note, UnsupportedError, explain, first_line
from qfx.format import Format
from qfx.kv.formats import SHORT, CacheFormat, cache_formats
from qfx.kv.planning import dtype_of
from qfx.kv.plans import Cached, CacheLayer, asked_format, plain_of, read
from qfx.kv.sites import cache_layers
from qfx.plan import Plan
from qfx.presets import presets
from qfx.quantize import plan
from qfx.recipe import Recipe
from qfx.storage.hollow import hollow

Formats = Sequence[CacheFormat] | None

_MOST = 1 << 40  # tokens: a context beyond this is no limit
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """layers: of the cache, those of self-attention. weights: bytes of parameters. activations: bytes at their peak in
    batch, sequence and context. dtype: in which the model runs. positions: tokens that the model takes, where it says.
    notes: what could not be told."""

    layers: tuple[CacheLayer, ...]
    weights: int
    activations: Expr
    dtype: torch.dtype
    positions: int | None = None
    notes: tuple[Note, ...] = field(default=())

    @classmethod
    def of(cls, model: nn.Module, weights: Recipe | Plan | None = None) -> Memory:
        """Of a float model; it may be on the meta device. weights: formats of its weights.

        Raises ValueError for a model without a cache and for a recipe that needs data (a plan of it does).
        """
        return cls._of(model, model, weights)

    @classmethod
    def _of(cls, model: nn.Module, shown: nn.Module, weights: Recipe | Plan | None) -> Memory:
        """shown: whose graph is looked at, the model itself or its first layers."""
        if isinstance(weights, Recipe) and weights.needs_data:
            raise ValueError(
                explain(
                    f"recipe {weights.name!r} chooses its formats by data",
                    next_step="plan the model by qfx.plan(model, recipe, data), and give that plan",
                )
            )
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        layers, missing = cache_layers(model)
        if missing is not None and on_meta:
            layers, missing = cache_layers(_looping(hollow(model, {})))
        if missing is not None:
            raise ValueError(explain(f"the memory of {type(model).__name__}: {missing.reason}", expected="a decoder"))
        notes = []
        if any(layer.cross for layer in layers):
            reason = "keys and values of the encoder's tokens are not counted: they do not grow"
            notes.append(Note(type(model).__name__, reason, "nothing"))
        dtype = dtype_of(model)
        whole, part = (hollow(one, {}) if on_meta else one for one in (model, shown))
        stored, activations, told = _rest(whole, whole if shown is model else part, weights, dtype)
        if weights is None:
            stored = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
        own = tuple(layer for layer in layers if not layer.cross)
        if shown is not model:
            held: Any = shown.config
            left = [layer for layer in own if layer.index >= held.num_hidden_layers]
            values = sum(layer.heads * sum(layer.widths) for layer in left)
            activations += BATCH * SEQUENCE * values * dtype.itemsize  # new keys and values, which live to the end
        config: Any = model.config  # a model with a cache of transformers has one
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return cls(own, stored, activations, dtype, positions, (*notes, *told))

    @classmethod
    def of_config(
        cls, config: Any, *, dtype: torch.dtype | None = None, weights: Recipe | Plan | None = None
    ) -> Memory:
        """Of a configuration of transformers: the model is made without its weights.

        dtype: None is the config's own, f32 where it has none. Activations are told by the first layers, one of each
        kind (`layer_types`) and two at least; formats of weights by a graph of all, in which no size varies.
        """
        model = _empty(config, dtype)
        few = _few(config)
        return cls._of(model, model if few is None else _empty(few, dtype), weights)

    def cache(self, formats: Formats = None) -> Expr:
        """Bytes of the cache, in batch and context (tokens that each sequence has in it)."""
        return sympy.Add(*(one.nbytes(CONTEXT, batch=BATCH, dtype=self.dtype) for one in self._cached(formats)))

    def cache_bytes(self, formats: Formats = None, *, batch: int = 1, context: int) -> int:
        """The same as a number."""
        return sum(one.nbytes(context, batch=batch, dtype=self.dtype) for one in self._cached(formats))

    def token_bytes(self, formats: Formats = None) -> Fraction:
        """Bytes that each further token of one sequence takes in a long context, whose windows are full."""
        grown = (one.token_bytes for one in self._cached(formats) if one.layer.window is None)
        return sum(grown, Fraction(0))

    def total(self, formats: Formats = None, *, batch: int = 1, context: int) -> int:
        """Bytes of everything while one more token of each sequence is read."""
        given = checked({"batch": batch, "sequence": 1, "context": context})
        beside = round(numbers([self.activations], given)[0])
        return self.weights + beside + self.cache_bytes(formats, batch=batch, context=context)

    def expression(self, formats: Formats = None) -> Expr:
        """`total` in batch and context."""
        return self.weights + self.activations.subs(SEQUENCE, 1) + self.cache(formats)

    def longest(self, formats: Formats, memory: int, *, batch: int = 1) -> int | None:
        """The most tokens of each of `batch` sequences for which there is room in `memory` bytes; 0 where there is none
        for a single one, None where no context is too long (every layer has a window)."""
        checked({"batch": batch})
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise ValueError(explain("memory", expected="a number of bytes, 1 or more", found=repr(memory)))
        low, high = 0, 1
        while self.total(formats, batch=batch, context=high) <= memory:
            low, high = high, 2 * high
            if high > _MOST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(formats, batch=batch, context=middle) <= memory else (low, middle)
        return low

    def formats(self, kv: Any) -> list[CacheFormat]:
        """`formats_of` for this model."""
        return formats_of(kv, self.layers, self.dtype)

    def _cached(self, formats: Formats) -> list[Cached]:
        if formats is None:
            formats = self.formats(plain_of(self.dtype))
        if len(formats) != len(self.layers):
            raise ValueError(
                explain("formats of a cache", expected=f"{len(self.layers)}, one for each layer", found=len(formats))
            )
        return [Cached(layer, fmt) for layer, fmt in zip(self.layers, formats, strict=True)]


def formats_of(kv: Any, layers: Sequence[CacheLayer], dtype: torch.dtype) -> list[CacheFormat]:
    """What `kv` gives each layer: a preset or Recipe with rules for caches, a Plan, or what `cache_formats` takes.

    "keys:values" are two formats. dtype: of what nothing is said about. Raises ValueError for anything else.
    """
    if isinstance(kv, str) and kv not in SHORT and all(part in presets() for part in kv.split("+")):
        kv = Recipe.parse(kv)
    if isinstance(kv, Plan):
        held = {one.layer.fqn: one.format for one in read(kv.caches)}
        whole = asked_format({}, dtype)
        return [held.get(layer.fqn, whole) for layer in layers]
    if isinstance(kv, Recipe):
        if not kv.cache_rules:
            raise ValueError(explain(f"recipe {kv.name!r} says nothing of caches", expected="rules for 'cache'"))
        return [asked_format(kv.cache_for(layer.fqn), dtype) for layer in layers]
    if isinstance(kv, str) and kv.count(":") == 1:
        keys, values = kv.split(":")
        kv = {"k": keys, "v": values}
    return cache_formats(kv, len(layers))


def _empty(config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a configuration on the meta device."""
    import transformers

    names = config.architectures or ()
    kind = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config) if kind is None else kind(config)
    return model.to(dtype or config.dtype or torch.float32).eval()


def _few(config: Any) -> Any:
    """The configuration of its first layers; None where it does not say how many it has, or has few."""
    kinds, count = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", None)
    first = max(2, *(kinds.index(kind) + 1 for kind in set(kinds))) if kinds else 2
    if not isinstance(count, int) or first >= count or config.get_text_config() is not config:
        return None
    found = copy.deepcopy(config)
    found.num_hidden_layers = first
    if kinds:
        found.layer_types = kinds[:first]
    return found


def _looping(model: Any) -> nn.Module:
    """The same with experts one after another, since their grouped products need weights that lie densely."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    found: nn.Module = model
    return found


def _rest(
    model: nn.Module, shown: nn.Module, weights: Recipe | Plan | None, dtype: torch.dtype
) -> tuple[int, Expr, tuple[Note, ...]]:  # fmt: skip
    """(bytes of weights, activations, notes). shown: as of `Memory._of`. Without a graph nothing is counted."""
    name = type(model).__name__
    try:
        costs = costs_of(shown)
        whole = costs if weights is None or shown is model else weights_of(model)
    except (UnsupportedError, RuntimeError) as error:
        first = first_line(error)
        if weights is not None:
            what = f"formats of the weights of {name} are counted on its graph, which cannot be had: {first}"
            raise UnsupportedError(explain(what, next_step="leave the formats of the weights out")) from error
        return 0, sympy.Integer(0), (_uncounted(name, f"the graph cannot be had ({first})"),)
    asked = None if weights is None else _asked(model, weights, whole)
    stored, most, notes = whole.weights(asked, rest=Format(plain_of(dtype))), peak(costs.lives), costs.notes
    if others := sorted(str(s) for s in most.free_symbols - {BATCH, SEQUENCE, CONTEXT}):
        most, notes = sympy.Integer(0), (*notes, _uncounted(name, f"they depend on {', '.join(others)}"))
    return stored, most, notes


def _uncounted(name: str, why: str) -> Note:
    return Note(name, f"its activations are not counted: {why}", "keep some memory free for them")


def _asked(model: nn.Module, weights: Recipe | Plan, costs: Costs) -> Asked:
    """Formats of weights by name."""
    return formats_of_plan(plan(model, weights) if isinstance(weights, Recipe) else weights, costs)


def parse_bytes(text: str) -> int:
    """8GiB, 500 MB, 1.5e9 as bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not 1 <= value < 1e18:
        raise ValueError(explain("an amount of memory", expected="8GiB, 16GB or bytes", found=repr(text)))
    return int(value)
