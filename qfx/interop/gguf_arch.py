"""Architectures in GGUF: the names of tensors, the order of the rows of q and k, and the settings of the model.

Llama turns neighbouring pairs (0, 1), (2, 3), ... of a head in llama.cpp, and pairs (i, i + half) in transformers: the
rows of q and k are written in the other order (see `rows_of_pairs`). The other architectures turn as transformers does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfx.errors import UnsupportedError, explain

_DECODER_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BERT_TOP = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class Architecture:
    """name: in GGUF. kind: transformers' class. top, layer: GGUF stem -> module, of the model or of a layer.

    stack: the list of layers. pairs: the rows of q and k are in llama.cpp's order. activations: those it computes.
    biased: parts of a layer that may have a bias.
    """

    name: str
    kind: str
    model_types: tuple[str, ...]
    top: Mapping[str, str]
    layer: Mapping[str, str]
    stack: str
    pairs: bool
    activations: tuple[str, ...]
    biased: tuple[str, ...] = ()

    def modules(self, layers: int) -> dict[str, str]:
        """GGUF stem -> FQN of the module, of everything that a model of that many layers may have."""
        found = dict(self.top)
        for i in range(layers):
            found |= {f"blk.{i}.{stem}": f"{self.stack}.{i}.{module}" for stem, module in self.layer.items()}
        return found

    def heads(self, stem: str, config: Any) -> int:
        """Heads whose rows change their order, 0 where the rows of the tensor stay."""
        if not self.pairs:
            return 0
        part = stem.rpartition(".")[2]
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return {"attn_q": int(config.num_attention_heads), "attn_k": int(kv)}.get(part, 0)


_QKV = ("attn_q", "attn_k", "attn_v")
_LINEARS = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SILU = ("silu", "swish")
ARCHITECTURES = (
    Architecture(
        "llama", "LlamaForCausalLM", ("llama", "mistral"), _DECODER_TOP, _DECODER, "model.layers", True, _SILU, _LINEARS
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", ("qwen2",), _DECODER_TOP, _DECODER, "model.layers", False, _SILU, _QKV),
    Architecture(
        "qwen3", "Qwen3ForCausalLM", ("qwen3",), _DECODER_TOP, {**_DECODER, **_QK_NORM}, "model.layers", False, _SILU
    ),
    Architecture(
        "bert", "BertModel", ("bert",), _BERT_TOP, _BERT, "encoder.layer", False, ("gelu",), (*_BERT, "token_embd_norm")
    ),
)


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises UnsupportedError where GGUF has none, or it is another one."""
    kind = getattr(config, "model_type", None)
    for arch in ARCHITECTURES:
        if kind in arch.model_types:
            activation = getattr(config, "hidden_act", None)
            if activation not in arch.activations:
                raise _unlike(f"activation {activation!r}", f"{' or '.join(arch.activations)} of {arch.name}")
            return arch
    known = [t for arch in ARCHITECTURES for t in arch.model_types]
    raise _unlike(f"model type {kind!r}", ", ".join(known))


def architecture_named(name: str) -> Architecture:
    """The architecture of a file. Raises UnsupportedError where qfx does not know it."""
    for arch in ARCHITECTURES:
        if arch.name == name:
            return arch
    what = f"a GGUF file of architecture {name!r} cannot be read"
    raise UnsupportedError(explain(what, expected=", ".join(arch.name for arch in ARCHITECTURES)))


def rows_of_pairs(rows: int, heads: int) -> Tensor:
    """Order of transformers' rows in GGUF: element i of a head's first half, then i of its second. int64 [rows]."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def settings(arch: Architecture, config: Any) -> dict[str, Any]:
    """Metadata `<arch>.<key>` -> int, float, bool or str."""
    fields = _bert_settings(config) if arch.name == "bert" else _decoder_settings(config)
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    return {f"{arch.name}.{key}": value for key, value in (common | fields).items()}


def _decoder_settings(config: Any) -> dict[str, Any]:
    head_dim = head_dim_of(config)
    rope = dict(config.rope_parameters)
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _unlike(f"rotation of {rope['partial_rotary_factor']:g} of a head", "of the whole head")
    fields = {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        fields |= _yarn_settings(config)
    elif kind not in ("default", "llama3"):
        raise _unlike(f"rotary embedding {kind!r}", "default, linear, yarn or llama3")
    return fields


def _yarn_settings(config: Any) -> dict[str, Any]:
    """llama.cpp computes the frequencies from these alone, and scales sin and cos by `attn_factor` besides."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = dict(config.rope_parameters)
    original = said.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = float(said.get("factor") or config.max_position_embeddings / original)
    plain = copy.deepcopy(config)
    plain.rope_parameters = {
        "rope_type": "yarn", "rope_theta": said["rope_theta"], "factor": factor,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    own, known = (ROPE_INIT_FUNCTIONS["yarn"](each, torch.device("cpu")) for each in (config, plain))
    if not torch.allclose(own[0], known[0], rtol=1e-6, atol=0):
        found = ", ".join(f"{key}={said[key]}" for key in sorted(said.keys() - plain.rope_parameters.keys()))
        raise _unlike(f"yarn with {found}", "yarn with beta_fast=32, beta_slow=1, truncate=True")
    fields = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }  # fmt: skip
    return fields if own[1] == known[1] else {**fields, "rope.scaling.attn_factor": float(own[1] / known[1])}


def _bert_settings(config: Any) -> dict[str, Any]:
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise _unlike(f"positions {config.position_embedding_type!r}", "absolute")
    return {"attention.layer_norm_epsilon": float(config.layer_norm_eps), "attention.causal": False}


def head_dim_of(config: Any) -> int:
    """Values of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> Tensor | None:
    """What llama3's rotary embedding divides each frequency by, f32 [head_dim / 2]; None for other kinds."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return factors_of(rope, head_dim_of(config)) if rope.get("rope_type") == "llama3" else None


def factors_of(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Frequencies of long waves are divided by `factor`, those of short ones by 1, with a smooth change between."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = min(max((old / wave - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)


def _unlike(found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(explain("the model cannot be written as GGUF", expected=expected, found=found))
