"""Encoder-decoders as folders: the encoder once, then generate() of transformers over one memory for the cache."""

from __future__ import annotations

import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import qfx
import qfx.onnx
from qfx.decoding import encoder_decoder as pair
from qfx.decoding.generation_seq2seq import CrossCache
from qfx.errors import QfxWarning
from tests.backends.onnx.checks import sqnr
from tests.qfx.decoding.test_export import export
from tests.zoo import HIDDEN, LAYERS, VOCAB, ZOO, noise

RUNTIMES = ["onnxruntime", "standard"]
QUICK = {("t5", "standard"), ("whisper", "onnxruntime")}
BOTH = [
    pytest.param(name, runtime, marks=[] if (name, runtime) in QUICK else pytest.mark.slow)
    for name in ("t5", "bart", "whisper")
    for runtime in RUNTIMES
]
LONG = {"max_new_tokens": 14, "min_new_tokens": 14}  # no sequence ends early: every token is compared


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, runtime, recipe) -> the folder that was written, once each."""

    @cache
    def made(name: str, runtime: str, recipe: str | None) -> Path:
        folder = tmp_path_factory.mktemp(name)
        export(ZOO[name]()[0], folder, runtime=runtime, recipe=recipe)
        return folder

    def once(name: str, runtime: str = "onnxruntime", recipe: str | None = None) -> Path:
        return made(name, runtime, recipe)  # all given: `cache` holds a call with a default apart from one without

    return once


def reads(name: str, batch: int = 3) -> dict[str, Tensor]:
    """Features, or ids of which the second row is padded on the right, the third on the left."""
    if name == "whisper":
        return {"input_features": noise(batch, 16, 40)}
    ids = torch.randint(3, VOCAB, (batch, 11), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1:2, -4:], mask[2:3, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(8))


def written_by(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = model.generate(**given, **{**LONG, **options})
    return found


@pytest.mark.parametrize(("name", "runtime"), BOTH)
def test_tokens_are_those_of_the_live_model(folders: Any, name: str, runtime: str) -> None:
    live, loaded = ZOO[name]()[0], qfx.onnx.load(folders(name, runtime))
    given = reads(name)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"decoder_input_ids": tokens(3, 4)}]
    ways.append({"temperature": 1.0} if name == "whisper" else {"do_sample": True, "num_return_sequences": 2})
    for options in ways:
        expected = written_by(live, given, **options)
        assert torch.equal(expected, written_by(loaded, given, **options)), options
    alone = {key: tensor[:1] for key, tensor in given.items()}
    assert torch.equal(written_by(live, alone), written_by(loaded, alone))
    assert torch.equal(written_by(loaded, alone), written_by(loaded, alone, use_cache=False))


@pytest.mark.slow
def test_tokens_of_weights_beside_the_models(tmp_path: Path) -> None:
    export(ZOO["bart"]()[0], tmp_path / "m", external_bytes=0)
    assert (tmp_path / "m" / f"{pair.DECODER}.data").is_file()
    given = reads("bart")
    assert torch.equal(written_by(ZOO["bart"]()[0], given), written_by(qfx.onnx.load(tmp_path / "m"), given))


@pytest.mark.parametrize(("name", "runtime"), BOTH)
def test_one_graph_reads_several_tokens_and_one(folders: Any, name: str, runtime: str) -> None:
    live: Any = ZOO[name]()[0]
    loaded: Any = qfx.onnx.load(folders(name, runtime))
    given, ids = reads(name), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    more = {"decoder_position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name == "whisper" else {}
    with torch.no_grad():
        expected = live(**given, decoder_input_ids=ids, decoder_attention_mask=mask, **more).logits
    encoded = loaded.get_encoder()(**given)
    state, parts, start = None, [], 0
    for end in (5, 6, 7, 10, 12):
        places = {key: tensor[:, start:end] for key, tensor in more.items()}
        found = loaded(
            encoder_outputs=encoded, decoder_input_ids=ids[:, start:end], decoder_attention_mask=mask[:, :end],
            past_key_values=state, **places,
        )  # fmt: skip
        parts.append(found.logits)
        state, start = found.past_key_values, end
    seen = mask.bool()
    assert sqnr(expected[seen], torch.cat(parts, 1)[seen]) > 100
    assert sqnr(expected[seen], torch.cat(parts, 1).roll(1, 0)[seen]) < 20  # other rows read something else


def test_padding_of_what_the_encoder_reads_counts(folders: Any) -> None:
    loaded: Any = qfx.onnx.load(folders("bart"))
    live: Any = ZOO["bart"]()[0]
    given, ids = reads("bart"), tokens(3, 2)
    masked = loaded(**given, decoder_input_ids=ids).logits
    whole = loaded(input_ids=given["input_ids"], decoder_input_ids=ids).logits
    with torch.no_grad():
        expected = live(input_ids=given["input_ids"], decoder_input_ids=ids).logits
    assert sqnr(expected, whole) > 100
    assert sqnr(whole[0], masked[0]) > 100
    assert sqnr(whole[1:], masked[1:]) < 40
    hidden = {**given, "input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 9)}
    assert sqnr(masked, loaded(**hidden, decoder_input_ids=ids).logits) > 100


@pytest.mark.parametrize(
    ("name", "runtime"),
    [("bart", "onnxruntime"), ("t5", "standard"), pytest.param("bart", "standard", marks=pytest.mark.slow)],
)
def test_what_the_two_files_hold(folders: Any, name: str, runtime: str) -> None:
    folder = folders(name, runtime)
    encoder, decoder = (onnx.load(str(folder / name)) for name in (pair.ENCODER, pair.DECODER))
    own = "com.microsoft" if runtime == "onnxruntime" else ""
    assert {node.domain for node in (*encoder.graph.node, *decoder.graph.node)} <= {"", own}
    fused = [node for node in decoder.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(fused) == (LAYERS if own else 0)
    assert [i.name for i in encoder.graph.input] == ["input_ids", "attention_mask"]
    cross = [pair.CROSS.format(i, what) for i in range(LAYERS) for what in ("key", "value")]
    assert [o.name for o in encoder.graph.output] == [pair.HIDDEN, *cross]
    assert {pair.IDS, pair.MASK, pair.ENCODER_MASK, *cross} < {i.name for i in decoder.graph.input}
    assert {"qfx.cache": "shared" if own else "copied"}.items() <= {
        p.key: p.value for p in decoder.metadata_props
    }.items()
    assert "qfx.cache" not in {p.key for p in encoder.metadata_props}
    if name == "bart":  # T5's norms are spelled out in the standard's operators
        assert len([n for n in encoder.graph.node if n.op_type == "LayerNormalization"]) == 1 + 2 * LAYERS  # no decoder


def test_the_encoder_runs_once_and_beams_share_what_it_says(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = qfx.onnx.load(folders("bart"))
    calls = []
    run = loaded.encoder._runner.run

    def counted(*args: Any) -> Any:
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(loaded.encoder._runner, "run", counted)
    seen: set[int] = set()
    step = loaded._step

    def stepped(*args: Any) -> Tensor:
        seen.update(tensor.data_ptr() for tensor in args[3].cross.values())
        found: Tensor = step(*args)
        return found

    monkeypatch.setattr(loaded, "_step", stepped)
    written_by(loaded, reads("bart"), num_beams=3)
    assert len(calls) == 1
    assert len(seen) == 2 * LAYERS  # never copied as beams change places


def test_the_cache_grows_where_it_lies(folders: Any) -> None:
    loaded: Any = qfx.onnx.load(folders("bart"))
    state = CrossCache(loaded._sizes, room=64)
    loaded(**reads("bart"), decoder_input_ids=tokens(3, 4), past_key_values=state)
    places = [t.data_ptr() for t in (*state.keys, *state.values)]
    loaded(decoder_input_ids=tokens(3, 1), past_key_values=state, attention_mask=reads("bart")["attention_mask"])
    assert [t.data_ptr() for t in (*state.keys, *state.values)] == places
    assert state.get_seq_length() == 5
    assert all(bool((t[:, :, 4] != 0).any()) and not bool(t[:, :, 5:].any()) for t in state.keys)


def encoded(rows: int, first: int = 0) -> BaseModelOutput:
    states = BaseModelOutput(last_hidden_state=torch.zeros(rows, 2, 4))
    states["cross_key_values.0.key"] = torch.arange(float(rows))[:, None, None, None].expand(-1, 1, 2, 4)
    states["rows"] = torch.arange(first, first + rows)
    return states


def test_cross_keys_follow_their_sequences() -> None:
    state = CrossCache([(1, 4)])
    state.attend_to(encoded(2))
    state.attend_to(encoded(3, 9))  # has some already
    state.reserve(2, 1)
    kept = state.cross["cross_key_values.0.key"]
    state.batch_repeat_interleave(2)
    state.reorder_cache(torch.tensor([1, 0, 3, 3]))
    assert [float(k[0, 0, 0]) for k in state.cross["cross_key_values.0.key"]] == [0, 0, 1, 1]
    before = state.cross["cross_key_values.0.key"]
    state.reorder_cache(torch.tensor([1, 0, 2, 2]))
    assert state.cross["cross_key_values.0.key"] is before
    state.reorder_cache(torch.tensor([3, 0]))
    assert [float(k[0, 0, 0]) for k in state.cross["cross_key_values.0.key"]] == [1, 0]
    assert state.keys[0].shape[0] == 2
    state.reset()
    assert not state.cross
    assert kept.shape[0] == 2


@pytest.mark.parametrize("name", ["bart", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "whisper"))])
def test_quantized_tokens_are_those_of_the_quantized_live_model(folders: Any, name: str) -> None:
    folder = folders(name, recipe="w8a8")
    live: Any = qfx.quantize(ZOO[name]()[0], "w8a8")
    loaded: Any = qfx.onnx.load(folder)
    given, ids = reads(name), tokens(3, 5)
    with torch.no_grad():
        expected = live(**given, decoder_input_ids=ids).logits
        plain = ZOO[name]()[0](**given, decoder_input_ids=ids).logits
    found = loaded(**given, decoder_input_ids=ids).logits
    assert sqnr(expected, found) > 60
    assert sqnr(plain, found) < 50
    assert torch.equal(written_by(live, given), written_by(loaded, given))
    for file in (pair.ENCODER, pair.DECODER):
        matrices = [t for t in onnx.load(str(folder / file)).graph.initializer if len(t.dims) == 2 and min(t.dims) > 32]
        assert matrices
        kinds = {t.data_type for t in matrices if not (name == "whisper" and t.dims[1] == HIDDEN and t.dims[0] < VOCAB)}
        assert kinds <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


@pytest.mark.slow
def test_weight_only_is_near_the_quantized_live_model(folders: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        live: Any = qfx.quantize(ZOO["bart"]()[0], "w4a16")
    loaded: Any = qfx.onnx.load(folders("bart", recipe="w4a16"))
    given, ids = reads("bart"), tokens(3, 5)
    with torch.no_grad():
        expected = live(**given, decoder_input_ids=ids).logits
    assert sqnr(expected, loaded(**given, decoder_input_ids=ids).logits) > 25  # 8-bit activations inside


@pytest.mark.slow
def test_a_plan_with_rewrites_serves_both_files(tmp_path: Path) -> None:
    model: Any = ZOO["bart"]()[0]
    data = [{**reads("bart"), "decoder_input_ids": tokens(3, 5), "use_cache": False}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        plan = qfx.plan(model, "w8a8-static", data, rewrites=("norm-fold", "smooth"))
        assert plan.rewrites
        qfx.export_onnx(model, None, tmp_path / "m", plan=plan)
        live: Any = qfx.quantize(ZOO["bart"]()[0], plan)
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    with torch.no_grad():
        expected = live(**data[0]).logits
    assert sqnr(expected, loaded(**reads("bart"), decoder_input_ids=tokens(3, 5)).logits) > 60
    assert torch.equal(written_by(live, reads("bart")), written_by(loaded, reads("bart")))


def test_whisper_finds_the_language_by_itself(folders: Any) -> None:
    both: list[Any] = [ZOO["whisper"]()[0], qfx.onnx.load(folders("whisper"))]
    found = []
    for model in both:
        settings = model.generation_config
        settings.is_multilingual, settings.no_timestamps_token_id = True, 90
        settings.lang_to_id = {"<|en|>": 50, "<|de|>": 51, "<|fr|>": 52}
        settings.task_to_id = {"transcribe": 60, "translate": 61}
        found.append(written_by(model, reads("whisper"), task="translate", return_dict_in_generate=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("how", [{}, {"logprob_threshold": 0.0, "temperature": (0.0, 0.5)}], ids=["plain", "fallback"])
def test_whisper_gives_scores(folders: Any, how: dict[str, Any]) -> None:
    """Asked for, or by itself where a threshold says whether a text is written again."""
    results: list[Any] = []
    for model in (ZOO["whisper"]()[0], qfx.onnx.load(folders("whisper"))):
        torch.manual_seed(0)
        results.append(written_by(model, reads("whisper"), return_dict_in_generate=True, output_scores=True, **how))
    wanted, found = results
    assert torch.equal(found["sequences"], wanted["sequences"]) and found.get("past_key_values") is None
    torch.testing.assert_close(found["scores"], wanted["scores"], atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_told(folders: Any) -> None:
    loaded: Any = qfx.onnx.load(folders("bart"))
    given, ids = reads("bart"), tokens(3, 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "decoder_input_ids are needed"),
        ({"decoder_input_ids": ids, "decoder_attention_mask": torch.ones(3, 5)}, r"expected: \[3, 2\]"),
        ({"decoder_input_ids": ids, "labels": ids}, "no labels"),
        ({"decoder_input_ids": ids, "output_attentions": True}, "no output_attentions"),
        (
            {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=torch.zeros(3, 2, 64))},
            "lack",
        ),
    ]
    for more, text in wrong:
        with pytest.raises(ValueError, match=text):
            loaded(**given, **more)
    with pytest.raises(ValueError, match="the inputs do not fit"):
        loaded(decoder_input_ids=ids)
    with pytest.raises(ValueError, match="not used by the model"):
        loaded.generate(**given, max_new_tokns=3)


def test_whisper_reads_no_mask_and_says_so(folders: Any) -> None:
    folder = folders("whisper")
    assert pair.read_document(folder)["unread"] == ["attention_mask"]
    loaded: Any = qfx.onnx.load(folder)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[:, 20:] = 0
    plain, masked = (loaded(**reads("whisper"), attention_mask=m, decoder_input_ids=tokens(3, 2)) for m in (None, mask))
    assert torch.equal(plain.logits, masked.logits)


@pytest.mark.parametrize("name", [pair.ENCODER, pair.DECODER])
def test_altered_and_missing_files(folders: Any, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders("bart"), broken)
    whole = (broken / name).read_bytes()
    middle = len(whole) // 2
    for data in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        (broken / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} was altered"):
            qfx.onnx.load(broken)
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        qfx.onnx.load(broken)
    (broken / pair.DOCUMENT).unlink()
    with pytest.raises(ValueError, match="holds no decoder"):
        qfx.onnx.load(broken)


def test_one_file_without_a_cache(tmp_path: Path) -> None:
    model, inputs = ZOO["bart"]()
    qfx.export_onnx(model, None, tmp_path / "m.onnx")
    loaded: Any = qfx.onnx.load(tmp_path / "m.onnx")
    given = {name: inputs[name] for name in loaded.inputs}
    assert set(given) == {"input_ids", "attention_mask", "decoder_input_ids"}
    with torch.no_grad():
        expected = model(**given).logits
    assert sqnr(expected, loaded(**given)["logits"]) > 100


@pytest.mark.slow
def test_a_decoder_that_reads_no_mask_of_its_own(tmp_path: Path) -> None:
    """FSMT's attention is causal without one: the file has no such input, and generation gives none."""
    import transformers

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    words = {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}
    torch.manual_seed(0)
    model = transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes, **heads, **words)).eval()
    export(model, tmp_path)
    loaded: Any = qfx.onnx.load(tmp_path)
    ids = torch.randint(3, VOCAB, (2, 7))
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **asked), model.generate(ids, **asked))


