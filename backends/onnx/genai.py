"""`genai_config.json`: what onnxruntime-genai and `qfx.onnx.load` must know of a decoder's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qfx.errors import explain
from qfx.hf.hub import write_configs
from qfx.storage.files import write_text

CONFIG = "genai_config.json"
# The types of onnxruntime-genai choose its loop, which is the same for all decoders of text; it refuses unknown names.
_TYPES = {
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
}
_LENGTH = 2048  # where the model tells none


def write_config(
    model: nn.Module, folder: Path, inputs: Sequence[str], caches: Sequence[tuple[int, int]], *, shared: bool
) -> None:
    """Write the configurations of the model and of its generation, and, last, that of onnxruntime-genai.

    caches: (key heads, head size) of each layer. shared: they grow where they lie. Raises OSError where the disk does
    not take them.
    """
    write_configs(model, folder)
    document = genai_config(model.config, inputs, caches, shared=shared)
    write_text(folder / CONFIG, json.dumps(document, indent=2) + "\n")


def genai_config(
    config: Any, inputs: Sequence[str], caches: Sequence[tuple[int, int]], *, shared: bool
) -> dict[str, Any]:
    """The document, from a configuration of transformers."""
    length = int(getattr(config, "max_position_embeddings", None) or _LENGTH)
    eos = getattr(config, "eos_token_id", None)
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = getattr(config, "pad_token_id", None)
    names = {name: name for name in inputs if not name.startswith("past_key_values")}
    names |= {f"past_{what}_names": f"past_key_values.%d.{what}" for what in ("key", "value")}
    outputs = {"logits": "logits", **{f"present_{what}_names": f"present.%d.{what}" for what in ("key", "value")}}
    heads, width = caches[0]
    decoder = {
        "session_options": {"log_id": "qfx", "provider_options": []},
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": int(config.hidden_size),
        "inputs": names,
        "outputs": outputs,
        "num_attention_heads": int(config.num_attention_heads),
        "num_hidden_layers": len(caches),
        "num_key_value_heads": heads,
    }
    kind = str(getattr(config, "model_type", ""))
    model = {
        "bos_token_id": getattr(config, "bos_token_id", None) or 0,
        "context_length": length,
        "decoder": decoder,
        "eos_token_id": eos if eos is not None else 0,
        "pad_token_id": pad if pad is not None else (first_eos or 0),
        "type": kind if kind in _TYPES else "llama",
        "vocab_size": int(config.vocab_size),
    }
    search = {"do_sample": False, "max_length": length, "num_beams": 1, "past_present_share_buffer": shared, "top_k": 1}
    return {"model": model, "search": search}


def read_config(folder: Path) -> dict[str, Any]:
    """The document of a folder. Raises ValueError where there is none that can be read."""
    file = folder / CONFIG
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            explain(
                f"{folder} holds no decoder",
                expected=f"{CONFIG}, model.onnx and config.json",
                found=str(error),
                next_step="export it anew: qfx.export_onnx(model, None, folder)",
            )
        ) from error
    return found
