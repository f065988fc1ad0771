"""Decoders as folders: generate() of transformers, onnxruntime-genai, one memory for the cache."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, modeling_rope_utils

import qfx
import qfx.onnx
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import QfxWarning, UnsupportedError
from tests.backends.onnx.checks import sqnr
from tests.qfx.decoding.test_export import export
from tests.zoo import VOCAB, ZOO, ids, randomize

TINY = Path(__file__).parents[2] / "assets" / "tiny_lm"
DECODERS = [
    name
    for name in ZOO
    if name not in ("bert", "roberta", "distilbert", "electra", "t5", "bart", "vit", "whisper", "clip")
]
# RoPE by halves over whole heads is a kernel; parts of heads, pairs of neighbours and other tables are spelled out
ROTATED = {"falcon", "llama", "mistral", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "qwen3_moe"}
# ALiBi; grouped heads, soft-capped and sliding, by the kernel and spelled out
QUICK = {("bloom", "onnxruntime"), ("gemma2", "onnxruntime"), ("gemma2", "standard")}
BOTH = [
    pytest.param(name, runtime, marks=[] if (name, runtime) in QUICK else pytest.mark.slow)
    for name in DECODERS
    for runtime in ("onnxruntime", "standard")
]


@cache
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lm")
    export(tiny(), made, recipe="w8a8")
    return made


def prompt() -> dict[str, Tensor]:
    """Two prompts, the second shorter by four tokens and padded on the left."""
    ids = torch.randint(3, 2000, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], ids[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("name", "runtime"), BOTH)
def test_prefill_and_decode_are_one_graph(tmp_path: Path, name: str, runtime: str) -> None:
    model: Any = ZOO[name]()[0]
    written = export(model, tmp_path / "m", runtime=runtime, all_logits=True)
    kinds = [(node.op_type, node.domain) for node in onnx.load(str(written.path)).graph.node]
    assert written.shared_cache == (runtime == "onnxruntime")
    assert (("GroupQueryAttention", "com.microsoft") in kinds) == written.shared_cache
    turned = runtime == "onnxruntime" and name in ROTATED
    assert (("RotaryEmbedding", "com.microsoft") in kinds) == turned
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    ids = torch.randint(3, VOCAB - 1, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**given).logits
    found = loaded(ids[:, :6], mask[:, :6])
    parts, state = [found.logits], found.past_key_values
    for end in (7, 8, 10):  # one token each, then two at once
        found = loaded(ids[:, state.length : end], mask[:, :end], None, state)
        parts.append(found.logits)
    seen = mask.bool()
    assert sqnr(expected[seen], torch.cat(parts, 1)[seen]) > 100


def whole_and_in_parts(loaded: Any, ids: Tensor, mask: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Logits of all tokens, read up to each of `ends` in turn."""
    parts, state, start = [], None, 0
    for end in ends:
        found = loaded(ids[:, start:end], mask[:, :end], None, state)
        parts.append(found.logits)
        state, start = found.past_key_values, end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "llama" else pytest.mark.slow) for n in DECODERS])