def blocky(name: str) -> Any:
    """Encoders that attend in blocks of four tokens."""
    import transformers as tf

    torch.manual_seed(0)
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    if name == "pegasus-x":
        sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
                 (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        some: dict[str, Any] = {"d_model": 16, "block_size": 4, "num_global_tokens": 4, "max_position_embeddings": 64}
        ends |= {"bos_token_id": 0, "eos_token_id": 1}
        return tf.PegasusXForConditionalGeneration(tf.PegasusXConfig(vocab_size=VOCAB, **sizes, **some, **ends)).eval()
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    config = tf.LongT5Config(
        vocab_size=VOCAB, **t5, **ends, local_radius=3, global_block_size=4, encoder_attention_type=name
    )
    return tf.LongT5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["local", pytest.param("pegasus-x", marks=pytest.mark.slow)])
def test_encoders_that_attend_in_blocks_read_any_length(tmp_path: Path, name: str) -> None:
    model = blocky(name)
    qfx.export_onnx(model, None, tmp_path / "m")
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    for length in (3, 8, 13, 18):
        ids = torch.randint(3, VOCAB, (2, length))
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **asked), model.generate(ids, **asked))


@pytest.mark.slow
def test_an_encoder_that_holds_for_the_length_of_its_example_says_so(tmp_path: Path) -> None:
    with pytest.warns(
        QfxWarning, match=r"LongT5\w+: its forward looks at the size of dimension 1 of 'inputs_input_ids'"
    ):
        qfx.export_onnx(blocky("transient-global"), None, tmp_path / "m")
