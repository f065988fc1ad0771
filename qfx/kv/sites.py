"""Which layers of a model keep keys and values, and of what size: seen in one small call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import Note, UnsupportedError, first_line
from qfx.inputs import example_inputs
from qfx.kv.plans import CacheLayer

_TOKENS = 2  # of the call
_IDS = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")


def cache_layers(model: nn.Module, calls: Sequence[Any] = ()) -> tuple[list[CacheLayer], Note | None]:
    """The layers in order, those of self-attention first; and, where none was seen, why.

    calls: (args, kwargs) of the model, for one whose inputs its configuration does not tell. The model is called once
    with two tokens; nothing of it changes.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return [], _none(model, "it keeps no keys and values (its forward takes no past_key_values)")
    if getattr(getattr(model, "config", None), "is_decoder", None) is False and not _generates(model):
        return [], _none(model, "it keeps no keys and values (it is an encoder)")
    inputs = _inputs(model, calls)
    if inputs is None:
        return [], _none(model, "no example of its inputs is known", "give data=[batch]")
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return [], _none(model, "its cache cannot be looked at: the model has no config of transformers")
    from qfx.kv.cache import QuantizedCache  # which needs transformers

    try:
        QuantizedCache(model.config)
    except UnsupportedError as error:
        return [], _none(model, first_line(error))
    seen: dict[tuple[bool, int], CacheLayer] = {}
    try:
        _watch(model, inputs, seen)
    except Exception as error:  # noqa: BLE001  (any model's own code: what it raises is told)
        what = f"its cache could not be looked at: {type(error).__name__}: {first_line(error)}"
        return [], _none(model, what)
    found = [seen[key] for key in sorted(seen)]
    return found, None if found else _none(model, "it keeps no keys and values (nothing was put into a cache)")


def _generates(model: nn.Module) -> bool:
    found = getattr(model, "can_generate", None)
    return bool(found and found())


def _none(model: nn.Module, reason: str, step: str = "leave rules for 'cache' out of the recipe") -> Note:
    return Note(type(model).__name__, reason, step)


def _inputs(model: nn.Module, calls: Sequence[Any]) -> dict[str, Any] | None:
    """Keyword arguments of a call of two tokens; those of an encoder are as they are."""
    found = example_inputs(model)
    if found is None and calls:
        args, kwargs = calls[0]
        found = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        found |= found.pop("kwargs", {})
    if found is None:
        return None
    config = getattr(model, "config", None)
    whole = {"input_ids", "attention_mask"} if getattr(config, "is_encoder_decoder", False) else set()
    return {
        name: value[:, :_TOKENS] if name in _IDS and name not in whole and isinstance(value, Tensor) else value
        for name, value in found.items()
        if name not in ("use_cache", "past_key_values", "labels")
    }


def _watch(model: nn.Module, inputs: dict[str, Any], seen: dict[tuple[bool, int], CacheLayer]) -> None:
    """Call the model with a cache that notes who fills it."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config: Any = model.config
    inside: list[str] = []

    class Watched(DynamicCache):  # type: ignore[misc]
        cross = False

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            result = super().update(keys, values, layer_idx, *args, **kwargs)
            own = self.layers[layer_idx]
            window = int(own.sliding_window) if getattr(own, "is_sliding", False) else None
            widths = (int(keys.shape[-1]), int(values.shape[-1]))
            layer = CacheLayer(inside[-1], layer_idx, int(keys.shape[1]), widths, window, self.cross)
            seen.setdefault((self.cross, layer_idx), layer)
            return result

    text = config.get_text_config(decoder=True)
    cache: Any = Watched(config=text)
    if getattr(config, "is_encoder_decoder", False):
        other = Watched(config=text)
        other.cross = True
        cache = EncoderDecoderCache(cache, other)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: inside.pop() and None, always_call=True).remove)
        model(**inputs, past_key_values=cache, use_cache=True)
