"""llama.cpp by llama-cpp-python: the checkpoint as GGUF in float16, quantized by llama.cpp itself."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from torch import Tensor

from examples.benchmarks.peers.decoding import DecoderJob, built
from examples.benchmarks.peers.worker import Built

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class LlamaCpp:
    """llama.cpp's own cache, emptied by `reset`."""

    def __init__(self, llama: Any) -> None:
        self._llama, self._past = llama, 0

    def reset(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        self._past = 0

    def step(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after these tokens."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if code := llama_cpp.llama_decode(self._llama.ctx, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self._past += len(ids)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))


def build(job: DecoderJob, option: str) -> Built:
    """option: llama.cpp's name of the type."""
    path = job.path / f"{option}.gguf"
    if not path.exists():
        _quantize(_written(job), path, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{option}"))
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=job.context,
        n_batch=job.context,
        n_ubatch=512,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        verbose=False,
    )
    return built(job, LlamaCpp(llama), path.stat().st_size, llama_cpp.__version__)


def _quantize(source: Path, path: Path, kind: int) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = kind, 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def _written(job: DecoderJob) -> Path:
    """The checkpoint as GGUF, without a vocabulary: tokens go in and come out as numbers."""
    path = job.path / "float16.gguf"
    if path.exists():
        return path
    model: Any = job.module()
    config, part = model.config, path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(_name(name), _values(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(path)


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def _values(name: str, tensor: Tensor, config: Any) -> np.ndarray:
    """float16 matrices, float32 norms; rows of q and k in the order of llama.cpp, which turns neighbouring pairs."""
    if tensor.dim() == 1:
        return tensor.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads:
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    return tensor.half().contiguous().numpy()
