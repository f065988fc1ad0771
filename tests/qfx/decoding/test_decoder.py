"""A causal model's graph with its cache as inputs and outputs, under the model's own names."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qfx
import qfx.onnx
from qfx import graph
from qfx.capture import Captured
from qfx.decoding.decoder import capture_decoder, fuse_cache, is_shared, quantize_cache, stored_sizes
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.pipeline import prepare
from tests.graphs import counts
from tests.qfx.kv.test_cache import latent
from tests.zoo import ZOO


def llama() -> Any:
    return ZOO["llama"]()[0]


def sizes_of(model: Any) -> list[tuple[int, int]]:
    """(key heads, size of a key) of each layer's cache, as its config has them."""
    config = model.config
    return [(config.num_key_value_heads, config.hidden_size // config.num_attention_heads)] * config.num_hidden_layers


@pytest.fixture(scope="module")
def whole() -> Any:
    """(model, names and identities of its modules before, the capture, its names); not to be changed."""
    model = llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    return model, before, *capture_decoder(model, last_only=True)


@pytest.fixture
def decoder(whole: Any) -> tuple[Any, Captured, dict[str, str]]:
    """(model, the capture, its names), the capture's graph to be changed."""
    model, _, captured, names = whole
    return model, dataclasses.replace(captured, gm=graph.copy(captured.gm)), names


def test_parameters_keep_the_models_names(whole: Any) -> None:
    model, _, captured, _ = whole
    targets = {str(n.target) for n in captured.gm.graph.nodes if n.op == "get_attr"}
    found = {name for name in targets if not name.startswith("lifted_tensor")}  # constants of the trace
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert found <= own
    assert {"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"} & found


def test_the_model_is_as_before(whole: Any) -> None:
    model, before, _, _ = whole
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_names_of_inputs_and_outputs(whole: Any) -> None:
    _, _, captured, names = whole
    placeholders = [n.name for n in captured.gm.graph.nodes if n.op == "placeholder"]
    assert placeholders[:3] == ["input_ids", "attention_mask", "position_ids"] or set(placeholders) >= set(names)
    assert names["past_0_key"] == "past_key_values.0.key"
    assert captured.outputs[:3] == ("logits", "present.0.key", "present.0.value")


@pytest.mark.parametrize("last_only", [True, False])
def test_logits_of_the_last_token_or_of_all(whole: Any, last_only: bool) -> None:
    captured = whole[2] if last_only else capture_decoder(llama(), last_only=False)[0]
    results: Any = captured.gm.graph.output_node().args[0]
    length = results[0].meta["val"].shape[1]
    assert isinstance(length, int) == last_only


def test_every_layer_is_fused(decoder: Any) -> None:
    model, captured, names = decoder
    assert not is_shared(captured, names)
    prepare(captured.gm)
    assert fuse_cache(captured, names)
    assert is_shared(captured, names)
    assert counts(captured.gm)["cached_attention"] == model.config.num_hidden_layers
    assert not [n for n in captured.gm.graph.nodes if graph.op_name(n) == "cat" and n.meta["val"].dim() == 4]


@pytest.mark.parametrize(("kv", "dtype"), [("i8", torch.int8), ("i4", torch.uint8)])
def test_caches_are_stored_in_the_format_asked_for(decoder: Any, kv: str, dtype: torch.dtype) -> None:
    model, captured, names = decoder
    prepare(captured.gm)
    fuse_cache(captured, names)
    fmt, sizes = Format.parse(f"{kv}/ch"), sizes_of(model)
    assert stored_sizes(captured, names) == sizes
    scales = [{what: torch.ones(size) for what in ("key", "value")} for size in sizes]
    assert not quantize_cache(captured, names, {"k": fmt, "v": fmt}, scales)
    inputs = [n for n in captured.gm.graph.nodes if n.op == "placeholder" and n.name in names]
    assert {n.meta["val"].dtype for n in inputs} == {dtype}
    assert stored_sizes(captured, names) == [(heads, width * fmt.bits // 8) for heads, width in sizes]
    assert is_shared(captured, names)


def test_caches_that_are_not_fused_are_told(decoder: Any) -> None:
    model, captured, names = decoder
    fmt = Format.parse("i8/ch")
    scales = [{what: torch.ones(size) for what in ("key", "value")} for size in sizes_of(model)]
    notes = quantize_cache(captured, names, {"k": fmt, "v": fmt}, scales)
    assert [note.node for note in notes] == [f"past_key_values.{i}" for i in range(len(names) // 2)]
    assert not any(note.minor for note in notes)


def test_heads_of_odd_size_have_no_pairs_of_codes(decoder: Any) -> None:
    _, captured, names = decoder
    fmt = Format.parse("i4/ch")
    with pytest.raises(ValueError, match=r"heads of even size\n  found: 15\n  next step: kv='i8'"):
        quantize_cache(captured, names, {"k": fmt, "v": fmt}, [{"key": torch.ones(2, 15), "value": torch.ones(2, 15)}])


@pytest.mark.slow
def test_keys_and_values_of_other_widths(tmp_path: Path) -> None:
    """Latent attention: a file with its cache, which more than attention reads: it stays in float, as is told."""
    model, tokens = latent(), torch.arange(3, 43).reshape(2, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        written = qfx.export_onnx(model, None, tmp_path / "m", kv="i8", data=[tokens], all_logits=True)
    assert [n.reason for n in written.notes if not n.minor] == [
        "its cache stays in float: more than attention reads it"
    ] * 2
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    first = loaded(tokens[:, :12])
    found = loaded(tokens[:, 12:], past_key_values=first.past_key_values).logits
    assert [x[0].shape[-1] for x in (first.past_key_values.keys, first.past_key_values.values)] == [16, 8]
    with torch.no_grad():
        assert torch.allclose(found, model(tokens).logits[:, 12:], atol=1e-4)


def test_an_encoder_has_no_cache() -> None:
    model: Any = ZOO["llama"]()[0]
    model.forward = lambda **_: torch.zeros(1)
    with pytest.raises(UnsupportedError, match="keeps no plain cache"):
        capture_decoder(model, last_only=True)


def _layer(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(keys=torch.zeros(1, 2, 2, 4), values=torch.zeros(1, 2, 2, 4), length=2, **more)


@pytest.mark.parametrize("more", [{"conv_states": {0: torch.zeros(1, 8, 4)}}, {"indexer_keys": torch.zeros(1, 2, 4)}])
def test_a_cache_with_more_than_keys_and_values_is_refused(more: dict[str, Any]) -> None:
    """Attention beside a recurrence in one layer (Falcon-H1): a file that kept keys and values alone would be wrong."""
    model: Any = ZOO["llama"]()[0]
    layers = [_layer(), _layer(**more)]
    model.forward = lambda **_: SimpleNamespace(past_key_values=SimpleNamespace(layers=layers))
    with pytest.raises(UnsupportedError, match=r"nothing else(.|\n)*of SimpleNamespace(.|\n)*ends in .onnx"):
        capture_decoder(model, last_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_model_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """The cache is captured in the model's dtype; in the file all is f32, as programs that feed it have it."""
    torch.manual_seed(0)
    model = llama().to(dtype)
    ids = torch.randint(3, model.config.vocab_size, (1, 9))
    with pytest.warns(qfx.QfxWarning, match="computed in float32"):
        written = qfx.export_onnx(model, None, tmp_path / "out", all_logits=True)
    assert written.shared_cache
    opened: Any = qfx.onnx.load(tmp_path / "out")
    assert opened._dtypes == [torch.float32] * len(opened._dtypes)
    first = opened(ids[:, :6])
    second = opened(ids[:, 6:], past_key_values=first.past_key_values)
    found = torch.cat((first.logits, second.logits), 1)
    with torch.no_grad():
        wanted = model.float()(ids).logits
    assert sqnr_db(wanted, found) > 60
