"""Quantizing while transformers loads gives what quantizing the loaded model gives, weight by weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import qfx
from qfx.errors import QfxWarning
from qfx.live.modules import QuantEmbedding, QuantLinear, quantized_parts
from tests.quantized import built, call
from tests.tiny import CLASSES, build, ids, logits
from tests.zoo import ZOO

Config = Any


def config(recipe: Any = "w4a16", **fields: Any) -> Config:
    return qfx.QfxConfig(recipe=recipe, **fields)


def check_equal(found: Any, wanted: Any) -> None:
    mine, its = found.state_dict(), wanted.state_dict()
    assert set(mine) == set(its) and all(torch.equal(mine[n], its[n]) for n in its)
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in its.items()}
    assert sorted(quantized_parts(found)) == sorted(quantized_parts(wanted)) != []
    assert shared(mine) == shared(its)


def shared(state: dict[str, torch.Tensor]) -> set[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            names.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("tied", "w4a16"),
        pytest.param("tied", "w8a8", marks=pytest.mark.slow),
        ("bert", "mixed"),
        pytest.param("t5", "w8a8", marks=pytest.mark.slow),
    ],
)
def test_as_if_loaded_first(kind: str, recipe: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path, max_shard_size="8KB")
    wanted = qfx.quantize(CLASSES[kind].from_pretrained(tmp_path), recipe)
    found, info = CLASSES[kind].from_pretrained(tmp_path, quantization_config=config(recipe), output_loading_info=True)
    assert not any(info.values()), info
    check_equal(found, wanted)
    assert torch.equal(logits(found), logits(wanted)) and not found.training
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(CLASSES[kind].from_pretrained(tmp_path / "again")), logits(wanted))


def test_in_half_precision_and_generate(tmp_path: Path) -> None:
    build("tied").save_pretrained(tmp_path)
    wanted = qfx.quantize(tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), "w4a16")
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config())
    check_equal(found, wanted)
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids())}
    assert torch.equal(found.generate(ids(), **settings), wanted.generate(ids(), **settings))  # type: ignore[operator]


def test_no_second_weight_is_float_while_one_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qfx.live.writeback import Writer

    build("llama").save_pretrained(tmp_path)
    float_bytes: list[int] = []
    original = Writer.arrived

    def arrived(self: Writer, *args: Any) -> None:
        held = {id(p): p.nbytes for p in self.model.parameters() if not p.is_meta and p.dim() > 1}
        float_bytes.append(sum(held.values()))
        original(self, *args)

    monkeypatch.setattr(Writer, "arrived", arrived)
    tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    assert len(float_bytes) == 9 and set(float_bytes) == {0}


def test_both_tied_tables_in_the_file(tmp_path: Path) -> None:
    build("tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = qfx.quantize(tf.AutoModelForCausalLM.from_pretrained(tmp_path), "w4a16")
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config()), wanted)
    save_file({**tensors, "lm_head.weight": -table}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    assert isinstance(found.lm_head, QuantLinear) and isinstance(found.get_input_embeddings(), QuantEmbedding)
    assert torch.allclose(found.lm_head.weight, -found.get_input_embeddings().weight, atol=0.05)


def test_a_new_head_is_quantized_like_the_rest(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    found, info = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config("w8a16"), output_loading_info=True
    )
    assert "classifier.weight" in info["missing_keys"] and isinstance(found.classifier, QuantLinear)
    assert found.classifier.weight.std() > 0 and torch.isfinite(logits(found)).all()


def test_ignored_names_stay_float(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(ignore=("lm_head",)))
    assert type(found.lm_head) is nn.Linear and isinstance(found.model.layers[0].mlp.up_proj, QuantLinear)
    assert torch.equal(found.lm_head.weight, build("llama").lm_head.weight)


def test_rewrites_wait_until_all_is_loaded_and_say_so(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    recipe = qfx.Recipe.parse("w8a8").override(name="folded", rewrites=("norm-fold",))
    reason = "quantized once all is loaded in float, since recipe 'folded' rewrites weights together"
    with pytest.warns(QfxWarning, match=reason):
        found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(recipe))
    check_equal(found, qfx.quantize(tf.AutoModelForCausalLM.from_pretrained(tmp_path), recipe))


def test_data_is_needed_before_anything_is_read(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    message = (
        r"recipe 'w8a8-static' needs calibration data(.|\n)*such as 'w8a8'(.|\n)*qfx\.quantize\(model, recipe, data="
    )
    with pytest.raises(ValueError, match=message):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config("w8a8-static"))


def test_a_bad_weight_is_named(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"up_proj.*(.|\n)*NaN"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())


def test_a_float_file_cut_short_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config())


def test_what_cannot_be_had_is_told_or_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    recipe = {"rules": [{"target": "linear", "w": "i8/ch"}, {"target": "*.no_such", "w": "i4/g32"}]}
    with pytest.warns(QfxWarning, match=r"'\*\.no_such': this target of the recipe matches no node"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(recipe))
    with pytest.raises(qfx.UnsupportedError, match="no_such"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(recipe, strict=True))
    nothing = {"rules": [{"target": "experts", "w": "i8/ch"}]}
    with pytest.raises(ValueError, match="gives no format to anything in LlamaForCausalLM"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(nothing))


def test_a_config_beside_a_quantized_folder_is_told(tmp_path: Path) -> None:
    qfx.quantize(build("llama"), "w8a8").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"already has a `quantization_config`"):
        found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config("w4a16"))
    assert found.lm_head.w_format == "i8/ch"


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str, tmp_path: Path) -> None:
    model: Any
    model, inputs = built(name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    attention = model.config._attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = qfx.quantize(type(model).from_pretrained(tmp_path, attn_implementation=attention), "w4a16")
        found = type(model).from_pretrained(tmp_path, attn_implementation=attention, quantization_config=config())
    check_equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(call(found, inputs), call(wanted, inputs), strict=True))
