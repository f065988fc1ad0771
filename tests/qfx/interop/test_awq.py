"""AWQ checkpoints: what is written, read back, and what a second implementation of the layout gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.interop.awq import ORDER, decoder, interleaved, straight
from tests.interop import UP, linears, llama, logits, pack, same, stored


def values_of(held: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """The weight [N, K] of AWQ's tensors, nibble by nibble."""
    k, n = held["qweight"].shape[0], held["qweight"].shape[1] * 8
    codes, zero = torch.zeros(k, n), torch.zeros(held["qzeros"].shape[0], n)
    for i, column in enumerate(ORDER):
        codes[:, column::8] = (held["qweight"] >> 4 * i & 15).float()
        zero[:, column::8] = (held["qzeros"] >> 4 * i & 15).float()
    rows = torch.arange(k) // group
    return ((codes - zero[rows]) * held["scales"].float()[rows]).t()


@pytest.mark.parametrize("fmt", ["u4/g32/f16", "i4/g16/f16", "u4/ch/f16"])
def test_weights_come_back(fmt: str, tmp_path: Path) -> None:
    model = pack(llama(), fmt)
    qfx.export_awq(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert same(model, found) and torch.equal(logits(model), logits(found))
    assert {m.w_format for m in linears(found).values()} == {fmt}
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "awq" and fields["modules_to_not_convert"] == ["lm_head"]
    assert fields["group_size"] == (qfx.Format.parse(fmt).group or -1)


def test_the_layout_is_what_it_says(tmp_path: Path) -> None:
    model = pack(llama(), "u4/g32/f16")
    qfx.export_awq(model, tmp_path)
    held = stored(tmp_path, f"{UP}.")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in held.items()} == {
        "qweight": (torch.int32, (64, 12)), "qzeros": (torch.int32, (2, 12)), "scales": (torch.float16, (2, 96)),
    }  # fmt: skip
    assert torch.equal(values_of(held, 32), linears(model)[UP].weight)


def test_the_order_of_nibbles() -> None:
    rows = torch.arange(16).reshape(1, 16)
    assert interleaved(rows)[0, :8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(straight(interleaved(rows)), rows) and not torch.equal(interleaved(rows), rows)


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        ("i3/g32/f16", "no layout for w=i3/g32/f16"),
        ("nf4/g32", "no layout for w=nf4/g32"),
        ("u4/g64/f16", r"whole groups: \[64, 96\]"),
        ("u4/g16/f16", "one group size, here 32"),
    ],
)
def test_what_it_cannot_hold_is_written_in_float(fmt: str, reason: str, tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "u4/g32/f16", "q_proj": "i4/g32/f16", "down_proj": fmt})
    with pytest.warns(QfxWarning, match=rf"down_proj.* \(2 nodes\): .*{reason}"):
        qfx.export_awq(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert len(linears(found)) == 4 and torch.allclose(logits(model), logits(found), atol=1e-5)
    with pytest.raises(UnsupportedError, match=reason):
        qfx.export_awq(model, tmp_path / "strict", strict=True)


def test_a_config_beside_config_json_is_read(tmp_path: Path) -> None:
    model = pack(llama(), "u4/g32/f16")
    qfx.export_awq(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    assert same(model, qfx.import_checkpoint(tmp_path))


@pytest.mark.parametrize("config", [{"version": "gemv"}, {"version": "gemm", "bits": 3}])
def test_unknown_versions_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this AWQ checkpoint is not read"):
        decoder(config)


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("qweight", torch.zeros(64, 11, dtype=torch.int32)),
        ("scales", torch.ones(3, 96, dtype=torch.float16)),
        ("qzeros", torch.zeros(2, 11, dtype=torch.int32)),
    ],
)
def test_tensors_that_do_not_fit_are_named(leaf: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    qfx.export_awq(pack(llama(), "u4/g32/f16"), tmp_path)
    save_file({**stored(tmp_path), f"{UP}.{leaf}": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.(qweight|scales)' does not fit"):
        qfx.import_checkpoint(tmp_path)


# --- with GPTQModel, which reads AWQ's layout now -------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["u4/g32/f16", "i4/ch/f16"])
@pytest.mark.filterwarnings("ignore")
def test_the_library_dequantizes_the_same_values(fmt: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="pip install qfx[interop]")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    model = pack(llama(), fmt)
    qfx.export_awq(model, tmp_path)
    for name, module in linears(model).items():
        held = stored(tmp_path, f"{name}.")
        group = qfx.Format.parse(fmt).group or module.shape[1]
        values = dequantize_gemm(held["qweight"], held["qzeros"], held["scales"], 4, group).t()
        assert torch.allclose(values.float(), module.weight, rtol=1e-3, atol=0), name


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="pip install qfx[interop]")
    pytest.importorskip("optimum", reason="pip install qfx[interop]")
    import transformers

    model = pack(llama(), "u4/g32/f16")
    qfx.export_awq(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float16)
    assert type(loaded.get_submodule(UP)).__module__.startswith("gptqmodel")
    wanted = logits(model)  # in float32
    assert torch.allclose(logits(loaded).float(), wanted, atol=5e-3 * float(wanted.abs().max()))
