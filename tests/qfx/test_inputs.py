"""qfx.inputs: example inputs of transformers models by what their class and configuration say."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.inputs import beside_tokens, example_inputs, need_inputs, without_cache
from tests.zoo import ZOO

EXPECTED: dict[str, dict[str, tuple[int, ...]]] = {
    "bert": {"input_ids": (2, 16)},
    "gpt2": {"input_ids": (2, 16)},
    "t5": {"input_ids": (2, 16), "decoder_input_ids": (2, 16)},
    "bart": {"input_ids": (2, 16), "decoder_input_ids": (2, 16)},
    "vit": {"pixel_values": (2, 3, 32, 32)},
    "clip": {"pixel_values": (2, 3, 32, 32), "input_ids": (2, 16)},
    "whisper": {"input_features": (2, 16, 40), "decoder_input_ids": (2, 16)},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_shapes(name: str) -> None:
    found = example_inputs(ZOO[name]()[0])
    assert found is not None
    assert {k: tuple(v.shape) for k, v in found.items() if k != "use_cache"} == EXPECTED[name]


@torch.no_grad()
@pytest.mark.parametrize("name", [*EXPECTED, "llama", "mixtral", "gemma2", "phi3", "bloom"])
def test_the_models_take_them(name: str) -> None:
    model, _ = ZOO[name]()
    found = example_inputs(model)
    assert found is not None
    model(**found)


def test_they_are_always_the_same_and_use_up_no_random_numbers() -> None:
    model, _ = ZOO["clip"]()
    state = torch.random.get_rng_state()
    first, second = example_inputs(model), example_inputs(model)
    assert first is not None and second is not None
    assert all(torch.equal(first[k], second[k]) for k in first if isinstance(first[k], torch.Tensor))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dtypes_follow_the_model() -> None:
    found = example_inputs(ZOO["clip"]()[0].to(torch.bfloat16))
    assert found is not None
    assert found["pixel_values"].dtype == torch.bfloat16 and found["input_ids"].dtype == torch.int64


def test_short_positions_and_small_vocabularies() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=5,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    found = example_inputs(model)
    assert found is not None and found["input_ids"].shape == (2, 5) and int(found["input_ids"].max()) < 4
    model(**found)


def test_configurations_without_positions_or_a_vocabulary_of_their_own() -> None:
    import transformers

    config = transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert config.max_position_embeddings == -1
    found = example_inputs(transformers.XLNetModel(config))
    assert found is not None and found["input_ids"].shape == (2, 16)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    hashed = transformers.CanineModel(transformers.CanineConfig(**sizes, num_hash_buckets=16))
    found = example_inputs(hashed)
    assert found is not None and found["input_ids"].shape == (2, 16)
    encoder = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    decoder = transformers.BertConfig(**sizes, vocab_size=5, is_decoder=True, add_cross_attention=True)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    found = example_inputs(pair := transformers.VisionEncoderDecoderModel(both).eval())
    assert found is not None and found["pixel_values"].shape == (2, 3, 16, 16)
    assert int(found["decoder_input_ids"].max()) < 5
    pair(**found)


def test_sound_models() -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    found = example_inputs(transformers.Wav2Vec2Model(config))
    assert found is not None and list(found) == ["input_values"] and found["input_values"].dim() == 2


class Cached(nn.Module):
    """Takes use_cache."""

    def forward(self, x: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        return x


def test_no_cache_is_asked_for_where_there_is_one() -> None:
    given: dict[str, Any] = {"x": 1, "use_cache": True}
    assert without_cache(Cached(), given) == {"x": 1, "use_cache": False} and given["use_cache"]
    assert without_cache(nn.Linear(1, 1), {"input": 1}) == {"input": 1}


def test_what_is_given_in_order_may_answer_for_the_cache() -> None:
    class Decoder(nn.Module):
        def forward(self, ids: Tensor, use_cache: bool = True, mask: Tensor | None = None) -> Tensor:
            return ids

    ids = torch.ones(1, 2)
    assert without_cache(Decoder(), {}, (ids,)) == {"use_cache": False}
    assert without_cache(Decoder(), {"mask": ids}, (ids, True)) == {"mask": ids}
    assert without_cache(nn.Linear(2, 2), {}, (ids,)) == {}


def test_a_forward_that_hands_use_cache_on_is_asked_for_none() -> None:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, vocab_size=40, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    )
    assert "use_cache" not in inspect.signature(model.forward).parameters
    assert without_cache(model, {})["use_cache"] is False
    assert "use_cache" not in without_cache(ZOO["vit"]()[0], {}), "it has no cache"


def test_other_models_are_not_guessed() -> None:
    assert example_inputs(nn.Linear(2, 2)) is None
    assert "data=[batch]" in str(need_inputs(nn.Linear(2, 2)))


def _small(kind: str) -> Any:
    import transformers as tf

    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images: Any = {"image_size": 16, "patch_size": 8}
    if kind == "encodec":
        return tf.EncodecModel(
            tf.EncodecConfig(num_filters=4, hidden_size=8, num_residual_layers=1, num_lstm_layers=1, codebook_size=8)
        )
    if kind == "spectrogram":
        config = tf.ASTConfig(**sizes, patch_size=8, max_length=24, num_mel_bins=16, frequency_stride=8, time_stride=8)
        return tf.ASTModel(config)
    if kind == "videomae":
        return tf.VideoMAEModel(tf.VideoMAEConfig(**sizes, **images, num_frames=4, tubelet_size=2))
    return tf.TimesformerModel(tf.TimesformerConfig(**sizes, **images, num_frames=3))


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("encodec", "input_values", (2, 1, 4000)),
        ("spectrogram", "input_values", (2, 24, 16)),
        ("videomae", "pixel_values", (2, 4, 3, 16, 16)),
        ("timesformer", "pixel_values", (2, 3, 3, 16, 16)),
    ],
)
@torch.no_grad()
def test_sound_and_videos_have_the_axes_that_the_configuration_tells(kind: str, name: str, shape: Any) -> None:
    model = _small(kind).eval()
    found = example_inputs(model)
    assert found is not None and tuple(found[name].shape) == shape
    model(**found)


def test_beside_tokens_lie_a_mask_and_types_where_there_are_several() -> None:
    found = {
        name: set(beside_tokens(ZOO[name]()[0], {"input_ids": torch.ones(2, 3)}))
        for name in ("bert", "distilbert", "gpt2")
    }
    assert found == {
        "bert": {"attention_mask", "token_type_ids"},
        "distilbert": {"attention_mask"},
        "gpt2": {"attention_mask"},
    }
    assert beside_tokens(ZOO["vit"]()[0], {"pixel_values": torch.ones(2, 3, 8, 8)}) == {}
