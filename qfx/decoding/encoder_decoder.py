"""Encoder-decoders with a cache as two graphs: the encoder with the cross-attention's keys and values, the decoder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx import data as batches
from qfx import graph
from qfx.capture import Captured, capture_export
from qfx.decoding.decoder import PAST, PRESENT, Part, of_any_length
from qfx.errors import Note, UnsupportedError, explain
from qfx.hf.hub import write_configs
from qfx.inputs import example_inputs, need_inputs
from qfx.other_sizes import fixed_sizes, other_sizes
from qfx.passes.masks import NATURAL
from qfx.storage.files import sha256_file, write_text

ENCODER, DECODER, DOCUMENT = "encoder.onnx", "model.onnx", "encoder_decoder.json"
IDS, MASK, POSITIONS = "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"
ENCODER_MASK = "encoder_attention_mask"  # the encoder's `attention_mask`, as the decoder's graph reads it
HIDDEN, CROSS = "last_hidden_state", "cross_key_values.{}.{}"
_LENGTH = 13  # of the encoder's example: no block divides it, so that attention in blocks is traced with its padding
_NEW, _OLD = 3, 5  # sizes of the decoder's example: different ones, none of them 1


@dataclass(frozen=True)
class Sizes:
    """(heads, head size) of each layer's cache of past and of cross-attention keys; the encoder's length and width.

    dtype: in which the model keeps them.
    """

    past: list[tuple[int, int]]
    cross: list[tuple[int, int]]
    length: int
    width: int
    dtype: torch.dtype = torch.float32


def is_encoder_decoder(model: nn.Module) -> bool:
    """Does the model write text from what an encoder reads, with transformers' `generate()`?"""
    generates = getattr(model, "can_generate", None)
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False) and generates and generates())


def own_generate(model: nn.Module) -> list[Note]:
    """A note where the model's class writes text in a way of its own, which an opened folder does not have."""
    from transformers import GenerationMixin
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    usual = (GenerationMixin.generate, WhisperGenerationMixin.generate)
    if getattr(type(model), "generate", None) in usual:
        return []
    reason = "its class has a generate() of its own; the opened folder has that of transformers' other models"
    return [Note(type(model).__name__, reason, "call the opened model step by step")]


def encoder_inputs(model: nn.Module, args: Any) -> dict[str, Tensor]:
    """Example inputs of the encoder by name, with an attention mask where the model takes one.

    args: as for qfx.export_onnx; what belongs to the decoder is left out. Raises ValueError where none is known.
    """
    accepted = inspect.signature(model.forward).parameters
    if args is None:
        found = example_inputs(model)
        if found is None:
            raise need_inputs(model)
        found = {name: value[:, :_LENGTH] if name == "input_ids" else value for name, value in found.items()}
    else:
        ((given, named),) = batches.calls(model, [args])
        found = {**dict(zip(accepted, given, strict=False)), **named}
    floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = {n: t for n, t in found.items() if isinstance(t, Tensor) and not n.startswith("decoder_")}
    inputs = {n: t.to(floats) if t.is_floating_point() else t for n, t in tensors.items()}
    main = main_input(model)
    if main not in inputs:
        raise ValueError(
            explain(
                f"the encoder's input {main!r} is needed",
                expected=f"args={{{main!r}: tensor}}, or None",
                found=", ".join(found) or "nothing",
            )
        )
    if "attention_mask" in accepted and "attention_mask" not in inputs:
        inputs["attention_mask"] = whole_mask(inputs[main], model.config)
    return inputs


def main_input(model: nn.Module) -> str:
    """The name of what the encoder reads."""
    return str(getattr(model, "main_input_name", "input_ids"))


def whole_mask(read: Tensor, config: Any) -> Tensor:
    """The mask int64 [B, T] that hides nothing of ids or samples [B, T], features [B, T, F] or spectra [B, F, T]."""
    spectrum = read.dim() == 3 and read.shape[1] == getattr(config, "num_mel_bins", None)
    return torch.ones(read.shape[0], read.shape[-1 if spectrum else 1], dtype=torch.int64)


