"""Quantized models in transformers: what save_pretrained writes, from_pretrained reads, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import qfx
from qfx.hf.config import QfxConfig
from qfx.hf.quantizer import QfxHfQuantizer
from qfx.live.modules import QuantEmbedding, QuantLinear, quantized_parts
from tests.quantized import call, quantized
from tests.tiny import CLASSES, build, ids, logits
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
ASSET = Path(__file__).parents[2] / "assets" / "tiny_lm"


@cache
def made(kind: str, recipe: str = "w8a8") -> Any:
    """A quantized tiny model, not to be changed."""
    return qfx.quantize(build(kind), recipe)


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    shown = tf.utils.logging.is_progress_bar_enabled()
    tf.utils.logging.disable_progress_bar()
    yield
    if shown:
        tf.utils.logging.enable_progress_bar()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


QUICK = {  # each model, each writer, the tied one by all
    *(("tied", "w8a8", writer) for writer in ("save_pretrained", "shards", "qfx.save")),
    ("bert", "w8a8", "save_pretrained"),
    ("t5", "w4a16", "shards"),
}


@pytest.mark.parametrize(
    ("kind", "recipe", "writer"),
    [
        pytest.param(*model, writer, marks=[] if (*model, writer) in QUICK else pytest.mark.slow)
        for model in (("tied", "w8a8"), ("tied", "w4a16"), ("bert", "w8a8"), ("t5", "w4a16"))
        for writer in ("save_pretrained", "shards", "qfx.save")
    ],
)
def test_what_is_written_is_read_bit_for_bit(kind: str, recipe: str, writer: str, tmp_path: Path) -> None:
    model = made(kind, recipe)
    if writer == "qfx.save":
        qfx.save(model, tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="4KB" if writer == "shards" else "1GB")
    assert ("model.safetensors" in names(tmp_path)) == (writer != "shards")
    loaded, info = CLASSES[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    wanted = logits(model)
    both: list[Any] = [loaded, qfx.load(tmp_path)]
    for found in both:
        assert torch.equal(logits(found), wanted) and not found.training
        before, after = model.state_dict(), found.state_dict()
        assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
        assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
        assert quantized_parts(found) == quantized_parts(model)
        assert found.hf_quantizer.quantization_config.recipe.name == recipe
    assert isinstance(loaded.hf_quantizer, QfxHfQuantizer) and loaded.is_quantized


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="4KB"),
    "more shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="3KB"),
    "qfx.save": qfx.save,
    "qfx.save shards": lambda model, folder: qfx.save(model, folder, shard_bytes=4000),
}


@pytest.mark.parametrize("later", WRITERS)
@pytest.mark.parametrize("former", WRITERS)
def test_the_later_writer_wins(former: str, later: str, tmp_path: Path) -> None:
    """Whatever lies in the folder, both readers find what was saved last."""
    WRITERS[former](made("tied", "w4a16"), tmp_path)
    model = made("tied", "w8a8")
    WRITERS[later](model, tmp_path)
    both: list[Any] = [CLASSES["tied"].from_pretrained(tmp_path), qfx.load(tmp_path)]
    for found in both:
        assert torch.equal(logits(found), logits(model))
        quantizer: Any = found.hf_quantizer
        assert quantizer.quantization_config.recipe.name == "w8a8"
    if later.startswith("qfx"):
        weights = {name for name in names(tmp_path) if name.endswith(".safetensors")}
        assert weights <= set(json.loads((tmp_path / "qfx.json").read_text())["files"]), "others are removed"


def test_the_same_model_saved_both_ways_is_read(tmp_path: Path) -> None:
    model = made("tied")
    qfx.save(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qfx.load(tmp_path)), logits(model))
    (tmp_path / "model.safetensors").write_bytes(b"no file")
    with pytest.raises(ValueError, match="altered or is truncated"):
        qfx.load(tmp_path)


def test_tied_tables_are_one_again_and_stored_once(tmp_path: Path) -> None:
    made("tied", "w4a16").save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    table, head = loaded.get_input_embeddings(), loaded.lm_head
    assert isinstance(table, QuantEmbedding) and isinstance(head, QuantLinear)
    assert table.w_codes.data_ptr() == head.w_codes.data_ptr() and table.w_scale.data_ptr() == head.w_scale.data_ptr()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(again)), logits(made("tied", "w4a16")))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, again)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["tied", "bert", "t5"])
def test_tying_once_more_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Packed tables have no weight that transformers could tie; what is float still (BERT's bias) it ties."""
    wanted = logits(made(kind))
    live = copy.deepcopy(made(kind))
    live.save_pretrained(tmp_path)
    build(kind).save_pretrained(tmp_path / "float")
    loaded = [CLASSES[kind].from_pretrained(tmp_path), qfx.load(tmp_path)]
    loaded += [CLASSES[kind].from_pretrained(tmp_path / "float", quantization_config=QfxConfig(recipe="w8a8"))]
    for model in (live, *loaded):
        model.tie_weights()
        assert torch.equal(logits(model), wanted)
        if kind == "bert":
            assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_config_json_says_how(tmp_path: Path) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["architectures"] == ["LlamaForCausalLM"] and found["dtype"] == "float32"
    quantization = found["quantization_config"]
    assert quantization["quant_method"] == "qfx" and quantization["recipe"]["name"] == "w8a8"
    assert quantization["model"]["class"] == "LlamaForCausalLM"
    live = tf.AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config
    assert isinstance(live, QfxConfig) and live.model is None and "model" not in live.to_dict()


