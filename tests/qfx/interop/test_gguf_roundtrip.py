"""Models to GGUF and back: every architecture and packed weights. Of llama.cpp: test_gguf_llama_cpp.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.format import Format
from qfx.interop.gguf_file import read_gguf
from qfx.live.modules import QuantEmbedding, QuantLinear
from qfx.live.permuted import QuantPermuted
from qfx.packing import pack_weight
from tests.gguf_models import KINDS, SIZES, ids, random_model, randomized, run

transformers = pytest.importorskip("transformers", reason="the models are transformers models: pip install qfx[hf]")
gguf = pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")


@pytest.mark.parametrize("kind", KINDS)
def test_floats_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    done = qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)
    assert done.notes == () and set(done.types.values()) == {"F32"}
    assert done.nbytes == (tmp_path / "m.gguf").stat().st_size
    back = qfx.import_gguf(tmp_path / "m.gguf")
    assert type(back).__name__.startswith({"mistral": "Llama"}.get(kind, KINDS[kind][0]))
    assert not back.training
    assert torch.equal(run(back), run(model))


def test_rows_of_q_and_k_change_their_order_for_llama(tmp_path: Path) -> None:
    """The negative control of the round trip: in the file the rows do stand in another order, those of v do not."""
    model = random_model("llama")
    qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)
    held = {name: torch.from_numpy(t.data.copy()) for name, t in read_gguf(tmp_path / "m.gguf").tensors.items()}
    attention = model.model.layers[0].self_attn
    q, found = attention.q_proj.weight.detach(), held["blk.0.attn_q.weight"]
    assert not torch.equal(found, q)
    assert torch.equal(found[0::2][:8], q[:8]) and torch.equal(found[1::2][:8], q[8:16]), "the first head of 16"
    assert torch.equal(held["blk.0.attn_v.weight"], attention.v_proj.weight)
    other = random_model("qwen2")
    qfx.export_gguf(other, tmp_path / "o.gguf", "F32", tokenizer=False)
    held = {name: torch.from_numpy(t.data.copy()) for name, t in read_gguf(tmp_path / "o.gguf").tensors.items()}
    assert torch.equal(held["blk.0.attn_q.weight"], other.model.layers[0].self_attn.q_proj.weight)


def test_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, type_vocab_size=2)
    model = randomized(transformers.BertModel(config).eval())
    with pytest.warns(QfxWarning, match=r"pooler: GGUF holds the encoder: pooler \(2 tensors\) are left out"):
        done = qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)
    assert set(done.types.values()) == {"F32"}
    assert torch.equal(run(qfx.import_gguf(tmp_path / "m.gguf")), run(model))
    headed = randomized(transformers.BertForMaskedLM(config).eval())
    with pytest.warns(QfxWarning, match="cls: GGUF holds the encoder"):
        qfx.export_gguf(headed, tmp_path / "h.gguf", "F32", tokenizer=False)
    assert torch.equal(run(qfx.import_gguf(tmp_path / "h.gguf")), run(headed.bert))


@pytest.mark.filterwarnings("ignore:.*no whole number of Q6_K blocks")
@pytest.mark.parametrize("mix", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "MXFP4"])
@pytest.mark.parametrize("kind", ["llama tied", "qwen3"])
def test_packed_and_float_imports_are_one_function(kind: str, mix: str, tmp_path: Path) -> None:
    model = random_model(kind)
    qfx.export_gguf(model, tmp_path / "m.gguf", mix, tokenizer=False)
    packed, floats = qfx.import_gguf(tmp_path / "m.gguf"), qfx.import_gguf(tmp_path / "m.gguf", packed=False)
    assert torch.equal(run(packed), run(floats))
    off = (run(floats) - run(model)).norm() / run(model).norm()
    assert 0 < float(off) < (0.02 if mix in ("F16", "BF16", "Q8_0") else 0.3)
    quantized = [m for m in packed.modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == (0 if mix in ("F16", "BF16") else 15)
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in floats.modules())


def test_an_imported_table_is_shared_and_can_be_saved(tmp_path: Path) -> None:
    model = random_model("llama tied")
    qfx.export_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=False)
    back: Any = qfx.import_gguf(tmp_path / "m.gguf")
    assert back.lm_head.w_codes.data_ptr() == back.model.embed_tokens.w_codes.data_ptr()
    qfx.save(back, tmp_path / "saved")
    assert torch.equal(run(qfx.load(tmp_path / "saved")), run(back))
    qfx.export_gguf(back, tmp_path / "again.gguf", "Q8_0", tokenizer=False)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.parametrize(("fmt", "kind"), [("i4/g32/f16", "Q4_0"), ("i8/g32/f16", "Q8_0"), ("u3/g32/f16", "Q4_0")])
def test_quantized_weights_are_written_as_they_are(fmt: str, kind: str, tmp_path: Path) -> None:
    recipe = qfx.Recipe(name="mine", rules=(qfx.Rule(target="linear", w=fmt), qfx.Rule(target="embedding", w=fmt)))
    model = qfx.quantize(random_model("llama"), recipe)
    done = qfx.export_gguf(model, tmp_path / "m.gguf", "F16", tokenizer=False)
    assert done.notes == ()
    assert {done.types[f"blk.1.{part}.weight"] for part in ("attn_q", "ffn_down")} == {kind}
    assert torch.equal(run(qfx.import_gguf(tmp_path / "m.gguf")), run(model)), "not rounded again"


def test_formats_without_blocks_are_rounded_anew_and_told(tmp_path: Path) -> None:
    model = qfx.quantize(random_model("llama"), qfx.Recipe(name="n", rules=(qfx.Rule(target="linear", w="nf4/g64"),)))
    with pytest.warns(QfxWarning) as told:
        qfx.export_gguf(model, tmp_path / "m.gguf", "Q4_K_M", tokenizer=False)
    said = [str(w.message) for w in told]
    why = "no block type holds nf4/g64: its values are rounded anew to Q5_0"
    assert any(text.startswith("model.layers.0-1.self_attn.q_proj, ") and f" nodes): {why}" in text for text in said)
    off = (run(qfx.import_gguf(tmp_path / "m.gguf")) - run(model)).norm() / run(model).norm()
    assert 0 < float(off) < 0.1
    with pytest.raises(UnsupportedError, match="strict=True"):
        qfx.export_gguf(model, tmp_path / "n.gguf", "Q4_K_M", tokenizer=False, strict=True)
    assert not (tmp_path / "n.gguf").exists()


def test_float32_scales_and_float_inputs_are_told(tmp_path: Path) -> None:
    rules = (qfx.Rule(target="linear", w="i8/ch", x="i8/tok"),)
    model = qfx.quantize(random_model("llama"), qfx.Recipe(name="n", rules=rules))
    with pytest.warns(QfxWarning) as told:
        done = qfx.export_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=False, strict=True)
    said = [str(w.message) for w in told]
    assert any("its codes are kept in Q8_0, its scales are rounded to float16" in text for text in said)
    assert any("inputs in i8/tok have no place in GGUF" in text for text in said)
    assert done.types["blk.0.attn_q.weight"] == "Q8_0"


def effective(module: QuantLinear) -> Tensor:
    """By what the inputs are multiplied, seen from outside."""
    with torch.no_grad():
        found: Tensor = module(torch.eye(module.in_features)).T
    return found


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: QuantLinear(p, None, smooth=torch.rand(96) + 0.5), "inputs are divided first"),
        (lambda p: QuantLinear(p, None, rotation=(32, 1)), "inputs are rotated first"),
        (lambda p: QuantLinear(p, None, rotation=(32, 1), smooth=torch.rand(96) + 0.5), "inputs are divided first"),
        (lambda p: QuantLinear(p, None, low=(torch.randn(2, 96), torch.randn(64, 2))), "stands beside the packed one"),
        (lambda p: QuantPermuted(p, None, torch.randperm(96)), "stored in another order"),
        (lambda p: QuantPermuted(p, None, torch.randperm(96), smooth=torch.rand(96) + 0.5), "inputs are divided first"),
    ],
    ids=["smooth", "rotation", "rotation and smooth", "low rank", "permuted", "permuted and smooth"],
)
def test_what_stands_before_a_packed_weight_goes_into_it(make: Any, reason: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = make(pack_weight(torch.randn(64, 96), Format.parse("i8/g32/f16")))
    wanted = effective(module)
    model = random_model("llama")
    model.model.layers[0].mlp.down_proj = module
    with pytest.warns(QfxWarning, match=f"down_proj: .*{reason}.*: its values are rounded anew to Q8_0"):
        qfx.export_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=False)
    back: Any = qfx.import_gguf(tmp_path / "m.gguf", packed=False)
    found = back.model.layers[0].mlp.down_proj.weight.detach()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert float((module.w_codes.float() - wanted).norm()) > 1, "which is not what is packed"


def test_single_biases(tmp_path: Path) -> None:
    """Bias correction gives biases to some layers; llama.cpp takes those of Llama, not those of Qwen3."""
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.randn(64))
    for mix in ("F32", "Q8_0"):
        qfx.export_gguf(model, tmp_path / "m.gguf", mix, tokenizer=False)
        back: Any = qfx.import_gguf(tmp_path / "m.gguf")
        assert torch.equal(back.model.layers[1].mlp.down_proj.bias, model.model.layers[1].mlp.down_proj.bias)
        assert back.model.layers[0].mlp.down_proj.bias is None
        assert float((run(back) - run(model)).norm() / run(model).norm()) <= (0 if mix == "F32" else 0.02)
    other = random_model("qwen3")
    other.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.randn(64))
    with pytest.raises(UnsupportedError, match=r"'model.layers.1.mlp.down_proj' has a bias, for which qwen3 has no"):
        qfx.export_gguf(other, tmp_path / "o.gguf", "F32", tokenizer=False)


def test_heads_of_their_own_formats(tmp_path: Path) -> None:
    rules = (qfx.Rule(target="*.q_proj", w=["i8/g32/f16", "i4/g32/f16", "i8/g32/f16", "i4/g32/f16"]),)
    model = qfx.quantize(random_model("qwen2"), qfx.Recipe(name="heads", rules=rules))
    with pytest.warns(QfxWarning, match=r"layers\.0-1\.self_attn\.q_proj \(2 nodes\): it has several formats"):
        qfx.export_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=False)
    off = (run(qfx.import_gguf(tmp_path / "m.gguf")) - run(model)).norm() / run(model).norm()
    assert float(off) < 0.02


@pytest.mark.filterwarnings("ignore:.*no whole number of Q6_K blocks")
def test_data_weights_the_errors(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:8] *= 30
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": ids()}]
    plain = qfx.export_gguf(model, tmp_path / "p.gguf", "Q4_1", tokenizer=False)
    data = qfx.export_gguf(model, tmp_path / "d.gguf", "Q4_1", tokenizer=False, data=batches)
    assert plain.nbytes == data.nbytes
    wanted = run(model)
    off = [float((run(qfx.import_gguf(p.path, packed=False)) - wanted).norm()) for p in (plain, data)]
    assert off[1] < off[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_windows_of_attention_are_told(tmp_path: Path) -> None:
    model = random_model("mistral", sliding_window=16)
    with pytest.warns(QfxWarning, match="attention over the last 16 tokens has no place in GGUF"):
        qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)


def test_no_tokenizer_is_told_unless_asked(tmp_path: Path) -> None:
    with pytest.warns(QfxWarning, match="the model comes with no tokenizer: in llama.cpp tokens go in"):
        qfx.export_gguf(random_model("llama"), tmp_path / "m.gguf", "F32")