def test_weight_only_decoders(tmp_path: Path, name: str) -> None:
    model: Any = ZOO[name]()[0]
    ids = torch.randint(3, VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    export(model, tmp_path / "m", recipe="w8a16", all_logits=True)
    export(model, tmp_path / "p", recipe="w8a16", all_logits=True, prefill="i8/tok")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        live = qfx.quantize(model, "w8a16")
    given: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = live(**given).logits[mask.bool()]
    for folder in ("m", "p"):  # 8-bit activations, per block or per token, in each of a few layers
        for ends in ((24,), (20, 21, 22, 24)):
            loaded: Any = qfx.onnx.load(tmp_path / folder)
            found = whole_and_in_parts(loaded, ids, mask, ends)[mask.bool()]
            assert sqnr(expected, found) > 20, (folder, ends)
            assert sqnr(expected, found.roll(1, 0)) < 10  # other tokens have other logits
            alone = whole_and_in_parts(loaded, ids[1:, 3:], mask[1:, 3:], (5, 15, 16, 21))
            assert sqnr(expected[-21:], alone[0]) > 20, (folder, "chunks of one sequence")


def test_projections_and_rope_are_one_kernel_each_with_attention(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(TINY, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    written = export(model, tmp_path / "m", recipe="w4a16")
    nodes = onnx.load(str(written.path)).graph.node
    layers = config.num_hidden_layers
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulNBits") == 4 * layers + 1  # q/k/v, o, gate/up, down; and the head
    assert kinds.count("GroupQueryAttention") == layers
    assert "RotaryEmbedding" not in kinds
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            assert {a.name: a.i for a in node.attribute}["do_rotary"] == 1
            assert list(node.input[1:3]) == ["", ""]


@pytest.mark.slow
def test_a_prompt_by_integers_costs_little(tmp_path: Path) -> None:
    tokens = prompt()["input_ids"][:1].repeat(1, 4)
    mask = torch.ones_like(tokens)
    found, one = [], []
    both: Any = (("m", {}), ("p", {"prefill": "i8/tok"}))
    for folder, options in both:
        export(tiny(), tmp_path / folder, recipe="w4a16", all_logits=True, **options)
        loaded: Any = qfx.onnx.load(tmp_path / folder)
        found.append(loaded(tokens, mask).logits)
        one.append(loaded(tokens[:, :1], mask[:, :1]).logits)
    assert sqnr(*found) > 25
    assert not torch.equal(*found)
    assert torch.equal(*one)


def test_generate_is_that_of_the_live_model(folder: Path) -> None:
    live: Any = qfx.quantize(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), "w8a8")
    loaded: Any = qfx.onnx.load(folder)
    assert loaded.main_input_name == "input_ids"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(live.generate(**prompt(), **options), loaded.generate(**prompt(), **options))
    beams = {**options, "num_beams": 3}
    assert torch.equal(live.generate(**prompt(), **beams), loaded.generate(**prompt(), **beams))


def test_sampling_follows_the_seed(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(loaded.generate(**prompt(), max_new_tokens=8, do_sample=True, pad_token_id=0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def by_genai(folder: Path, ids: list[int], **options: Any) -> list[int]:
    """A prompt and what onnxruntime-genai writes behind it."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, **options)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


def test_onnxruntime_genai_writes_the_same_tokens(folder: Path) -> None:
    ids = prompt()["input_ids"][:1]
    loaded: Any = qfx.onnx.load(folder)
    expected = loaded.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=-1)
    found = by_genai(folder, ids[0].tolist(), max_length=ids.shape[1] + 24)
    assert found == expected[0].tolist()[: len(found)]
    assert len(found) > ids.shape[1]


def test_the_cache_grows_where_it_lies(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    state = SharedCache(loaded._sizes, room=64)
    loaded(prompt()["input_ids"], prompt()["attention_mask"], None, state)
    places = [t.data_ptr() for t in (*state.keys, *state.values)]
    loaded(torch.full((2, 1), 5), torch.ones(2, 11, dtype=torch.int64), None, state)
    assert [t.data_ptr() for t in (*state.keys, *state.values)] == places
    assert state.length == 11
    assert all(bool((t[:, :, 10] != 0).any()) and not bool(t[:, :, 11:].any()) for t in state.keys)


def test_a_full_cache_is_moved_once_and_kept() -> None:
    state = SharedCache([(2, 4)], room=10)
    state.reserve(1, 5)
    room = state.keys[0].shape[2]
    state.keys[0][:, :, :5] = torch.arange(5.0)[:, None]
    state.length = 5
    state.reserve(1, room + 1)
    assert state.keys[0].shape[2] >= 2 * room
    assert torch.equal(state.keys[0][0, 0, :6, 0], torch.tensor([0.0, 1, 2, 3, 4, 0]))
    state.batch_repeat_interleave(3)
    state.keys[0][1] += 1
    state.reorder_cache(torch.tensor([1, 1, 0]))
    assert [float(k[0, 0, 0]) for k in state.keys[0]] == [1.0, 1.0, 0.0]
    state.crop(3)
    assert state.get_seq_length() == 3
    state.crop(-1)
    left = state.length
    state.crop(0)  # what assisted decoding asks for where every candidate was right
    assert state.length == left
    with pytest.raises(ValueError, match="at most"):
        state.crop(-left - 1)
    assert state.get_seq_length() == 2
    with pytest.raises(ValueError, match="of another batch"):
        state.reserve(2, 4)
    state.reset()
    assert state.get_seq_length() == 0


def test_only_the_last_logits_are_computed(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    assert loaded(prompt()["input_ids"]).logits.shape == (2, 1, 2048)


def test_no_float_copy_of_a_weight(folder: Path) -> None:
    weights = [
        t for t in onnx.load(str(folder / "model.onnx")).graph.initializer if len(t.dims) == 2 and min(t.dims) > 8
    ]
    assert weights
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    with pytest.raises(ValueError, match=r"expected: \[2, 10\]"):
        loaded(prompt()["input_ids"], torch.ones(2, 9))
    with pytest.raises(FileNotFoundError, match="there is no"):
        qfx.onnx.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no decoder"):
        qfx.onnx.load(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    whole = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        qfx.onnx.load(broken)
    (broken / "genai_config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match="holds no decoder"):
        qfx.onnx.load(broken)


def test_an_encoder_by_its_names(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8")
    loaded: Any = qfx.onnx.load(tmp_path / "m.onnx")
    assert set(loaded(**inputs)) == {"last_hidden_state", "pooler_output"}
    assert qfx.onnx.check(tmp_path / "m.onnx") == loaded.metadata
    for wrong in ({}, {**inputs, "more": torch.ones(1)}, {**inputs, "attention_mask": torch.ones(2, 5)}):
        with pytest.raises(ValueError, match="the inputs do not fit the file"):
            loaded(**wrong)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Any = torch.compile(ZOO["llama"]()[0])
    with pytest.raises(ValueError, match="is compiled"):
        qfx.export_onnx(compiled, None, tmp_path / "m")


def test_a_configuration_without_a_cache_hides_nothing(tmp_path: Path) -> None:
    """MPT's says use_cache=False: generate() uses the file's cache all the same, up to the longest text, or none."""
    import transformers

    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": VOCAB, "max_seq_len": 24, "expansion_ratio": 2}
    torch.manual_seed(0)
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes)).eval()
    assert model.generation_config.use_cache is False
    export(model, tmp_path)
    loaded: Any = qfx.onnx.load(tmp_path)
    for length, new in ((3, 5), (12, 12), (20, 4)):
        tokens = ids(length)
        asked = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": new, "do_sample": False}
        wanted = model.generate(tokens, **asked)
        assert torch.equal(loaded.generate(tokens, **asked), wanted)
        assert torch.equal(loaded.generate(tokens, **asked, use_cache=False), wanted)
    assert loaded(ids(3), use_cache=False).past_key_values is None


CHOSEN = "torch.where(seq_len" in inspect.getsource(modeling_rope_utils)


@pytest.mark.skipif(not CHOSEN, reason="this transformers chooses by `if`, of which torch.export makes no graph")
@pytest.mark.parametrize("tokens", [31, pytest.param(32, marks=pytest.mark.slow), 33])
def test_rope_that_is_chosen_by_the_length(tmp_path: Path, tokens: int) -> None:
    """LongRoPE (Phi-3, Phi-4 mini) has other frequencies beyond the length of the first training, here 32."""
    import transformers

    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 7.0, 11.0],
    }  # fmt: skip
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    randomize(model, 0)
    export(model, tmp_path, all_logits=True)
    loaded: Any = qfx.onnx.load(tmp_path)
    with torch.no_grad():
        assert sqnr(model(ids(tokens)).logits, loaded(ids(tokens)).logits) > 100


def written_by(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    tokens: Tensor = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    return tokens


def test_generate_without_a_cache_writes_the_same(folder: Path) -> None:
    """Each step gives the whole text: a cache that was kept all the same would hold it twice."""
    loaded: Any = qfx.onnx.load(folder)
    wanted = written_by(loaded, prompt())
    assert torch.equal(written_by(loaded, prompt(), use_cache=False), wanted)
    assert torch.equal(
        written_by(loaded, prompt(), use_cache=False, num_beams=2), written_by(loaded, prompt(), num_beams=2)
    )
    loaded.generation_config.use_cache = False  # as models have it that were trained with gradient checkpointing
    assert torch.equal(written_by(loaded, prompt()), wanted)
    assert loaded(**prompt(), use_cache=False).past_key_values is None
    assert loaded(**prompt()).past_key_values.length == 10


def test_a_cache_of_transformers_own_is_not_promised(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    with pytest.warns(QfxWarning, match="cache_implementation='quantized' has no effect.*next step: leave it out"):
        found = written_by(loaded, prompt(), cache_implementation="quantized")
    assert torch.equal(found, written_by(loaded, prompt()))


def test_a_cache_of_another_kind_is_refused(folder: Path) -> None:
    import transformers

    loaded: Any = qfx.onnx.load(folder)
    with pytest.raises(ValueError, match=r"(?s)a cache that a file cannot fill.*SharedCache.*found: DynamicCache"):
        written_by(loaded, prompt(), past_key_values=transformers.DynamicCache())


def test_continuous_batching_is_refused(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    with pytest.raises(UnsupportedError, match=r"(?s)continuous batching.*OnnxCausalLM has not.*call generate\(\)"):
        loaded.generate_batch([[1, 2, 3]])


def test_assisted_decoding_needs_all_logits(folder: Path, tmp_path: Path) -> None:
    one = {"input_ids": prompt()["input_ids"][:1]}
    last: Any = qfx.onnx.load(folder)
    with pytest.raises(ValueError, match="logits of the last token alone.*(?s:.*)all_logits=True"):
        written_by(last, one, prompt_lookup_num_tokens=3)
    export(tiny(), tmp_path / "all", recipe="w8a8", all_logits=True)
    loaded: Any = qfx.onnx.load(tmp_path / "all")
    wanted = written_by(loaded, one)
    assert torch.equal(wanted, written_by(last, one))
    assert torch.equal(written_by(loaded, one, assistant_model=tiny()), wanted)
    assert torch.equal(written_by(loaded, one, prompt_lookup_num_tokens=3), wanted)
    assert loaded(**one).logits.shape[1] == 10 and loaded(**one, logits_to_keep=3).logits.shape[1] == 3


def test_what_a_file_cannot_take_or_give_is_refused(folder: Path) -> None:
    loaded: Any = qfx.onnx.load(folder)
    given = prompt()
    ids = given["input_ids"]
    for more in ({"labels": ids}, {"output_hidden_states": True}, {"token_type_ids": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match=f"has no {next(iter(more))}"):
            loaded(**given, **more)
    with pytest.raises(ValueError, match="input_ids are needed"):
        loaded(inputs_embeds=torch.zeros(1, 2, 192))
    for bad in (ids - 4, ids[:, :0]):
        with pytest.raises(ValueError, match="input_ids are no tokens"):
            loaded(bad)
    wanted = loaded(**given).logits
    assert torch.equal(loaded(**given, token_type_ids=torch.zeros_like(ids), return_dict=True).logits, wanted)
    assert torch.equal(loaded(**given, token_type_ids=None, labels=None).logits, wanted)
    assert torch.equal(loaded(ids.int(), given["attention_mask"].bool()).logits, wanted)
