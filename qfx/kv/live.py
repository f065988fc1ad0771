"""The caches of a plan in a live model: `generate()` starts with a `QuantizedCache` of their formats.

A cache that the caller gives, `use_cache=False` and `cache_implementation=...` hold instead, which one warning says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qfx.errors import Note, QfxWarning
from qfx.kv.formats import CacheFormat
from qfx.kv.held import HELD, caches_of
from qfx.kv.planning import check_model, dtype_of
from qfx.kv.plans import layer_formats, plain_of, read
from qfx.live.subclass import class_maker, subclass
from qfx.pipeline import told

_SAID = "qfx_caches_said"


def with_caches(model: nn.Module, caches: Mapping[str, Any], *, strict: bool = False) -> nn.Module:
    """Let `generate()` of a model use caches of a plan's formats, and return the model; without any it stays as it is.

    The model's class becomes a subclass of itself with the same name. Raises ValueError for caches of another model. A
    model without `generate()` keeps the formats for the report and for `qfx.QuantizedCache`, which a warning says (an
    UnsupportedError under `strict`).
    """
    if not caches:
        return model
    check_model(model, caches)
    model.__dict__[HELD] = {fqn: dict(one) for fqn, one in caches.items()}
    model.__dict__.pop(_SAID, None)
    if not hasattr(model, "_prepare_cache_for_generation"):
        step = "pass past_key_values=qfx.QuantizedCache(model.config, plan) to its forward"
        reason = "its forward makes its own cache, in float, for each call without one: it has no generate()"
        told([Note(type(model).__name__, reason, step)], strict=strict)
    elif not hasattr(type(model), "qfx_caching"):
        kind: Any = type(model)
        model.__class__ = _class_of(kind)
    return model


def new_cache(model: nn.Module) -> Any:
    """An empty cache for one call of a model that has caches: a `QuantizedCache`, or two in an `EncoderDecoderCache`.

    What the plan has no format for stays in the dtype of the model.
    """
    from transformers.cache_utils import DynamicCache

    from qfx.kv.cache import QuantizedCache

    whole: Any = model.config
    config, caches = whole.get_text_config(decoder=True), caches_of(model)
    plain = plain_of(dtype_of(model))
    made = QuantizedCache(config, layer_formats(caches, config.num_hidden_layers, plain=plain))
    if not getattr(whole, "is_encoder_decoder", False):
        return made
    from qfx.kv.cross import BothCaches, cross_cache

    other: Any = DynamicCache(config=config)
    if any(one.layer.cross and not one.is_plain for one in read(caches)):
        other = cross_cache(config, layer_formats(caches, config.num_hidden_layers, cross=True, plain=plain))
    return BothCaches(made, other)


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    own: Any = base

    def _prepare_cache_for_generation(
        self: nn.Module, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        result = own._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        instead = _instead(self, generation_config, model_kwargs, given)
        if instead:
            _say(self, instead)
        elif given is None:
            made = new_cache(self)
            if generation_config.is_assistant:
                made.activate_past_recording()
            model_kwargs["past_key_values"] = made
        return result

    def init_continuous_batching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _say(self, "continuous batching (generate_batch) has pages of its own")
        return own.init_continuous_batching(self, *args, **kwargs)

    found = (_prepare_cache_for_generation, init_continuous_batching)
    return subclass(base, {**{one.__name__: one for one in found}, "qfx_caching": base})


def _instead(model: nn.Module, config: Any, kwargs: Mapping[str, Any], given: Any) -> str:
    """What a call says that sets the plan's caches aside, in words; "" where nothing does."""
    from qfx.kv.cache import QuantizedCache

    if given is not None:
        parts = (given, getattr(given, "self_attention_cache", None))
        own = next((part for part in parts if isinstance(part, QuantizedCache)), None)
        return f"a {type(given).__name__} was given" if own is None else _others(model, own.formats)
    if config.use_cache is False:
        return "use_cache=False"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r}"
    return "" if kwargs.get("past_key_values") is not None else "the model makes a cache of its own"


def _others(model: nn.Module, given: Sequence[CacheFormat]) -> str:
    """That a cache of other formats than the plan's was given; layers that are plain in both are alike."""
    planned = {one.layer.index: one.format for one in read(caches_of(model)) if not one.layer.cross}
    for index, one in enumerate(given):
        other = planned.get(index, one)
        plain = all(fmt.is_plain for f in (one, other) for fmt in (*f.keys, *f.values))
        if not plain and (one.keys, one.values) != (other.keys, other.values):
            return f"a QuantizedCache of other formats was given, layer {index} in {one} instead of {other}"
    return ""


def _say(model: nn.Module, instead: str) -> None:
    """Once for each thing that is said."""
    said = model.__dict__.setdefault(_SAID, set())
    if instead not in said:
        said.add(instead)
        step = "call generate() without that for the quantized cache"
        note = Note(type(model).__name__, f"the cache's formats of the plan are set aside: {instead}", step)
        warnings.warn(str(note), QfxWarning, stacklevel=5)  # the caller of generate(), behind its no_grad
