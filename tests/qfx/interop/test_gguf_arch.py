"""Names, orders of rows and settings of architectures."""

from __future__ import annotations

import pytest
import torch

from qfx.errors import UnsupportedError
from qfx.interop.gguf_arch import (
    ARCHITECTURES,
    architecture_named,
    architecture_of,
    factors_of,
    rope_factors,
    rows_of_pairs,
    settings,
)
from qfx.interop.gguf_config import config_of

transformers = pytest.importorskip("transformers", reason="configs are those of transformers: pip install qfx[hf]")
ROPE3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_names_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle: pip install qfx[interop]")
    for arch in ARCHITECTURES:
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
        known = {gguf.TENSOR_NAMES[t].format(bid=0) for t in gguf.MODEL_TENSORS[number]}
        assert set(arch.modules(1)) <= known
        mapping = gguf.get_tensor_name_map(number, 1)
        for stem, fqn in arch.modules(1).items():
            assert mapping.get_name(fqn) == stem, "the package's own table says the same"


def test_order_of_rows() -> None:
    assert rows_of_pairs(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    order = rows_of_pairs(96, 3)
    assert torch.equal(torch.arange(96)[order][torch.argsort(order)], torch.arange(96))


def test_factors_of_llama3() -> None:
    """Against transformers' own inverse frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=ROPE3)
    own, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / factors, own, rtol=1e-5, atol=0)
    assert float(factors.min()) == 1 and float(factors.max()) == 8
    assert rope_factors(transformers.LlamaConfig()) is None


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_configs_come_back(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, vocab_size=70,
        num_hidden_layers=3, intermediate_size=100, max_position_embeddings=99, rope_parameters=ROPE3,
    )  # fmt: skip
    arch = architecture_of(config)
    back = config_of(settings(arch, config), arch, {"output.weight": (70, 96)}, rope_factors(config))
    for name in (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size",
        "num_hidden_layers", "intermediate_size", "max_position_embeddings", "rope_parameters", "model_type",
    ):  # fmt: skip
        assert getattr(back, name) == getattr(config, name), name
    assert back.tie_word_embeddings is False
    assert config_of(settings(arch, config), arch, {}).tie_word_embeddings is True


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("more", [{"attention_factor": 0.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"beta_fast": 32}])
def test_scales_of_yarn_come_back(more: dict[str, float]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(num_hidden_layers=1, rope_parameters={**YARN, **more})
    arch = architecture_of(config)
    found = settings(arch, config)
    assert ("llama.rope.scaling.attn_factor" in found) is ("beta_fast" not in more)
    back = config_of(found, arch, {})
    own, read = (ROPE_INIT_FUNCTIONS["yarn"](each, torch.device("cpu")) for each in (config, back))
    assert torch.equal(own[0], read[0]) and read[1] == pytest.approx(own[1], rel=1e-6)


@pytest.mark.parametrize("more", [{"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}])
def test_frequencies_of_yarn_that_llama_cpp_does_not_compute(more: dict[str, float]) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, rope_parameters={**YARN, **more})
    with pytest.raises(UnsupportedError, match=rf"beta_fast=32, beta_slow=1.*\n  found: yarn with {next(iter(more))}="):
        settings(architecture_of(config), config)


def test_a_scale_beside_other_rotations_is_refused() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    arch = architecture_of(config)
    with pytest.raises(UnsupportedError, match=r"expected: a scale of 1\n  found: 0.5"):
        config_of(settings(arch, config) | {"llama.rope.scaling.attn_factor": 0.5}, arch, {})


def test_factors_that_no_settings_give() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    arch = architecture_of(config)
    factors = factors_of({**ROPE3, "low_freq_factor": 2.0}, 128)
    with pytest.raises(UnsupportedError, match=r"factors of its own for the rotary frequencies[\s\S]*found: 8, 8, 8"):
        config_of(settings(arch, config), arch, {}, factors)


def test_unknown_rotations_of_a_file() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    arch = architecture_of(config)
    fields = settings(arch, config) | {"llama.rope.scaling.type": "longrope"}
    with pytest.raises(UnsupportedError, match="expected: none, linear, yarn\n  found: longrope"):
        config_of(fields, arch, {})


def test_partial_rotations_and_other_positions() -> None:
    half = transformers.LlamaConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    with pytest.raises(UnsupportedError, match="found: rotation of 0.5 of a head"):
        settings(architecture_of(half), half)
    bert = transformers.BertConfig()
    bert.position_embedding_type = "relative_key"
    with pytest.raises(UnsupportedError, match="found: positions 'relative_key'"):
        settings(architecture_of(bert), bert)


def test_unknown_architectures() -> None:
    with pytest.raises(
        UnsupportedError, match="architecture 'gemma3' cannot be read\n  expected: llama, qwen2, qwen3, bert"
    ):
        architecture_named("gemma3")
    with pytest.raises(UnsupportedError, match="found: model type None"):
        architecture_of(object())
