"""The zoo: tiny random models of common architectures, each with example inputs.

    model, inputs = ZOO["bert"]()                        # eval mode, seeded; call model(**inputs)
    model, inputs = ZOO["llama"](attention="eager")      # spelled-out attention

Norm weights and biases are random too, so that a rewrite which forgets one of them changes the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers as tf
from torch import Tensor, nn

Inputs = dict[str, Any]
Spec = tuple[type[nn.Module], Any, Inputs]

VOCAB, HIDDEN, WIDE, LAYERS, HEADS, POSITIONS = 128, 64, 96, 2, 4, 32
BATCH, LENGTH = 2, 7


class Builder(Protocol):
    """Builds a model and its example inputs; `attention` is "sdpa" or "eager" (bloom and gptj only have "eager")."""

    def __call__(self, *, attention: str | None = None, seed: int = 0) -> tuple[nn.Module, Inputs]: ...


def randomize(model: nn.Module, seed: int) -> None:
    """Fill every floating parameter with seeded values: matrices scaled by their fan-in, vectors moved by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise * 0.2)


def ids(length: int = LENGTH, seed: int = 1) -> Tensor:
    """Token ids [BATCH, length], int64, that avoid the lowest ones (padding, end of text)."""
    return torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal f32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _builder(spec: Callable[[], Spec]) -> Builder:
    def build(*, attention: str | None = None, seed: int = 0) -> tuple[nn.Module, Inputs]:
        kind, config, inputs = spec()
        if attention is not None:
            config._attn_implementation = attention
        torch.manual_seed(seed)
        model = kind(config).eval()
        randomize(model, seed)
        return model, inputs

    return build


def _encoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }


def _decoder_sizes() -> dict[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**_encoder_sizes(), **special, "num_key_value_heads": 2}


def _masked() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -2:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def _causal() -> Inputs:
    return {"input_ids": ids(), "use_cache": False}


def _bert() -> Spec:
    return tf.BertModel, tf.BertConfig(**_encoder_sizes()), _masked()


def _roberta() -> Spec:
    config = tf.RobertaConfig(**_encoder_sizes(), pad_token_id=1)
    return tf.RobertaForSequenceClassification, config, _masked()


def _distilbert() -> Spec:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, hidden_dim=WIDE, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=POSITIONS
    )
    return tf.DistilBertForMaskedLM, config, _masked()


def _electra() -> Spec:
    return tf.ElectraModel, tf.ElectraConfig(**_encoder_sizes(), embedding_size=32), _masked()


def _gpt2() -> Spec:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPT2LMHeadModel, config, _causal()


def _opt() -> Spec:
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=HIDDEN,
    )
    return tf.OPTForCausalLM, config, _causal()


def _gpt_neox() -> Spec:
    config = tf.GPTNeoXConfig(**_encoder_sizes(), bos_token_id=1, eos_token_id=2)
    return tf.GPTNeoXForCausalLM, config, _causal()


def _gptj() -> Spec:
    config = tf.GPTJConfig(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        rotary_dim=8,
        n_inner=WIDE,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPTJForCausalLM, config, _causal()


def _bloom() -> Spec:
    config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    return tf.BloomForCausalLM, config, _causal()


def _falcon() -> Spec:
    config = tf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.FalconForCausalLM, config, _causal()


def _llama() -> Spec:
    return tf.LlamaForCausalLM, tf.LlamaConfig(**_decoder_sizes()), _causal()


def _mistral() -> Spec:
    return tf.MistralForCausalLM, tf.MistralConfig(**_decoder_sizes(), sliding_window=4), _causal()


def _qwen3() -> Spec:
    return tf.Qwen3ForCausalLM, tf.Qwen3Config(**_decoder_sizes(), head_dim=16), _causal()


def _gemma3() -> Spec:
    config = tf.Gemma3TextConfig(
        **_decoder_sizes(),
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return tf.Gemma3ForCausalLM, config, _causal()


def _gemma2() -> Spec:
    config = tf.Gemma2Config(**_decoder_sizes(), head_dim=16, sliding_window=4, query_pre_attn_scalar=16)
    config._attn_implementation = "eager"  # only the spelled-out attention has the soft cap
    return tf.Gemma2ForCausalLM, config, _causal()


def _phi3() -> Spec:
    return tf.Phi3ForCausalLM, tf.Phi3Config(**_decoder_sizes()), _causal()


def _olmo2() -> Spec:
    return tf.Olmo2ForCausalLM, tf.Olmo2Config(**_decoder_sizes()), _causal()


def _mixtral() -> Spec:
    config = tf.MixtralConfig(**_decoder_sizes(), num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM, config, _causal()


def _qwen3_moe() -> Spec:
    config = tf.Qwen3MoeConfig(
        **_decoder_sizes(), head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    )
    return tf.Qwen3MoeForCausalLM, config, _causal()


def _gpt_oss() -> Spec:
    config = tf.GptOssConfig(
        **_decoder_sizes(),
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"  # attention sinks
    return tf.GptOssForCausalLM, config, _causal()


def _t5() -> Spec:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=WIDE,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    inputs = {**_masked(), "decoder_input_ids": ids(5, seed=3), "use_cache": False}
    return tf.T5ForConditionalGeneration, config, inputs


def _bart() -> Spec:
    config = tf.BartConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=WIDE,
        decoder_ffn_dim=WIDE,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    inputs = {**_masked(), "decoder_input_ids": ids(5, seed=3), "use_cache": False}
    return tf.BartForConditionalGeneration, config, inputs


def _vit() -> Spec:
    config = tf.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return tf.ViTForImageClassification, config, {"pixel_values": noise(BATCH, 3, 32, 32)}


def _whisper() -> Spec:
    config = tf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=16,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=WIDE,
        decoder_ffn_dim=WIDE,
        max_source_positions=20,
        max_target_positions=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    inputs = {"input_features": noise(BATCH, 16, 40), "decoder_input_ids": ids(5, seed=3), "use_cache": False}
    return tf.WhisperForConditionalGeneration, config, inputs


def _clip() -> Spec:
    text = {**_encoder_sizes(), "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return tf.CLIPModel, config, {**_masked(), "pixel_values": noise(BATCH, 3, 32, 32)}


ZOO: dict[str, Builder] = {
    "bert": _builder(_bert),
    "roberta": _builder(_roberta),
    "distilbert": _builder(_distilbert),
    "electra": _builder(_electra),
    "gpt2": _builder(_gpt2),
    "opt": _builder(_opt),
    "gpt_neox": _builder(_gpt_neox),
    "gptj": _builder(_gptj),
    "bloom": _builder(_bloom),
    "falcon": _builder(_falcon),
    "llama": _builder(_llama),
    "mistral": _builder(_mistral),
    "qwen3": _builder(_qwen3),
    "gemma2": _builder(_gemma2),
    "gemma3": _builder(_gemma3),
    "phi3": _builder(_phi3),
    "olmo2": _builder(_olmo2),
    "mixtral": _builder(_mixtral),
    "qwen3_moe": _builder(_qwen3_moe),
    "gpt_oss": _builder(_gpt_oss),
    "t5": _builder(_t5),
    "bart": _builder(_bart),
    "vit": _builder(_vit),
    "whisper": _builder(_whisper),
    "clip": _builder(_clip),
}
