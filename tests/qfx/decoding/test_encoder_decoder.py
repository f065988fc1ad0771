"""The two graphs of an encoder-decoder under the model's own names, and the document of their folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
import qfx.onnx
from qfx.capture import Captured
from qfx.decoding import encoder_decoder as pair
from qfx.decoding.decoder import fuse_cache
from qfx.errors import UnsupportedError
from qfx.measuring.measure import sqnr_db
from qfx.pipeline import prepare
from tests.graphs import counts
from tests.zoo import HEADS, HIDDEN, LAYERS, ZOO


@cache
def bart() -> Any:
    return ZOO["bart"]()[0]


@cache
def inputs() -> dict[str, Tensor]:
    return pair.encoder_inputs(bart(), None)


@cache
def sizes() -> pair.Sizes:
    return pair.cache_sizes(bart(), inputs())


def weights(captured: Captured) -> set[str]:
    """The model's parameters that a graph reads."""
    own = {name for name, _ in (*bart().named_parameters(), *bart().named_buffers())}
    return {str(n.target) for n in captured.gm.graph.nodes if n.op == "get_attr"} & own


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_models_that_write_from_what_an_encoder_reads(name: str) -> None:
    assert pair.is_encoder_decoder(ZOO[name]()[0])


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_other_models(name: str) -> None:
    assert not pair.is_encoder_decoder(ZOO[name]()[0])
    assert not pair.is_encoder_decoder(nn.Linear(2, 2))


def test_a_model_without_a_head_does_not_write() -> None:
    assert not pair.is_encoder_decoder(bart().model)