class _Encoder(Part):
    """Of a whole call with one token only this is a result: the encoder's states, and what each layer keeps of them."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "input_ids" in inputs and "attention_mask" in inputs:
            torch._check(inputs["attention_mask"].shape[0] == inputs["input_ids"].shape[0])
            torch._check(inputs["attention_mask"].shape[1] == inputs["input_ids"].shape[1])
        batch = inputs[main_input(self._call[0])].shape[0]
        found = _call(self._call[0], torch.zeros(batch, 1, dtype=torch.int64), **inputs)
        results = {HIDDEN: found.encoder_last_hidden_state}
        for i, layer in enumerate(found.past_key_values.cross_attention_cache.layers):
            results |= {CROSS.format(i, "key"): layer.keys, CROSS.format(i, "value"): layer.values}
        return results


class _Decoder(Part):
    """The decoder, whose caches are arguments and, of its own tokens, results."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__(model)
        self._width = width

    def forward(
        self, decoder_input_ids: Tensor, decoder_attention_mask: Tensor, cross: dict[str, Tensor],
        past: dict[str, Tensor], encoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        from transformers import DynamicCache
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        _check_sizes(decoder_input_ids, decoder_attention_mask, past, cross, encoder_attention_mask)
        own, other = DynamicCache(), DynamicCache()
        for cache, given in ((own, past), (other, cross)):
            for i in range(len(given) // 2):
                cache.update(given[f"{i}_key"], given[f"{i}_value"], i)
        first = cross["0_key"]
        states = BaseModelOutput(last_hidden_state=first.new_zeros(first.shape[0], first.shape[2], self._width))
        more = {"attention_mask": encoder_attention_mask, POSITIONS: decoder_position_ids}
        found = _call(
            self._call[0],
            decoder_input_ids,
            encoder_outputs=states,  # only its sizes are read: keys and values are there already
            decoder_attention_mask=decoder_attention_mask,
            past_key_values=EncoderDecoderCache(own, other),
            **{name: tensor for name, tensor in more.items() if tensor is not None},
        )
        results = {"logits": found.logits}
        for i, layer in enumerate(found.past_key_values.self_attention_cache.layers):
            results |= {PRESENT.format(i, "key"): layer.keys, PRESENT.format(i, "value"): layer.values}
        return results


def _check_sizes(
    ids: Tensor, mask: Tensor, past: dict[str, Tensor], cross: dict[str, Tensor], encoder_mask: Tensor | None
) -> None:
    """Tell the tracer what is so in every call."""
    length = cross["0_key"].shape[2]
    torch._check(mask.shape[1] == past["0_key"].shape[2] + ids.shape[1])
    for tensor in (mask, *past.values(), *cross.values(), *(() if encoder_mask is None else (encoder_mask,))):
        torch._check(tensor.shape[0] == ids.shape[0])
    for tensor in cross.values():
        torch._check(tensor.shape[2] == length)
    for tensor in past.values():
        torch._check(tensor.shape[2] == past["0_key"].shape[2])


def _call(model: nn.Module, ids: Tensor, *, past_key_values: Any = None, **inputs: Any) -> Any:
    """The model's forward with a cache of its own kind."""
    from transformers import DynamicCache
    from transformers.cache_utils import EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if past_key_values is None else past_key_values
    return model.forward(**inputs, **{IDS: ids}, past_key_values=cache, use_cache=True)


def cache_sizes(model: nn.Module, inputs: Mapping[str, Tensor]) -> Sizes:
    """The sizes of the caches, found by a call with two tokens after the encoder's `inputs`.

    Raises UnsupportedError where the model keeps no such caches.
    """
    batch = inputs[main_input(model)].shape[0]
    with torch.no_grad():
        found = _call(model, torch.full((batch, 2), 3), **inputs)
    cache = getattr(found, "past_key_values", None)
    both = [getattr(cache, f"{kind}_attention_cache", None) for kind in ("self", "cross")]
    keys = [[getattr(layer, "keys", None) for layer in getattr(one, "layers", ())] for one in both]
    plain = all(isinstance(k, Tensor) and k.dim() == 4 for k in (*keys[0], *keys[1]))
    if not keys[0] or len(keys[0]) != len(keys[1]) or not plain:
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} keeps no plain caches of keys and values",
                expected="past_key_values with keys and values [B, H, S, D] of both attentions in every layer",
                found=type(cache).__name__,
                next_step="export it without a cache: give a path that ends in .onnx",
            )
        )
    past, cross = ([(int(k.shape[1]), int(k.shape[3])) for k in one if k is not None] for one in keys)
    first: Tensor = keys[1][0]  # type: ignore[assignment]
    return Sizes(past, cross, int(first.shape[2]), int(found.encoder_last_hidden_state.shape[-1]), first.dtype)


