"""`qfx.QuantizedCache`: a cache of transformers whose keys and values lie in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from qfx.errors import UnsupportedError, check_flags, explain
from qfx.kv.attend import Scratch
from qfx.kv.formats import CacheFormat, cache_formats
from qfx.kv.layers import QuantizedLayer
from qfx.kv.static import StaticLayer, StaticQuantizedLayer, stores_alone
from qfx.kv.static_packed import PackedStaticLayer

if TYPE_CHECKING:
    from qfx.plan import Plan

_FULL = ("full_attention",)
_WINDOWED = ("sliding_attention", "chunked_attention")
_PLACED_BY_LENGTH = ("gpt_neo",)  # transformers' own static cache gives wrong results there
_PLAIN = "use transformers' DynamicCache for this model"


class QuantizedCache(Cache):  # type: ignore[misc]
    """Keys and values in the formats that `formats` asks for (see `qfx.kv.formats.cache_formats`).

        cache = qfx.QuantizedCache(model.config, "i8")
        model.generate(ids, past_key_values=cache)

    config: of the model that uses the cache. A token is rounded once, when it is stored, and its codes are never
    written again. The tokens of a call are read by that call as they came, and from the next call on as they come back;
    a prompt is therefore read in float. The newest tokens, and below 8 bits the first, stay in the model's dtype.

    Attention reads the codes tile by tile where the model runs as transformers' sdpa or eager attention; other
    implementations get floats of the whole history, and a QfxWarning says so (see `qfx.kv.states`). Layers with a
    window keep what it can see, without sinks. Layers of linear attention and of convolutions keep their states, which
    do not grow, as transformers does; so do those that read the keys of others.

    offloading: layers rest in the CPU's memory and come back to the GPU ahead of their turn, as transformers does it.

    max_length: memory for so many tokens that never moves, for compiled decoding: `torch.compile(fullgraph=True)` makes
    one graph for all steps. In 8 bits every token is stored at once, without residual and sinks, and on the CPU read as
    floats (see `qfx.kv.static`); below, it reads as the growing cache does (see `qfx.kv.static_packed`).

    Raises ValueError for formats that no cache can have and for lists of another number of layers; UnsupportedError for
    layers that hold other states beside keys and values, where none holds any, and for a fixed length of a model that
    cannot have it (GPT-Neo). Lists by heads are looked at when the first keys come: configs do not tell how many those
    have (Falcon, MiMo-V2).
    """

    def __init__(
        self,
        config: Any,
        formats: str | Mapping[str, Any] | Sequence[Any] | CacheFormat | Plan = "i8",
        *,
        max_length: int | None = None,
        offloading: bool = False,
    ) -> None:
        check_flags(offloading=offloading)
        if offloading and max_length is not None:
            what = f"a cache of fixed length (max_length={max_length}) cannot be offloaded: its memory never moves"
            raise ValueError(explain(what, next_step="leave one of max_length and offloading out"))
        if offloading and not torch.cuda.is_available():
            raise _nothing_to_offload("no GPU")
        decoder = config.get_text_config(decoder=True)
        if max_length is not None and decoder.model_type in _PLACED_BY_LENGTH:
            what = f"{decoder.model_type} places its queries by the number of keys, which a fixed length makes wrong"
            raise UnsupportedError(explain(what, found=f"max_length={max_length}", next_step="leave max_length out"))
        kinds, options = _kinds(decoder)
        wanted = cache_formats(formats, len(kinds))
        layers = []
        for i, (kind, more, fmt) in enumerate(zip(kinds, options, wanted, strict=True)):
            layers.append(_layer(i, kind, more, fmt, max_length))
        if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            raise UnsupportedError(explain("no layer of the model keeps keys and values", next_step=_PLAIN))
        scratch = Scratch()
        for layer in layers:
            if isinstance(layer, QuantizedLayer):
                layer.scratch = scratch
        super().__init__(layers=layers, offloading=offloading)
        self.formats = wanted

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys [B, G, n, D] and values of a layer; returns what attention reads: `QuantizedLayer.update`."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                explain(
                    f"keys of layer {layer_idx} for a cache of {len(self.layers)} layers",
                    expected=f"layers 0 to {len(self.layers) - 1}",
                    found=layer_idx,
                    next_step="make the cache with the config of the model that uses it",
                )
            )
        if self.offloading and key_states.device.type != "cuda":
            raise _nothing_to_offload(f"keys on {key_states.device}")
        layer = self.layers[layer_idx]
        if isinstance(layer, StaticQuantizedLayer) and not layer.is_initialized and _reads_codes(key_states):
            self.layers[layer_idx] = layer.packed
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def nbytes(self) -> int:
        """Bytes held by all layers: codes, scales, zero points, float tokens, room to grow, states of linear attention.

        Not what one call needs: floats of a tile, of at most about two million bytes for the whole cache.
        """
        return sum(_nbytes(layer) for layer in self.layers)


def _nbytes(layer: Any) -> int:
    if isinstance(layer, QuantizedLayer | StaticLayer):
        return layer.nbytes
    return sum(x.nbytes for x in pytree.tree_leaves(vars(layer)) if isinstance(x, Tensor))


def _nothing_to_offload(found: str) -> ValueError:
    what = "offloading moves keys and values from a GPU to the CPU's memory"
    return ValueError(explain(what, expected="a model on a CUDA device", found=found, next_step="leave offloading out"))


def _reads_codes(keys: Tensor) -> bool:
    """Whether attention has kernels there that read codes faster than a compiler's floats of them."""
    return keys.device.type == "cuda"


def _kinds(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The kind of each layer that keeps keys and values, and what it is made with.

    Older releases of transformers give one dictionary for all, and leave out layers that read the keys of others.
    """
    kinds, options = get_layer_types_and_kwargs(config)
    return kinds, [options] * len(kinds) if isinstance(options, dict) else options


def _layer(index: int, kind: str, options: dict[str, Any], fmt: CacheFormat, max_length: int | None) -> Any:
    own = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    if own is not None and not issubclass(own, CacheLayerMixin):
        return own(**options)  # states of linear attention or of convolutions, or none
    if kind not in (*_FULL, *_WINDOWED):
        raise UnsupportedError(
            explain(
                f"layer {index} is of kind {kind!r}, whose states a quantized cache cannot hold",
                expected=", ".join((*_FULL, *_WINDOWED)),
                found=kind,
                next_step=_PLAIN,
            )
        )
    where, window = f"layer {index}", options.get("sliding_window") if kind in _WINDOWED else None
    if max_length is not None:
        if not stores_alone(fmt):
            return PackedStaticLayer(fmt, where, max_length)
        fmt = replace(fmt, sinks=0, residual=0)
        packed = PackedStaticLayer(fmt, where, max_length)
        return StaticQuantizedLayer(fmt, where, max_length, packed=packed)
    return QuantizedLayer(replace(fmt, sinks=0) if window else fmt, where, window=window)
