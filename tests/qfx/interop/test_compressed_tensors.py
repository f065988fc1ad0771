"""compressed-tensors checkpoints: what is written, read back, and what the library itself reads and writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.live.permuted import QuantPermuted
from tests.interop import UP, linears, llama, logits, pack, quantization_config, same, stored, zero_points

KINDS = {
    "i4/g32": "pack-quantized", "u4/g32": "pack-quantized", "i3/ch": "pack-quantized", "u5/g16": "pack-quantized",
    "i8/g32": "pack-quantized", "u2/ch/f16": "pack-quantized", "i4": "pack-quantized", "i6/g32/bf16": "pack-quantized",
    "f8e4m3/ch": "float-quantized", "f8e4m3": "float-quantized", "f8e4m3/b32x32": "float-quantized",
    "f4e2m1/g16/e4m3": "nvfp4-pack-quantized", "f4e2m1/g32/e8m0": "mxfp4-pack-quantized",
}  # fmt: skip
INPUTS = [
    ("i8/ch", "i8/tok", "int-quantized"), ("u8/g32", "i8/tok", "int-quantized"), ("i8", "u8/tok", "int-quantized"),
    ("f8e4m3/ch", "f8e4m3/tok", "float-quantized"), ("i4/g32", "i8/tok", "pack-quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "kind"), KINDS.items())
def test_weights_come_back(fmt: str, kind: str, tmp_path: Path) -> None:
    model = pack(llama(), fmt)
    qfx.export_compressed_tensors(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert quantization_config(tmp_path)["format"] == kind and quantization_config(tmp_path)["config_groups"][
        "group_0"
    ]["targets"] == ["Linear"]
    assert {m.w_format for m in linears(found).values()} == {fmt}
    if fmt == "f4e2m1/g16/e4m3":  # the reciprocal of the global scale is rounded
        weights = [(m.weight, linears(found)[name].weight) for name, m in linears(model).items()]
        assert all(torch.allclose(a, b, rtol=3e-7, atol=0) for a, b in weights)
    else:
        assert same(model, found) and torch.equal(logits(model), logits(found))


@pytest.mark.parametrize(("fmt", "x", "kind"), INPUTS)
def test_inputs_come_back(fmt: str, x: str, kind: str, tmp_path: Path) -> None:
    model = pack(llama(), fmt, x_format=x)
    qfx.export_compressed_tensors(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert quantization_config(tmp_path)["format"] == kind and {m.x_format for m in linears(found).values()} == {x}
    assert same(model, found) and torch.equal(logits(model), logits(found))


@pytest.mark.parametrize(("x", "zero"), [("i8", None), ("u8", torch.tensor(117, dtype=torch.uint8)), ("f8e4m3", None)])
def test_static_inputs_come_back(x: str, zero: torch.Tensor | None, tmp_path: Path) -> None:
    fmt = "f8e4m3/ch" if x == "f8e4m3" else "i8/ch"
    model = pack(llama(), fmt, x_format=x, x_scale=torch.tensor(0.037), x_zero=zero)
    qfx.export_compressed_tensors(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert {m.x_format for m in linears(found).values()} == {x}
    assert torch.equal(logits(model), logits(found))
    assert stored(tmp_path, f"{UP}.")["input_scale"].shape == (1,)


def test_the_layout_is_what_it_says(tmp_path: Path) -> None:
    model = pack(llama(), "u4/g32")
    qfx.export_compressed_tensors(model, tmp_path)
    held, module = stored(tmp_path, f"{UP}."), linears(model)[UP]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in held.items()} == {
        "weight_packed": (torch.int32, (96, 8)), "weight_scale": (torch.float32, (96, 2)),
        "weight_shape": (torch.int64, (2,)), "weight_zero_point": (torch.int32, (12, 2)),
    }  # fmt: skip
    nibbles = torch.stack([held["weight_packed"] >> 4 * i & 15 for i in range(8)], -1).flatten(1)
    assert held["weight_shape"].tolist() == [96, 64]
    zero = torch.stack([held["weight_zero_point"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    values = (nibbles - zero.repeat_interleave(32, 1)) * held["weight_scale"].repeat_interleave(32, 1)
    assert torch.equal(values, module.weight)


def test_several_formats_are_several_groups(tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "i4/g32", "down_proj": "i8/ch", "q_proj": "f8e4m3/ch"})
    qfx.export_compressed_tensors(model, tmp_path)
    fields = quantization_config(tmp_path)
    assert fields["format"] == "mixed-precision" and len(fields["config_groups"]) == 3
    assert {g["format"] for g in fields["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    assert "lm_head" in fields["ignore"] and "model.layers.1.self_attn.o_proj" in fields["ignore"]
    found = qfx.import_checkpoint(tmp_path)
    assert same(model, found) and torch.equal(logits(model), logits(found))


REFUSED = [
    ("nf4/g32", "has no layout for w=nf4/g32"),
    ("f8e5m2/ch", "has no layout for w=f8e5m2/ch"),
    ("i4/g32/e8m0", "has no layout for w=i4/g32/e8m0"),
    ("i4/g64", r"96 columns are none of g64"),
]


@pytest.mark.parametrize(("fmt", "reason"), REFUSED)
def test_what_it_cannot_hold_is_written_in_float(fmt: str, reason: str, tmp_path: Path) -> None:
    model = pack(llama(), {"down_proj": fmt, "up_proj": "i4/g32"})
    with pytest.warns(QfxWarning, match=rf"down_proj.* \(2 nodes\): .*{reason}"):
        qfx.export_compressed_tensors(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    down = "model.layers.0.mlp.down_proj"
    assert torch.equal(found.get_submodule(down).weight, model.get_submodule(down).weight)  # type: ignore[arg-type]
    assert torch.allclose(logits(model), logits(found), atol=1e-5)
    with pytest.raises(UnsupportedError, match=reason):
        qfx.export_compressed_tensors(model, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_an_input_without_a_scheme_is_told(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32", x_format="i4/tok")
    with pytest.warns(QfxWarning, match="no scheme for the input x=i4/tok: it stays float"):
        qfx.export_compressed_tensors(model, tmp_path)
    assert {m.x_format for m in linears(qfx.import_checkpoint(tmp_path)).values()} == {""}


def test_an_input_that_is_clipped_has_no_scheme(tmp_path: Path) -> None:
    model = pack(llama(), "i8/ch", x_format="i8/tok/c90")
    with pytest.warns(QfxWarning, match="no scheme for the input x=i8/tok/c90: it stays float"):
        qfx.export_compressed_tensors(model, tmp_path)
    assert {m.x_format for m in linears(qfx.import_checkpoint(tmp_path)).values()} == {""}


def test_words_of_before_0_17_are_read(tmp_path: Path) -> None:
    model = pack(llama(), "u3/g32")
    qfx.export_compressed_tensors(model, tmp_path)
    tensors = stored(tmp_path)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        stem = name.removesuffix("weight_packed")
        module = linears(model)[stem[:-1]]
        codes = torch.ops.qfx.dequantize(
            module.w_codes, torch.ones_like(module.w_scale), torch.zeros_like(module.w_scale).to(torch.uint8),
            "u3/g32", module.shape[1], torch.float32,
        ).to(torch.int64)  # fmt: skip
        tensors[name] = _padded(codes)
        tensors[f"{stem}weight_zero_point"] = _padded(zero_points(module).t().to(torch.int64)).t().contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["version"] = "0.15.0"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert same(model, qfx.import_checkpoint(tmp_path))


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """Ten codes of 3 bits a word."""
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // 10), dtype=torch.int64)
    for i in range(codes.shape[1]):
        words[:, i // 10] |= codes[:, i] << i % 10 * 3
    return words.to(torch.int32)


def test_a_group_order_of_columns_is_read(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    qfx.export_compressed_tensors(model, tmp_path)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors = stored(tmp_path)
    tensors[f"{UP}.weight_g_idx"] = (torch.arange(64, dtype=torch.int32) // 32)[order]
    save_file(tensors, tmp_path / "model.safetensors")
    found = linears(qfx.import_checkpoint(tmp_path))[UP]
    assert isinstance(found, QuantPermuted)
    codes = stored(tmp_path, f"{UP}.")["weight_packed"]
    values = torch.stack([codes >> 4 * i & 15 for i in range(8)], -1).flatten(1).to(torch.float32) - 8
    wanted = values * linears(model)[UP].w_scale[:, (torch.arange(64) // 32)[order]]
    assert torch.equal(found.weight, wanted)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found(x), x @ wanted.t(), atol=1e-5)


def test_scales_of_the_cache_are_told(tmp_path: Path) -> None:
    qfx.export_compressed_tensors(pack(llama(), "i4/g32"), tmp_path)
    extra = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file({**stored(tmp_path), **extra}, tmp_path / "model.safetensors")
    with pytest.warns(QfxWarning, match="scales of the key-value cache are not read"):
        qfx.import_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match="self_attn.k_scale"):
        qfx.import_checkpoint(tmp_path, strict=True)


# --- with the library itself -----------------------------------------------------------------------------------------


def library() -> Any:
    return pytest.importorskip("compressed_tensors", reason="pip install qfx[interop]")


ALL = [*((fmt, "", kind) for fmt, kind in KINDS.items()), *INPUTS]


@pytest.mark.parametrize(("fmt", "x", "kind"), ALL)
@pytest.mark.filterwarnings("ignore")
def test_the_library_decompresses_the_same_values(fmt: str, x: str, kind: str, tmp_path: Path) -> None:
    library()
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = pack(llama(), fmt, x_format=x)
    qfx.export_compressed_tensors(model, tmp_path)
    scheme = QuantizationConfig.model_validate(quantization_config(tmp_path)).config_groups["group_0"]
    for name, module in linears(model).items():
        found = BaseCompressor.get_value_from_registry(kind).decompress(stored(tmp_path, f"{name}."), scheme)["weight"]
        half = module.w_scale.dtype in (torch.float16, torch.bfloat16)  # the library multiplies in the scales' type,
        near = 1e-2 if half or kind == "nvfp4-pack-quantized" else 0.0  # and NVFP4 in bfloat16
        assert torch.allclose(found.float(), module.weight, rtol=near, atol=0), name


@pytest.mark.parametrize(("fmt", "x"), [("i4/g32", ""), ("i8/ch", "i8/tok"), ("f8e4m3/ch", "")])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_checkpoint(fmt: str, x: str, tmp_path: Path) -> None:
    library()
    import transformers

    model = pack(llama(), fmt, x_format=x)
    qfx.export_compressed_tensors(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = logits(loaded)
    for name, module in linears(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, module.weight), name
    if x:  # its 8-bit activations reach 127.5 steps, those of qfx 127
        assert torch.allclose(found, logits(model), atol=0.05 * float(found.abs().max()))
    else:
        assert torch.allclose(found, logits(model), atol=1e-5)


PRESETS = [
    ("W4A16", "i4/g32"), ("W4A16_ASYM", "u4/g32"), ("W8A16", "i8/g32"), ("W8A8", "i8/ch"), ("FP8_DYNAMIC", "f8e4m3/ch")
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "fmt"), PRESETS)
@pytest.mark.filterwarnings("ignore")
def test_what_the_library_writes_is_read_exactly(scheme: str, fmt: str, tmp_path: Path) -> None:
    library()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama()
    settings = QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"])
    args = settings.config_groups[scheme].weights
    if args.group_size:
        args.group_size = 32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_quantization_config(model, settings)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale"):
            group = args.group_size or module.weight.shape[1]
            parts = module.weight.detach().unflatten(1, (-1, group))
            scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape)
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    wanted = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = linears(qfx.import_checkpoint(tmp_path))
    assert len(found) == 14 and {m.w_format for m in found.values()} == {fmt}
    for name, module in found.items():
        assert torch.equal(module.weight, wanted[name]), name


@pytest.mark.filterwarnings("ignore")
def test_transformers_dequantizes_zero_points(tmp_path: Path) -> None:
    """Without `dequantize` its skeleton has them unpacked, so that no checkpoint with zero points loads."""
    library()
    import transformers

    model = pack(llama(), "u4/g32")
    qfx.export_compressed_tensors(model, tmp_path)
    how = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    for name, module in linears(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, module.weight), name