def capture_encoder(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Captured, dict[str, str], list[Note]]:
    """The encoder's graph, the names that its inputs have in a file, and notes about sizes for which it does not hold.

    Outputs: HIDDEN [B, T, C], then CROSS keys and values [B, H, T, D] of every decoder layer.
    """
    encoder, given = _Encoder(model), {"inputs": dict(inputs)}
    captured = _read_only(capture_export(encoder, (), given))
    kind = type(model).__name__
    notes = [*other_sizes(captured, encoder, (), given, kind), *fixed_sizes(captured, kind)]
    return captured, {f"inputs_{name}": name for name in inputs}, notes


def _read_only(captured: Captured) -> Captured:
    """Without what no output reads: all of the decoder but the keys and values of what the encoder gives."""
    nodes = captured.gm.graph.nodes
    read = graph.above(captured.gm.graph.output_node())
    placeholders = [n for n in nodes if n.op == "placeholder"]
    kept = tuple(i for i, n in zip(captured.inputs, placeholders, strict=True) if n in read)
    for node in [n for n in reversed(nodes) if n not in read]:
        captured.gm.graph.erase_node(node)
    captured.gm.recompile()
    return replace(captured, inputs=kept)


def capture_decoder(
    model: nn.Module, inputs: Mapping[str, Tensor], sizes: Sizes
) -> tuple[Captured, dict[str, str], list[str]]:
    """The decoder's graph, the names that its inputs have in a file, and its inputs that are caches of past tokens.

    Inputs: IDS [B, S], MASK [B, P + S], CROSS and PAST keys and values, ENCODER_MASK and POSITIONS [B, S] where the
    model reads them. Outputs: logits [B, S, V], PRESENT keys and values [B, H, P + S, D].
    """
    batch = inputs[main_input(model)].shape[0]
    example: dict[str, Any] = {
        IDS: torch.arange(batch * _NEW).reshape(batch, _NEW) % 5 + 3,
        MASK: torch.ones(batch, _OLD + _NEW, dtype=torch.int64),
        "cross": _zeros(batch, sizes.cross, sizes.length, sizes.dtype),
        "past": _zeros(batch, sizes.past, _OLD, sizes.dtype),
    }
    if "attention_mask" in inputs:
        example[ENCODER_MASK] = inputs["attention_mask"]
    if POSITIONS in inspect.signature(model.forward).parameters:
        example[POSITIONS] = torch.arange(_OLD, _OLD + _NEW).expand(batch, -1).contiguous()
    names = {
        f"{kind}_{i}_{what}": name.format(i, what)
        for kind, name in (("cross", CROSS), ("past", PAST))
        for i in range(len(sizes.past))
        for what in ("key", "value")
    }
    pasts = [name for name in names if name.startswith("past_")]
    captured = of_any_length(capture_export(_Decoder(model, sizes.width), (), example), model)
    for node in captured.gm.graph.find_nodes(op="placeholder"):
        if node.name == POSITIONS:
            node.meta[NATURAL] = True
    return captured, names, pasts


def _zeros(batch: int, sizes: list[tuple[int, int]], length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{i}_{what}": torch.zeros(batch, heads, length, width, dtype=dtype)
        for i, (heads, width) in enumerate(sizes)
        for what in ("key", "value")
    }


def write_document(model: nn.Module, folder: Path, unread: list[str]) -> None:
    """Write the configurations of the model and of its generation and, last, what makes the folder complete.

    unread: inputs that the model takes and never reads. Raises OSError where the disk does not take them.
    """
    write_configs(model, folder)
    document = {
        "main_input": main_input(model),
        "unread": unread,
        "sha256": {name: sha256_file(folder / name) for name in (ENCODER, DECODER)},
    }
    write_text(folder / DOCUMENT, json.dumps(document, indent=2) + "\n")


def read_document(folder: Path) -> dict[str, Any]:
    """The document of a folder whose two models are those that were written with it.

    Raises ValueError where it cannot be read or where a model was altered, FileNotFoundError where one is missing.
    """
    again = "copy the folder again, or export it anew: qfx.export_onnx(model, None, folder)"
    try:
        found: dict[str, Any] = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        known = {name: found["sha256"][name] for name in (ENCODER, DECODER)}
        found["main_input"], found["unread"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            explain(
                f"{folder} holds no encoder-decoder",
                expected=f"{DOCUMENT}, {ENCODER}, {DECODER} and config.json",
                found=str(error),
                next_step=again,
            )
        ) from error
    for name, sha256 in known.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}\n  next step: {again}")
        if (content := sha256_file(file)) != sha256:
            raise ValueError(
                explain(
                    f"{file} was altered, is cut short or is of another export ({file.stat().st_size} bytes)",
                    expected=f"sha256 {sha256}",
                    found=f"sha256 {content}",
                    next_step=again,
                )
            )
    return found