def test_sizes_of_the_caches() -> None:
    head = (HEADS, HIDDEN // HEADS)
    assert sizes() == pair.Sizes([head] * LAYERS, [head] * LAYERS, inputs()["input_ids"].shape[1], HIDDEN)


def test_a_model_without_plain_caches() -> None:
    model: Any = ZOO["bart"]()[0]
    model.forward = lambda **_: SimpleNamespace(past_key_values=None)
    with pytest.raises(UnsupportedError, match="keeps no plain caches"):
        pair.cache_sizes(model, inputs())


def test_inputs_of_the_encoder() -> None:
    model = bart()
    assert set(inputs()) == {"input_ids", "attention_mask"}
    ids = torch.full((3, 4), 5)
    found = pair.encoder_inputs(model, {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False})
    assert set(found) == {"input_ids", "attention_mask"}
    assert torch.equal(found["attention_mask"], torch.ones_like(ids))
    assert torch.equal(pair.encoder_inputs(model, ids)["input_ids"], ids)
    given = torch.zeros_like(ids)
    assert pair.encoder_inputs(model, {"input_ids": ids, "attention_mask": given})["attention_mask"] is given
    with pytest.raises(ValueError, match="input 'input_ids' is needed"):
        pair.encoder_inputs(model, {"decoder_input_ids": ids})


@pytest.mark.parametrize(
    ("read", "length"), [((2, 7), 7), ((2, 7, 5), 7), ((2, 16, 9), 9)], ids=["ids", "features", "spectra"]
)
def test_a_mask_that_hides_nothing(read: tuple[int, ...], length: int) -> None:
    mask = pair.whole_mask(torch.zeros(read), SimpleNamespace(num_mel_bins=16))
    assert mask.shape == (2, length)
    assert mask.dtype == torch.int64
    assert bool(mask.all())


def test_the_encoder_holds_what_is_computed_once() -> None:
    captured, names, _ = pair.capture_encoder(bart(), inputs())
    assert names == {"inputs_input_ids": "input_ids", "inputs_attention_mask": "attention_mask"}
    keys = [pair.CROSS.format(i, what) for i in range(LAYERS) for what in ("key", "value")]
    assert captured.outputs == (pair.HIDDEN, *keys)
    found = weights(captured)
    assert "model.decoder.layers.1.encoder_attn.v_proj.weight" in found
    assert not [n for n in found if "decoder" in n and "encoder_attn.k" not in n and "encoder_attn.v" not in n]
    results: Any = captured.gm.graph.output_node().args[0]
    batch, heads, length, width = results[1].meta["val"].shape
    assert (heads, width) == (HEADS, HIDDEN // HEADS)
    assert not isinstance(batch, int)
    assert not isinstance(length, int)


def test_the_decoder_holds_the_rest_and_every_layer_is_fused() -> None:
    captured, names, pasts = pair.capture_decoder(bart(), inputs(), sizes())
    assert names["past_0_key"] == "past_key_values.0.key"
    assert names["cross_1_value"] == "cross_key_values.1.value"
    assert len(pasts) == 2 * LAYERS
    assert captured.outputs[:2] == ("logits", "present.0.key")
    found = weights(captured)
    assert not [n for n in found if n.startswith("model.encoder") or "encoder_attn.k" in n or "encoder_attn.v" in n]
    assert "model.decoder.layers.1.encoder_attn.q_proj.weight" in found
    prepare(captured.gm)
    assert fuse_cache(captured, pasts, total=pair.MASK, new=pair.IDS)
    assert counts(captured.gm)["cached_attention"] == LAYERS
    shapes = {n.name: n.meta["val"].shape for n in captured.gm.graph.nodes if n.op == "placeholder"}
    assert len({str(shape[0]) for shape in shapes.values()}) == 1  # one batch
    lengths = {str(shape[2]) for name, shape in shapes.items() if name.startswith("cross_")}
    assert lengths == {str(shapes[pair.ENCODER_MASK][1])}


def test_the_model_is_as_before() -> None:
    before = [(name, id(module)) for name, module in bart().named_modules()]
    pair.capture_encoder(bart(), inputs())
    assert [(name, id(module)) for name, module in bart().named_modules()] == before


def test_a_class_with_its_own_way_to_write_is_told() -> None:
    assert pair.own_generate(bart()) == []
    assert pair.own_generate(ZOO["whisper"]()[0]) == []

    class Own(type(bart())):  # type: ignore[misc]
        def generate(self) -> None: ...

    model = ZOO["bart"]()[0]
    model.__class__ = Own
    (note,) = pair.own_generate(model)
    assert note.node == "Own"
    assert "generate() of its own" in note.reason


def written(folder: Path) -> Path:
    for name in (pair.ENCODER, pair.DECODER):
        (folder / name).write_text(name)
    pair.write_document(bart(), folder, ["attention_mask"])
    return folder


def test_the_document(tmp_path: Path) -> None:
    found = pair.read_document(written(tmp_path))
    assert (found["main_input"], found["unread"]) == ("input_ids", ["attention_mask"])
    assert {"config.json", "generation_config.json"} < {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("name", [pair.ENCODER, pair.DECODER])
def test_models_of_another_export(tmp_path: Path, name: str) -> None:
    file = written(tmp_path) / name
    file.write_text("other")
    with pytest.raises(ValueError, match=rf"{name} was altered, is cut short or is of another export"):
        pair.read_document(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        pair.read_document(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"sha256": {}}), json.dumps({"sha256": None})])
def test_a_document_that_is_none(tmp_path: Path, text: str) -> None:
    (written(tmp_path) / pair.DOCUMENT).write_text(text)
    with pytest.raises(ValueError, match="holds no encoder-decoder"):
        pair.read_document(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_model_in_half_precision(tmp_path: Path, name: str) -> None:
    """Inputs in f32, as processors give them, meet a model in bf16; its files are in f32."""
    torch.manual_seed(0)
    model, given = ZOO[name]()
    model = model.to(torch.bfloat16)
    read = {n: t for n, t in given.items() if not n.startswith("decoder_")}
    assert pair.cache_sizes(model, pair.encoder_inputs(model, read)).dtype == torch.bfloat16
    with pytest.warns(qfx.QfxWarning, match="computed in float32"):
        qfx.export_onnx(model, read, tmp_path / "out")
    opened: Any = qfx.onnx.load(tmp_path / "out")
    ids = torch.tensor([[3, 4, 5]]).expand(next(iter(read.values())).shape[0], -1)
    found = opened(**read, decoder_input_ids=ids).logits
    with torch.no_grad():
        wanted = model.float()(**read, decoder_input_ids=ids).logits
    assert sqnr_db(wanted, found) > 45
