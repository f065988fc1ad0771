"""Example inputs of a model, where the user gives none: from what its class and configuration say."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from qfx.errors import explain

_LENGTH = 16
GIVE_DATA = "pass data=[batch], a batch being a dict of keyword arguments, a tuple or a tensor"


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments for one small call of a Hugging Face model (by its main input and configuration), else None.

    Always the same values; no random number of the caller's is used up.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    accepted = inspect.signature(model.forward).parameters
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    if "pixel_values" in accepted:
        inputs["pixel_values"] = _pixels(config, random)
    if "input_features" in accepted:
        length = 2 * int(getattr(config, "max_source_positions", 1500))
        inputs["input_features"] = torch.randn(2, int(getattr(config, "num_mel_bins", 80)), length, generator=random)
    if "input_values" in accepted and main == "input_values":
        inputs["input_values"] = torch.randn(_sound(config), generator=random)
    for name in ("input_ids", "decoder_input_ids"):
        if name in accepted:
            inputs[name] = _ids(getattr(config, "text_config", config), random)
    placed = {name: v.to(device, dtype if v.is_floating_point() else v.dtype) for name, v in inputs.items()}
    return without_cache(model, placed) if inputs else None


def beside_tokens(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer gives beside the token ids, as far as the forward takes it: a file without it could be given
    neither padded texts nor pairs of them."""
    ids, accepted = inputs.get("input_ids"), inspect.signature(model.forward).parameters
    if ids is None:
        return {}
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in accepted else {}
    pairs = "token_type_ids" in accepted and int(getattr(model.config, "type_vocab_size", 0)) > 1
    return {**mask, **({"token_type_ids": torch.zeros_like(ids)} if pairs else {})}


def without_cache(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The inputs with use_cache=False where the forward takes it: a traced graph carries no cache.

    args: what is given in order beside them; an answer about the cache among them stands.
    """
    known = inspect.signature(model.forward).parameters
    if "use_cache" in list(known)[: len(args)]:
        return inputs
    if "use_cache" in known or (any(p.kind is p.VAR_KEYWORD for p in known.values()) and _generates(model)):
        return {**inputs, "use_cache": False}
    return inputs


def _generates(model: Any) -> bool:
    """Whether it is a transformers model that makes a cache unasked; some (LLaVA) hand use_cache on by **kwargs."""
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        return False
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    return bool(getattr(text, "use_cache", False))


def need_inputs(model: nn.Module) -> ValueError:
    """The error for a model that must be traced and of which no input is known."""
    return ValueError(
        explain(
            f"{type(model).__name__} must be traced, and no example of its inputs is known",
            next_step=GIVE_DATA,
        )
    )


def _ids(config: Any, random: torch.Generator) -> torch.Tensor:
    positions = getattr(config, "max_position_embeddings", None)
    length = min(_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _LENGTH  # XLNet says -1
    config = getattr(config, "decoder", config)  # of a model that is made of two
    known = getattr(config, "vocab_size", None)
    return torch.randint(3, max(4, min(1000, known)) if isinstance(known, int) else 4, (2, length), generator=random)


def _sound(config: Any) -> tuple[int, ...]:
    """Samples [B, T]; [B, channels, T] of codecs (EnCodec, Mimi), frames [B, T, mel] of spectrogram transformers."""
    channels, frames = getattr(config, "audio_channels", None), getattr(config, "max_length", None)
    if isinstance(channels, int):
        return 2, channels, 4000
    if isinstance(frames, int) and isinstance(getattr(config, "num_mel_bins", None), int):
        return 2, frames, config.num_mel_bins
    return 2, 4000


def _pixels(config: Any, random: torch.Generator) -> torch.Tensor:
    """Images [B, C, H, W], or videos [B, frames, C, H, W]."""
    vision = getattr(config, "vision_config", getattr(config, "encoder", config))
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    frames = getattr(config, "num_frames", None)  # of a video
    image = (int(getattr(vision, "num_channels", 3)), height, width)
    return torch.randn((2, frames, *image) if isinstance(frames, int) else (2, *image), generator=random)
