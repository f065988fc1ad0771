"""The config of transformers that the metadata of a GGUF file describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qfx.errors import UnsupportedError, explain
from qfx.interop.gguf_arch import Architecture, factors_of
from qfx.storage.skeleton import read_by_transformers

_CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "bert": "BertConfig"}
_ORIGINALS = (8192, 4096, 2048, 16384, 32768)  # contexts before llama3's rotary embedding stretched them
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def config_of(
    fields: Mapping[str, Any], arch: Architecture, shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None = None
) -> Any:
    """A config of transformers. shapes: of the tensors by name. factors: `rope_freqs.weight`, where the file has it.

    Raises ValueError where the metadata lacks what the architecture needs, UnsupportedError for other rotations.
    """
    import transformers

    said = {key.removeprefix(f"{arch.name}."): value for key, value in fields.items()}
    tokens = fields.get("tokenizer.ggml.tokens")

    def need(key: str) -> Any:
        if key not in said:
            raise ValueError(
                explain(
                    "the metadata of the GGUF file is not complete",
                    expected=f"the key '{arch.name}.{key}'",
                    next_step="convert the model again",
                )
            )
        return said[key]

    common = {
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": need("attention.head_count"),
        "max_position_embeddings": need("context_length"),
        "vocab_size": said.get("vocab_size") or (len(tokens) if tokens else need("vocab_size")),
        "tie_word_embeddings": "output.weight" not in shapes,
        "architectures": [arch.kind],
    }
    ids = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in _IDS.items()}
    kind = getattr(transformers, _CLASSES[arch.name])
    options: dict[str, Any]
    if arch.name == "bert":
        types = shapes.get("token_types.weight", (2,))[0]
        epsilon = need("attention.layer_norm_epsilon")
        options = {"layer_norm_eps": _short(epsilon), "type_vocab_size": types}
        return _config(kind, {**common, **options, **_given(ids, "pad_token_id")})
    head_dim = said.get("attention.key_length") or common["hidden_size"] // common["num_attention_heads"]
    options = {
        "num_key_value_heads": said.get("attention.head_count_kv", common["num_attention_heads"]),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "head_dim": head_dim,
        "rope_parameters": _rope(said, head_dim, factors),
    }
    if arch.name == "llama":
        options |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    return _config(kind, {**common, **options, **_given(ids, *ids)})


def _config(kind: Any, fields: Mapping[str, Any]) -> Any:
    with read_by_transformers(f"a {kind.__name__} in the metadata"):
        return kind(**fields)


def _given(ids: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: ids[name] for name in names}


def _rope(said: Mapping[str, Any], head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _short(said.get("rope.freq_base", 10000.0)), "rope_type": "default"}
    kind, scaled = said.get("rope.scaling.type", "none"), float(said.get("rope.scaling.attn_factor", 1.0))
    if kind != "yarn" and scaled != 1.0:
        raise UnsupportedError(
            explain("the rotary embedding of the file is not known", expected="a scale of 1", found=f"{scaled:g}")
        )
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _short(said.get("rope.scaling.factor", 1.0))}
        if kind == "yarn" and "rope.scaling.original_context_length" in said:
            rope["original_max_position_embeddings"] = said["rope.scaling.original_context_length"]
        if kind == "yarn" and scaled != 1.0:  # beside what yarn's own factor gives
            rope["attention_factor"] = _short(scaled * (0.1 * math.log(max(rope["factor"], 1.0)) + 1.0))
    elif kind != "none":
        raise UnsupportedError(
            explain("the rotary embedding of the file is not known", expected="none, linear, yarn", found=kind)
        )
    return rope if factors is None else _from_factors(rope, head_dim, factors)


def _from_factors(rope: dict[str, Any], head_dim: int, factors: Tensor) -> dict[str, Any]:
    """The settings of llama3 that give these factors; the files do not say them."""
    for original in _ORIGINALS:
        tried = {
            **rope, "rope_type": "llama3", "factor": _short(float(factors.max())), "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": original,
        }  # fmt: skip
        if torch.allclose(factors_of(tried, head_dim), factors, rtol=1e-4):
            return tried
    raise UnsupportedError(
        explain(
            "the file has factors of its own for the rotary frequencies",
            expected="those of Llama 3.1 (low 1, high 4)",
            found=", ".join(f"{v:g}" for v in factors[-3:].tolist()),
        )
    )


def _short(value: float) -> float:
    """The shortest decimal number that is this one in float32: 1e-06, not 9.99999997e-07."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()[()]))
