"""Writing checkpoints: what goes in float and is told, ties, shards, tokenizer, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.format import Format
from qfx.interop import write as _write  # noqa: F401  (its module is patched below)
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantEmbedding, QuantLinear
from qfx.live.parameters import pack_parameter
from qfx.live.segments import segments
from qfx.packing import pack_weight
from tests.interop import UP, linears, llama, logits, pack, same, stored

export = qfx.export_compressed_tensors


def table(model: Any, fmt: str = "i8/ch") -> None:
    """Quantize the embedding."""
    old = model.model.embed_tokens
    model.model.embed_tokens = QuantEmbedding(pack_weight(old.weight, Format.parse(fmt)), old.padding_idx)


def test_quantized_embeddings_are_written_in_float(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    table(model)
    with pytest.warns(QfxWarning, match="model.embed_tokens: .*do not hold a quantized embedding: written in float"):
        export(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert torch.equal(found.get_submodule("model.embed_tokens").weight, model.model.embed_tokens.weight)  # type: ignore[arg-type]
    assert torch.equal(logits(model), logits(found))
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        export(model, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("writer", [export, qfx.export_gptq, qfx.export_awq])
def test_a_bias_that_the_class_has_no_place_for_is_told(writer: Any, tmp_path: Path) -> None:
    """As bias correction makes them: no loader would read it."""
    model = pack(llama(), "u4/g32/f16")
    up = model.get_submodule(UP)
    up.bias = nn.Parameter(torch.randn(up.out_features))
    with pytest.warns(QfxWarning, match=f"{UP}: it has a bias, and the layer of LlamaForCausalLM has none.*left out"):
        writer(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert not torch.allclose(logits(model), logits(found), rtol=1e-3)
    up.bias = None
    assert torch.equal(logits(model), logits(found))
    up.bias = nn.Parameter(torch.randn(up.out_features))
    with pytest.raises(UnsupportedError, match="it has a bias"):
        writer(model, tmp_path / "strict", strict=True)


def test_a_tied_table_is_written_once(tmp_path: Path) -> None:
    model = pack(llama(tied=True), "i4/g32")
    export(model, tmp_path / "float")
    table(model)
    held = model.model.embed_tokens
    packed = pack_weight(held.weight, Format.parse("i8/ch"))
    model.lm_head = QuantLinear(packed, None)
    model.model.embed_tokens = QuantEmbedding(packed, None)
    with pytest.warns(QfxWarning) as told:
        export(model, tmp_path / "packed")
    assert len(told) == 2 and "lm_head" in "".join(str(w.message) for w in told)
    for folder in ("float", "packed"):
        assert "lm_head.weight" not in stored(tmp_path / folder)
        found: Any = qfx.import_checkpoint(tmp_path / folder)
        assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.allclose(logits(qfx.import_checkpoint(tmp_path / "packed")), logits(model), atol=1e-5)


def test_a_head_of_its_own_format_is_untied(tmp_path: Path) -> None:
    model = pack(llama(tied=True), "i4/g32")
    model.lm_head = QuantLinear(pack_weight(model.lm_head.weight, Format.parse("i4/g32")), None)
    export(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight_packed" in stored(tmp_path) and "model.embed_tokens.weight" in stored(tmp_path)
    assert torch.equal(logits(qfx.import_checkpoint(tmp_path)), logits(model))
    with pytest.warns(QfxWarning, match="lm_head: GPTQ checkpoints keep the head in float"):
        qfx.export_gptq(pack_head(), tmp_path / "gptq")


def pack_head() -> Any:
    model = pack(llama(), "i4/g32/f16")
    model.lm_head = QuantLinear(pack_weight(model.lm_head.weight, Format.parse("i4/g32/f16")), None)
    return model


@pytest.mark.filterwarnings("ignore:.*scales are float16:qfx.QfxWarning")
@pytest.mark.parametrize("writer", [qfx.export_compressed_tensors, qfx.export_gptq, qfx.export_awq])
def test_smoothing_factors_go_into_the_float_weight(writer: Any, tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    module = linears(model)[UP]
    module.smooth = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    with pytest.warns(QfxWarning, match=f"{UP}: its input is divided by smoothing factors, which no layout holds"):
        writer(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert torch.allclose(found.get_submodule(UP).weight, module.weight / module.smooth)  # type: ignore[arg-type]
    assert torch.allclose(logits(model), logits(found), atol=2e-2 if writer is not export else 1e-5)


def test_rotations_and_factors_go_into_the_float_weight(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    first, second = linears(model)[UP], linears(model)["model.layers.1.mlp.up_proj"]
    first.rotation, first.smooth = (64, 3), torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    packed = pack_weight(second.weight, Format.parse("i4/g32"))
    low = (torch.randn(2, 64) * 0.1, torch.randn(96, 2) * 0.1)
    model.set_submodule("model.layers.1.mlp.up_proj", QuantLinear(packed, None, low=low))
    with (
        pytest.warns(QfxWarning, match=f"{UP}: its input is rotated while the model runs"),
        pytest.warns(QfxWarning, match="layers.1.mlp.up_proj: a low-rank part stands beside its weight"),
    ):
        export(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert len(linears(found)) == 12 and torch.allclose(logits(model), logits(found), atol=1e-5)


def test_weights_of_several_formats_are_written_in_float(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    weight = model.get_submodule(UP).weight
    formats = (Format.parse("i4/g32"), Format.parse("i8/ch"))
    found = segments(formats, weight.shape, UP)
    parts = [pack_weight(weight[:48], formats[0]), pack_weight(weight[48:], formats[1])]
    model.set_submodule(UP, QuantMixed(parts, found, 0, None))
    with pytest.warns(QfxWarning, match=f"{UP}: .*do not hold a weight of several formats"):
        export(model, tmp_path)
    assert torch.allclose(logits(model), logits(qfx.import_checkpoint(tmp_path)), atol=1e-5)


def test_packed_parameters_are_written_in_float(tmp_path: Path) -> None:
    """Experts that checkpoints of their class hold together. Others: test_experts."""
    from tests.zoo import ZOO

    model: Any
    model, inputs = ZOO["gpt_oss"]()
    pack(model, {"q_proj": "i4/g32"})
    for layer in model.model.layers:
        experts = layer.mlp.experts
        packed = pack_weight(experts.down_proj.transpose(1, 2), Format.parse("i8/ch"))
        pack_parameter(experts, "down_proj", packed, transposed=True)
    with pytest.warns(QfxWarning, match=r"experts.down_proj.* \(2 nodes\): .*a parameter that its module reads itself"):
        export(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(qfx.import_checkpoint(tmp_path)(**inputs).logits, model(**inputs).logits, atol=1e-5)


@pytest.mark.parametrize("writer", [qfx.export_gptq, qfx.export_bnb, qfx.export_compressed_tensors])
def test_conv1d_is_turned(writer: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    fmt = "nf4/g32" if writer is qfx.export_bnb else "i4/g32/f16"
    block = model.transformer.h[0]
    for owner, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc")):
        old = getattr(owner, name)
        setattr(owner, name, QuantLinear(pack_weight(old.weight.t(), Format.parse(fmt)), old.bias))
    if writer is qfx.export_compressed_tensors:
        with pytest.raises(ValueError, match=r"can hold none of the 3(.|\n)*not transformers' Conv1D"):
            writer(model, tmp_path)
        return
    writer(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert same(model, found) and torch.equal(logits(model), logits(found))


def test_conv1d_in_float_is_turned_back(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    block = model.transformer.h[0]
    for owner, name, fmt in ((block.attn, "c_proj", "nf4/g32"), (block.mlp, "c_fc", "i4/g32")):
        old = getattr(owner, name)
        setattr(owner, name, QuantLinear(pack_weight(old.weight.t(), Format.parse(fmt)), old.bias))
    with pytest.warns(QfxWarning, match="c_proj: GPTQ has no layout"), pytest.warns(QfxWarning, match="float16"):
        qfx.export_gptq(model, tmp_path)
    found: Any = qfx.import_checkpoint(tmp_path)
    assert torch.equal(found.transformer.h[0].attn.c_proj.weight, block.attn.c_proj.weight.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pack(llama(dtype=dtype), "i4/g32")
    export(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert same(model, found) and logits(found).dtype == dtype and torch.equal(logits(model), logits(found))
    assert logits(qfx.import_checkpoint(tmp_path, dtype=torch.float32)).dtype == torch.float32


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    export(model, tmp_path / "one")
    export(model, tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and {p.name for p in shards} == set(index["weight_map"].values())
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    held = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    one = stored(tmp_path / "one")
    assert held.keys() == one.keys() and all(torch.equal(held[name], one[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 20_000 or len(load_file(s)) == 1 for s in shards)
    assert torch.equal(logits(qfx.import_checkpoint(tmp_path / "many")), logits(model))


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    tokenizer.chat_template = "{{ messages }}"
    model = pack(llama(), "i4/g32")
    model.generation_config.max_new_tokens = 5
    export(model, tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == "{{ messages }}" and loaded("a").input_ids == [1]
    found: Any = qfx.import_checkpoint(tmp_path)
    assert found.generation_config.max_new_tokens == 5 and not hasattr(found.config, "quantization_config")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["qfx.interop.write"]
    model = pack(llama(), "i4/g32")
    export(model, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(module, "_refuse_leftovers", lambda *_: 1 / 0)
    for name in ("old", "new"):
        with pytest.raises(ZeroDivisionError):
            export(pack(llama(), "i8/ch"), tmp_path / name)
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_another_checkpoint_is_not_mixed_with(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    export(model, tmp_path, shard_bytes=20_000)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"holds the weights of another checkpoint(.|\n)*model-00001(.|\n)*empty folder"
    ):
        export(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    export(model, tmp_path, shard_bytes=20_000)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds nothing that qfx quantized(.|\n)*qfx.quantize"):
        export(llama(), tmp_path / "a")
    plain = nn.Sequential(QuantLinear(pack_weight(torch.randn(8, 32), Format.parse("i4/g32")), None))
    with pytest.raises(ValueError, match=r"Sequential has no config of transformers(.|\n)*qfx.save"):
        export(plain, tmp_path / "a")
    with pytest.raises(ValueError, match=r"can hold none of the 14 quantized linears(.|\n)*nf4/g32"):
        export(pack(llama(), "nf4/g32"), tmp_path / "a")
    model = pack(llama(), "i4/g32")
    model.model.register_buffer("signs", torch.ones(4))
    with pytest.raises(
        ValueError, match=r"holds 'model.signs', which no float LlamaForCausalLM has(.|\n)*online rotations"
    ):
        export(model, tmp_path / "a")
    with pytest.raises(ValueError, match="found shard_bytes=0"):
        export(pack(llama(), "i4/g32"), tmp_path / "a", shard_bytes=0)
    assert not (tmp_path / "a").exists()


def test_a_compiled_model_is_its_module(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    export(torch.compile(model, backend="eager"), tmp_path)  # type: ignore[arg-type]
    assert same(model, qfx.import_checkpoint(tmp_path))


def test_plain_formats_are_float_weights(tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "i4/g32", "q_proj": "bf16"})
    export(model, tmp_path, strict=True)
    found = qfx.import_checkpoint(tmp_path)
    assert len(linears(found)) == 2 and torch.allclose(logits(found), logits(model), atol=1e-5)