def test_generate_is_the_same(tmp_path: Path) -> None:
    model = made("tied", "w4a16")
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids())}
    assert torch.equal(loaded.generate(ids(), **settings), model.generate(ids(), **settings))


def test_the_base_model_of_a_language_model(tmp_path: Path) -> None:
    model = made("tied", "w4a16")
    model.save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert type(base) is tf.LlamaModel and isinstance(base.layers[0].mlp.up_proj, QuantLinear)
    assert torch.equal(logits(base), logits(model.model))
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(qfx.load(tmp_path / "base")), logits(model.model))


@pytest.mark.filterwarnings("error::qfx.QfxWarning")
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_the_base_model_of_a_rotated_language_model_is_told(kind: str, tmp_path: Path) -> None:
    made(kind, "w8a8-rotate").save_pretrained(tmp_path)
    tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(qfx.QfxWarning, match="LlamaModel: the recipe of the saved .* rotates states"):
        base = tf.AutoModel.from_pretrained(tmp_path)
    wanted = logits(build(kind).model)
    assert (logits(base) - wanted).norm() > wanted.norm()  # another basis
    assert any("rotates states" in note.reason for note in qfx.report(base).notes)
    direct: Any = build(kind).model
    with pytest.warns(qfx.QfxWarning, match="the residual stream cannot be rotated"):
        qfx.quantize(direct, "w8a8-rotate")
    assert (logits(direct) - wanted).norm() < 0.1 * wanted.norm()


def test_a_head_that_cannot_be_tied_to_the_packed_table_is_told(tmp_path: Path) -> None:
    base: Any = qfx.quantize(build("tied").model)
    base.save_pretrained(tmp_path)
    with pytest.warns(qfx.QfxWarning, match=r"lm_head: its weight is in no file, .* new and random.*LlamaForCausalLM"):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    (note,) = qfx.report(model).notes
    assert note.node == "lm_head" and note.next_step == "quantize and save the LlamaForCausalLM itself"


@pytest.mark.filterwarnings("error::qfx.QfxWarning")
def test_a_head_that_is_float_beside_a_packed_table_is_in_the_files(tmp_path: Path) -> None:
    live: Any = qfx.quantize(build("tied"), "w8a16", ignore=["lm_head"], rewrites=("untie",))
    assert type(live.lm_head) is torch.nn.Linear
    live.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(live))


def test_a_head_on_a_base_model_is_new_and_told(tmp_path: Path) -> None:
    base: Any = qfx.quantize(build("bert").bert)
    base.save_pretrained(tmp_path)
    found, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {"classifier.weight", "classifier.bias"} <= set(info["missing_keys"]) and not info["unexpected_keys"]
    assert torch.equal(logits(found.bert), logits(base)) and isinstance(found.classifier, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_that_of_the_activations(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("bert")
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    cast = copy.deepcopy(model).to(dtype)
    assert loaded.dtype == dtype and torch.equal(logits(loaded), logits(cast))
    mine, its = ({n: t.dtype for n, t in m.state_dict().items()} for m in (loaded, cast))
    assert mine == its
    loaded.save_pretrained(tmp_path / "half")
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype and torch.equal(logits(again), logits(cast))


def test_a_model_that_was_cast_comes_back(tmp_path: Path) -> None:
    model = copy.deepcopy(made("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    quantized("gemma3").model.save_pretrained(tmp_path)  # type: ignore[operator]
    before = torch.random.get_rng_state()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = quantized("gemma3")
    assert all(
        torch.equal(a, b) for a, b in zip(call(loaded, found.inputs), call(found.model, found.inputs), strict=True)
    )


def test_the_device_map_of_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    made("llama").save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(loaded), logits(made("llama")))


def test_a_model_without_quantized_parts_is_not_written_as_one(tmp_path: Path) -> None:
    model = build("llama")
    model.hf_quantizer = made("llama").hf_quantizer
    with pytest.raises(
        ValueError, match=r"marked as quantized by qfx, but holds nothing(.|\n)*remove model.hf_quantizer"
    ):
        model.save_pretrained(tmp_path)


def test_a_tokenizer_and_its_chat_template_go_along(tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(ASSET)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    qfx.save(made("llama"), tmp_path, tokenizer=tokenizer)
    found = tf.AutoTokenizer.from_pretrained(tmp_path)
    said = [{"role": "user", "content": "x = 1"}]
    assert found.apply_chat_template(said, tokenize=False) == "<user>x = 1"
    assert found("x = 1").input_ids == tokenizer("x = 1").input_ids
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(made("llama")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str, tmp_path: Path) -> None:
    found = quantized(name)
    model: Any = found.model
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    attention = model.config._attn_implementation
    loaded, info = type(model).from_pretrained(tmp_path, attn_implementation=attention, output_loading_info=True)
    assert not any(info.values()), info
    wanted = call(model, found.inputs)
    for one in (loaded, qfx.load(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(wanted, call(one, found.inputs), strict=True))
