"""Reading checkpoints: architecture, names, missing and unexpected tensors; what the model can do afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qfx
from tests.interop import UP, falcon, ids, linears, llama, logits, pack, same, stored


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    qfx.export_compressed_tensors(pack(llama(), "i4/g32"), tmp_path)
    return tmp_path


def changed(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("method", ["fp8", "aqlm", ""])
def test_unknown_layouts_are_refused(folder: Path, method: str) -> None:
    changed(folder, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=r"unknown layout(.|\n)*compressed-tensors, gptq, awq, bitsandbytes"):
        qfx.import_checkpoint(folder)


@pytest.mark.parametrize("kind", ["marlin-24", "dense", "sparse-bitmask"])
def test_unknown_formats_are_refused(folder: Path, kind: str) -> None:
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    fields["config_groups"]["group_0"]["format"] = kind
    changed(folder, quantization_config=fields)
    with pytest.raises(ValueError, match=f"unknown format '{kind}' of compressed-tensors"):
        qfx.import_checkpoint(folder)


def test_another_size_is_another_architecture(folder: Path) -> None:
    changed(folder, intermediate_size=128)
    with pytest.raises(ValueError, match="does not fit the model: the checkpoint is of another architecture"):
        qfx.import_checkpoint(folder)
    changed(folder, intermediate_size=96, vocab_size=97)
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM(.|\n)*embed_tokens.weight \[97, 64\]"):
        qfx.import_checkpoint(folder)


def test_another_class_is_another_architecture(folder: Path) -> None:
    changed(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"missing: model.layers.2(.|\n)*one checkpoint"):
        qfx.import_checkpoint(folder)
    changed(folder, num_hidden_layers=1, layer_types=None)
    with pytest.raises(ValueError, match=r"tensors that it does not have: model.layers.1"):
        qfx.import_checkpoint(folder)
    changed(folder, num_hidden_layers=2, architectures=["OwnForCausalLM"])
    with pytest.raises(ValueError, match="no class 'OwnForCausalLM'"):
        qfx.import_checkpoint(folder)
    changed(folder, model_type="own")
    with pytest.raises(ValueError, match="the config of .* cannot be read"):
        qfx.import_checkpoint(folder)


@pytest.mark.parametrize("name", [f"{UP}.weight_scale", f"{UP}.weight_packed", "model.norm.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    held = stored(folder)
    del held[name]
    rewritten(folder, held)
    with pytest.raises(ValueError, match=name.rpartition(".")[0] if "norm" in name else "up_proj"):
        qfx.import_checkpoint(folder)


def test_a_linear_without_a_scheme_is_named(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    fields["ignore"].append(UP)
    changed(folder, quantization_config=fields)
    with pytest.raises(ValueError, match=f"'{UP}' has scales in the checkpoint and no scheme"):
        qfx.import_checkpoint(folder)


def test_a_config_that_promises_more_is_refused(folder: Path) -> None:
    llama().save_pretrained(folder / "float")
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    changed(folder / "float", quantization_config=fields)
    with pytest.raises(ValueError, match="holds no quantized compressed-tensors weight, against its config"):
        qfx.import_checkpoint(folder / "float")


@pytest.mark.parametrize("change", ["with", "without"])
def test_the_prefix_of_the_bare_model_may_differ(folder: Path, change: str) -> None:
    held = stored(folder)
    wanted = qfx.import_checkpoint(folder)
    if change == "without":
        held = {name.removeprefix("model."): tensor for name, tensor in held.items() if name != "lm_head.weight"}
        changed(folder, tie_word_embeddings=True)
    else:
        held = {name: tensor for name, tensor in held.items() if name != "lm_head.weight"}
        changed(folder, architectures=["LlamaModel"])
    rewritten(folder, held)
    found: Any = qfx.import_checkpoint(folder)
    body = found.model if change == "without" else found
    with torch.no_grad():
        assert torch.equal(body(ids()).last_hidden_state, wanted.model(ids()).last_hidden_state)  # type: ignore[operator]


def test_biases_of_zeros_are_left_out_and_others_are_not(folder: Path) -> None:
    rewritten(folder, {**stored(folder), f"{UP}.bias": torch.zeros(96)})
    assert linears(qfx.import_checkpoint(folder))[UP].bias is None
    rewritten(folder, {**stored(folder), f"{UP}.bias": torch.ones(96)})
    with pytest.raises(ValueError, match=f"does not have: {UP}.bias"):
        qfx.import_checkpoint(folder)


def test_derived_buffers_are_left_out(folder: Path) -> None:
    rewritten(folder, {**stored(folder), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert same(qfx.import_checkpoint(folder), pack(llama(), "i4/g32"))


def test_the_model_goes_on_as_any_other(folder: Path, tmp_path: Path) -> None:
    model: Any = qfx.import_checkpoint(folder)
    assert not model.training and not any(m.training for m in model.modules())
    assert model.generate(ids(), max_new_tokens=3, do_sample=False).shape == (2, 10)
    qfx.save(model, tmp_path / "qfx")
    assert torch.equal(logits(qfx.load(tmp_path / "qfx")), logits(model))
    assert sum(row.quantized for row in qfx.report(model)) == 14


def test_loading_uses_up_no_random_numbers(folder: Path) -> None:
    state = torch.random.get_rng_state()
    qfx.import_checkpoint(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_eight_bit_codes_of_minus_128_compute_exactly(tmp_path: Path) -> None:
    """Libraries use -128, which qfx's own rounding leaves out."""
    qfx.export_compressed_tensors(pack(llama(), "i8/ch", x_format="i8/tok"), tmp_path)
    held = stored(tmp_path)
    held[f"{UP}.weight"][:, ::3] = -128
    rewritten(tmp_path, held)
    module = linears(qfx.import_checkpoint(tmp_path))[UP]
    assert module.w_format == "i8/ch"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 127
    wanted = ((x / scale).round() @ held[f"{UP}.weight"].float().t()) * scale * held[f"{UP}.weight_scale"].t()
    assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_linears_of_a_derived_class_are_read(layout: str, tmp_path: Path) -> None:
    """Falcon's are a class of its own, which the target "Linear" means, too."""
    model = falcon("i4/g32/f16")
    writers = {"compressed-tensors": qfx.export_compressed_tensors, "gptq": qfx.export_gptq}
    writers[layout](model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert same(found, model) and torch.equal(logits(found), logits(model))
