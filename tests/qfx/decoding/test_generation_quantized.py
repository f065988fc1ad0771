"""Decoders with quantized caches: generate(), onnxruntime-genai, memory that grows in place, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qfx
import qfx.onnx
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import QfxWarning, UnsupportedError
from tests import tiny as tiny_model
from tests.backends.onnx.checks import sqnr
from tests.qfx.decoding.test_export import export
from tests.qfx.decoding.test_generation import by_genai
from tests.zoo import VOCAB, ZOO

ASSETS = Path(__file__).parents[2] / "assets"
QUICK = {"llama"}
DECODERS = ["gpt2", "bloom", "falcon", "llama", "mistral", "qwen3", "gemma2", "phi3", "mixtral"]
NAMES = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in DECODERS]


@cache
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()


@cache
def tokens() -> Tensor:
    """Held-out text, int64 [4096]."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_lm")
    text = (ASSETS / "eval.txt").read_text(encoding="utf-8")[:20_000]
    found: Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=4096).input_ids[0]
    return found


@pytest.fixture(scope="module", params=[pytest.param("i8", marks=pytest.mark.slow), "i4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param) / request.param
    qfx.export_onnx(
        tiny(), None, made, kv=request.param, data=list(tokens()[2048:].reshape(8, 1, 256)), all_logits=True
    )
    return made


def continued(folder: Path, ids: Tensor, prompt: int) -> Tensor:
    """Logits [1, S, V] of a prompt and then of token after token."""
    loaded: Any = qfx.onnx.load(folder)
    found = loaded(ids[:, :prompt])
    parts, state = [found.logits], found.past_key_values
    for end in range(prompt + 1, ids.shape[1] + 1):
        ones = torch.ones(1, end, dtype=torch.int64)
        parts.append(loaded(ids[:, end - 1 : end], ones, None, state).logits)
    return torch.cat(parts, 1)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence of the next token, in nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_close_to_the_float_cache_on_text(folder: Path) -> None:
    ids = tokens()[None, :192]
    with torch.no_grad():
        expected = tiny()(input_ids=ids).logits
    found = continued(folder, ids, 32)
    assert sqnr(expected[:, :32], found[:, :32]) > 80  # a prompt attends in float
    least, most = {"i8": (1e-6, 1e-3), "i4": (1e-3, 0.05)}[folder.name]
    assert least < divergence(expected[:, 32:], found[:, 32:]) < most


def test_a_second_prompt_reads_the_cache(folder: Path) -> None:
    ids = tokens()[None, :128]
    with torch.no_grad():
        expected = tiny()(input_ids=ids).logits
    loaded: Any = qfx.onnx.load(folder)
    state = loaded(ids[:, :64]).past_key_values
    found = loaded(ids[:, 64:], torch.ones(1, 128, dtype=torch.int64), None, state).logits
    assert state.get_seq_length() == 128
    assert divergence(expected[:, 64:], found) < {"i8": 1e-3, "i4": 0.05}[folder.name]
    other = loaded(ids[:, 64:]).logits  # a negative control: without the first prompt
    assert divergence(expected[:, 64:], other) > 0.1


def test_memory_of_the_cache(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    state = SharedCache(loaded._sizes, 64, loaded._dtypes)
    ids = tokens()[None, :10].repeat(2, 1)
    loaded(ids, None, None, state)
    memory = [*state.keys, *state.values]
    places = [t.data_ptr() for t in memory]
    bits = int(folder.name[1:])
    config = tiny().config
    assert sum(t.nbytes for t in memory) * 8 == bits * 2 * 2 * 256 * 2 * 32 * config.num_hidden_layers
    before = [t[:, :, :10].clone() for t in memory]
    loaded(torch.full((2, 1), 5), torch.ones(2, 11, dtype=torch.int64), None, state)
    assert [t.data_ptr() for t in (*state.keys, *state.values)] == places
    assert all(torch.equal(t[:, :, :10], b) for t, b in zip(memory, before, strict=True))
    assert all(bool(t[:, :, 10].any()) and not bool(t[:, :, 11:].any()) for t in memory)


def test_a_cache_that_outgrows_its_memory_is_kept(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    small, large = (SharedCache(loaded._sizes, room, loaded._dtypes) for room in (0, 1024))
    found = []
    for state in (small, large):
        loaded(tokens()[None, :255], None, None, state)
        ones = torch.ones(1, 258, dtype=torch.int64)
        found.append([loaded(torch.full((1, 1), 7), ones[:, :end], None, state).logits for end in (256, 257, 258)])
    assert small.keys[0].shape[2] == 512
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_crop_and_go_on(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    ids = tokens()[None, :40]
    state = loaded(ids).past_key_values
    state.crop(30)
    ones = torch.ones(1, 31, dtype=torch.int64)
    again = loaded(ids[:, 30:31], ones, None, state).logits
    straight = loaded(ids[:, 30:31], ones, None, loaded(ids[:, :30]).past_key_values).logits
    assert sqnr(straight, again) > 60


def test_padded_batches_and_beams(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    ids = tokens()[:20].reshape(2, 10).clone()
    mask = torch.ones_like(ids)
    mask[1, :4], ids[1, :4] = 0, 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2047}
    both = loaded.generate(input_ids=ids, attention_mask=mask, **options)
    alone = loaded.generate(input_ids=ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(both[1, 4:], alone[0])
    beams = loaded.generate(input_ids=ids, attention_mask=mask, **options, num_beams=3)
    assert beams.shape[0] == 2
    assert torch.equal(beams[:, :10], ids)


def test_onnxruntime_genai_writes_the_same_tokens(folder: Path) -> None:
    ids = tokens()[None, :12]
    loaded: Any = qfx.onnx.load(folder)
    expected = loaded.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=2047)
    for shared in (True, False):
        found = by_genai(folder, ids[0].tolist(), max_length=36, past_present_share_buffer=shared)
        assert found == expected[0].tolist()[: len(found)]
        assert len(found) > ids.shape[1]


def test_the_file_says_what_it_holds(folder: Path) -> None:
    formats = json.loads(qfx.onnx.check(folder / "model.onnx")["qfx.formats"])
    asked = {"k": f"{folder.name}/ch", "v": f"{folder.name}/ch"}
    assert [roles for roles in formats.values() if "k" in roles] == [asked] * tiny().config.num_hidden_layers
    kinds = {i.name: i.type.tensor_type.elem_type for i in onnx.load(str(folder / "model.onnx")).graph.input}
    caches = {kind for name, kind in kinds.items() if name.startswith("past_key_values")}
    assert caches == {onnx.TensorProto.INT8 if folder.name == "i8" else onnx.TensorProto.UINT8}


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("standard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(tmp_path: Path, name: str, runtime: str) -> None:
    model: Any = ZOO[name]()[0]
    ids = torch.randint(3, VOCAB - 1, (1, 12), generator=torch.Generator().manual_seed(1))
    written = export(model, tmp_path / "m", kv="i8", data=[ids], runtime=runtime, all_logits=True)
    assert written.shared_cache == (runtime == "onnxruntime")
    assert sum("k" in roles for roles in written.formats.values()) == model.config.num_hidden_layers
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert sqnr(expected, continued(tmp_path / "m", ids, 6)) > 25


def test_data_read_once_serves_recipe_and_cache(tmp_path: Path) -> None:
    model = tiny_model.build("llama")
    batches = ({"input_ids": torch.arange(3, 15).reshape(2, 6) + i, "use_cache": False} for i in range(2))
    written = qfx.export_onnx(model, None, tmp_path / "m", recipe="w8a8-static", kv="i8", data=batches)
    assert sum("k" in roles for roles in written.formats.values()) == model.config.num_hidden_layers


def test_refused(tmp_path: Path) -> None:
    model: Any = ZOO["llama"]()[0]
    data = [torch.arange(3, 15).reshape(2, 6)]
    with pytest.raises(ValueError, match="kv='i8' needs calibration data"):
        qfx.export_onnx(model, None, tmp_path / "m", kv="i8")
    with pytest.raises(ValueError, match="of different types"):
        qfx.export_onnx(model, None, tmp_path / "m", kv={"k": "i8", "v": "i4"}, data=data)
    with pytest.raises(ValueError, match="without a cache"):
        qfx.export_onnx(model, None, tmp_path / "m.onnx", kv="i8", data=data)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_stays_in_float_is_told(tmp_path: Path) -> None:
    model: Any = ZOO["llama"](attention="eager")[0]
    own = model.model.layers[0].self_attn.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        layer = kwargs["past_key_values"].layers[0]
        layer.keys = layer.keys * 2 / 2 + 0.0
        return found

    model.model.layers[0].self_attn.forward = doubled
    data = [torch.arange(3, 15).reshape(2, 6)]
    told = (r"past_key_values\.0: its cache stays in float", "grows by a copy for each token")
    with pytest.warns(QfxWarning, match=told[0]), pytest.warns(QfxWarning, match=told[1]):
        qfx.export_onnx(model, None, tmp_path / "m", kv="i8", data=data)
    with pytest.raises(UnsupportedError, match="stays in float"):
        qfx.export_onnx(model, None, tmp_path / "n", kv="i8", data=data, strict=True)
    ids = data[0][:1]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1:]
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    assert sqnr(expected, loaded(ids).logits) > 25
