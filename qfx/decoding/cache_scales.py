"""The formats that a key-value cache can have in a file, and its scales, found on calibration data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx import data as batches
from qfx.calibration import observers
from qfx.calibration.observers import Observer
from qfx.calibration.padding import Attended, attended, without
from qfx.data import Call
from qfx.errors import explain
from qfx.format import Format
from qfx.kv.asked import is_cache
from qfx.kv.formats import SHORT
from qfx.presets import presets

WHAT = {"k": "key", "v": "value"}
TYPES = ("i8", "i4")
SAMPLES = 128  # sequences of the data that are read, as many as a recipe reads unless it says otherwise
_OBSERVER = {"i8": "absmax", "i4": "mse"}  # 15 steps are worth more where the values are than at their extremes


def cache_formats(kv: str | Mapping[str, str] | None) -> dict[str, Format] | None:
    """The formats of keys and values that `kv` asks for; None for caches in float.

    kv: "i8" or "i4" for both, or {"k": ..., "v": ...}. There is one scale for each channel of each head, which "i8/ch"
    says in full. Raises ValueError for other formats, and where keys and values differ.
    """
    if kv is None:
        return None
    asked = {"k": kv, "v": kv} if isinstance(kv, str) else kv
    if not isinstance(asked, Mapping) or set(asked) != {"k", "v"}:
        raise ValueError(
            explain(
                "the format of the cache",
                expected="'i8', 'i4' or {'k': ..., 'v': ...}",
                found=repr(kv),
                next_step="name one format for keys and one for values",
            )
        )
    formats = {what: _checked(what, text) for what, text in asked.items()}
    if formats["k"] != formats["v"]:
        raise ValueError(
            explain(
                f"kv={kv!r}: keys and values of different types",
                expected="one type for both, which is what GroupQueryAttention reads",
                found=f"{formats['k']} and {formats['v']}",
                next_step=f"kv={formats['k'].type!r} or kv={formats['v'].type!r}",
            )
        )
    return formats


def _checked(what: str, text: Any) -> Format:
    if isinstance(text, list | tuple):
        raise ValueError(
            explain(
                f"a cache of {WHAT[what]}s in a file has one format for all heads",
                expected="i8 or i4",
                found=repr(text),
                next_step="kv='i8' or kv='i4'; qfx.QuantizedCache has formats by heads, in a live model",
            )
        )
    if text in presets() and any(is_cache(rule.target) for rule in presets()[text].rules):
        step = f"give recipe={text!r} (with what else it shall do), or kv='i8' or kv='i4'"
        raise ValueError(explain(f"kv={text!r} is a recipe", expected="the format of a file's cache", next_step=step))
    fmt = Format.parse(SHORT.get(text, text) if text not in TYPES else text)
    if fmt.type in TYPES and fmt.granularity in ("", "ch") and fmt.scale_type == "f32" and not fmt.dynamic:
        return Format(fmt.type, "ch")
    raise ValueError(
        explain(
            f"no cache of {WHAT[what]}s in a file can have the format '{text}'",
            expected="i8 or i4, with one fixed scale for each channel (/ch)",
            found=str(text),
            next_step=f"kv={'i4' if fmt.bits <= 4 else 'i8'!r}; other formats: qfx.QuantizedCache, in a live model",
        )
    )


def need_data(kv: object) -> ValueError:
    """For a quantized cache without data."""
    return ValueError(
        explain(
            f"kv={kv!r} needs calibration data: the scales of a cache are fixed in the file",
            expected="data=: batches of token ids, as the model will read them",
            found="None",
            next_step="data=qfx.data.text_batches(tokenizer, texts), or on the command line --data FILE",
        )
    )


def cache_scales(model: nn.Module, data: Iterable[Any], formats: Mapping[str, Format]) -> list[dict[str, Tensor]]:
    """For each layer {"key": f32 [G, D], "value": f32 [G, D]}: scales of what the model itself caches on the data.

    Tokens that the attention mask leaves out do not count. The first SAMPLES sequences of the data are read.
    Raises ValueError where the data is none, or gives values that are not finite.
    """
    found: list[dict[str, Observer]] = []
    heads: list[int] = []
    for call in batches.calls(model, data, SAMPLES):
        layers, kept = _cached(model, call)
        for i, layer in enumerate(layers):
            if i == len(found):
                heads.append(int(layer.keys.shape[1]))
                found.append({role: _observer(formats[what], f"layer {i}, {role}s") for what, role in WHAT.items()})
            for role, observer in found[i].items():
                observer.update(_rows(getattr(layer, f"{role}s"), kept))
    return [
        {role: layer[role].qparams(formats[what]).scale.reshape(count, -1) for what, role in WHAT.items()}
        for layer, count in zip(found, heads, strict=True)
    ]


def _observer(fmt: Format, name: str) -> Observer:
    return observers.create(_OBSERVER[fmt.type], fmt, name=name)


def _cached(model: nn.Module, call: Call) -> tuple[list[Any], Attended]:
    """The layers of the cache after a call, and the call's positions that are no padding."""
    from transformers import DynamicCache

    signature = inspect.signature(model.forward)
    bound = signature.bind(*call[0], **call[1]).arguments
    given = {name: value for name, value in bound.items() if name not in ("labels", "use_cache")}
    for name in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD and n in given]:
        given |= given.pop(name)
    if "logits_to_keep" in signature.parameters:
        given["logits_to_keep"] = 1
    with torch.no_grad():
        found = model(**{**given, "past_key_values": DynamicCache(), "use_cache": True})
    return list(found.past_key_values.layers), attended(list(given), list(given.values()))


def _rows(cached: Tensor, kept: Attended) -> Tensor:
    """[B, G, S, D] as [tokens, G * D], without the tokens that are padding."""
    rows = without(cached.detach().transpose(1, 2).flatten(2), kept)
    return rows if rows.dim() == 2 else rows.flatten(0, 1)
