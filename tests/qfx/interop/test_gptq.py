"""GPTQ checkpoints: what is written, read back, activation order, zero points, and what GPTQModel reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.interop.gptq import decoder
from qfx.live.permuted import QuantPermuted
from tests.interop import UP, linears, llama, logits, pack, quantization_config, same, stored, zero_points

FORMATS = ["i4/g32/f16", "u4/g32/f16", "i2/g16/f16", "u3/ch/f16", "i3/g32/f16", "i8/ch/f16", "u8/g32/f16", "i4/f16"]


def rewritten(folder: Path, **tensors: torch.Tensor) -> None:
    save_file({**stored(folder), **tensors}, folder / "model.safetensors")


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_come_back(fmt: str, version: Any, tmp_path: Path) -> None:
    model = pack(llama(), fmt)
    qfx.export_gptq(model, tmp_path, version=version)
    fields, found = quantization_config(tmp_path), qfx.import_checkpoint(tmp_path)
    wanted = qfx.Format.parse(fmt)
    assert (fields["bits"], fields["group_size"], fields["sym"]) == (wanted.bits, wanted.group or -1, wanted.symmetric)
    assert fields["desc_act"] is False and fields["checkpoint_format"] == version
    assert {m.w_format for m in linears(found).values()} == {fmt if wanted.granularity else "i4/ch/f16"}
    assert torch.equal(logits(model), logits(found))
    if wanted.granularity:
        assert same(model, found)


def test_the_layout_is_what_it_says(tmp_path: Path) -> None:
    model = pack(llama(), "u4/g32/f16")
    qfx.export_gptq(model, tmp_path)
    held = stored(tmp_path, f"{UP}.")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in held.items()} == {
        "qweight": (torch.int32, (8, 96)), "qzeros": (torch.int32, (2, 12)), "scales": (torch.float16, (2, 96)),
        "g_idx": (torch.int32, (64,)),
    }  # fmt: skip
    codes = torch.stack([held["qweight"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    zero = torch.stack([held["qzeros"] >> 4 * i & 15 for i in range(8)], -1).flatten(1) + 1
    group = held["g_idx"].long()
    values = (codes - zero[group]) * held["scales"].float()[group]
    assert torch.equal(values.t(), linears(model)[UP].weight)


def test_float32_scales_are_rounded_and_told(tmp_path: Path) -> None:
    model = pack(llama(), "i4/g32")
    with pytest.warns(QfxWarning, match=r"q_proj.* \(14 nodes\): the layout's scales are float16.*w=i4/g32/f16"):
        qfx.export_gptq(model, tmp_path)
    found = linears(qfx.import_checkpoint(tmp_path))
    for name, module in linears(model).items():
        assert torch.equal(found[name].w_codes, module.w_codes)
        assert torch.allclose(found[name].w_scale.float(), module.w_scale, rtol=2**-11, atol=0)
    with pytest.raises(UnsupportedError, match="scales are float16"):
        qfx.export_gptq(model, tmp_path / "strict", strict=True)


@pytest.mark.filterwarnings("ignore:.*scales are float16:qfx.QfxWarning")
@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        ("nf4/g32", "no layout for w=nf4/g32"),
        ("i5/g32/f16", "no layout for w=i5/g32"),
        ("i8/ch/f16", "one format, here 4 bits in groups of 32"),
        ("i4/g16/f16", "one format, here 4 bits in groups of 32"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_written_in_float(fmt: str, reason: str, tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "i4/g32/f16", "q_proj": "i4/g32/f16", "down_proj": fmt})
    with pytest.warns(QfxWarning, match=rf"down_proj.* \(2 nodes\): .*{reason}"):
        qfx.export_gptq(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert torch.allclose(logits(model), logits(found), atol=1e-5)
    assert (
        len(linears(found)) == 4
        and quantization_config(tmp_path)["dynamic"][r"-:^model\.layers\.0\.mlp\.down_proj$"] == {}
    )


def test_rows_that_fill_no_words_stay_float(tmp_path: Path) -> None:
    model = pack(llama(head_dim=12), {"k_proj": "i4/g32/f16", "up_proj": "i4/g32/f16"})
    with pytest.warns(QfxWarning, match=r"32 rows and columns at a time: \[24, 64\]"):
        qfx.export_gptq(model, tmp_path)


def test_scales_beyond_float16_stay_float(tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "i4/g32", "q_proj": "i4/g32/f16"})
    for module in linears(model).values():
        if module.w_scale.dtype == torch.float32:
            module.w_scale[0, 0] = 1e5
    with pytest.warns(QfxWarning, match=r"up_proj.* \(2 nodes\): its scales are beyond float16"):
        qfx.export_gptq(model, tmp_path)


def test_inputs_are_told(tmp_path: Path) -> None:
    with pytest.warns(QfxWarning, match="holds weights only: the input, x=i8/tok, stays float"):
        qfx.export_gptq(pack(llama(), "i8/ch/f16", x_format="i8/tok"), tmp_path)


def test_zero_points_of_zero_need_version_2(tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "u4/g32/f16", "q_proj": "u4/g32/f16"})
    first = linears(model)[UP]
    assert first.w_zero is not None
    first.w_zero[0, 0] = 0  # of two groups
    with pytest.warns(QfxWarning, match=f"{UP}: zero points of 0 have no form in version 'gptq'.*'gptq_v2'"):
        qfx.export_gptq(model, tmp_path / "v1")
    qfx.export_gptq(model, tmp_path / "v2", version="gptq_v2")
    assert same(model, qfx.import_checkpoint(tmp_path / "v2"))


def test_zero_points_of_zero_in_version_1_are_told(tmp_path: Path) -> None:
    model = pack(llama(), "u4/g32/f16")
    qfx.export_gptq(model, tmp_path)
    words = stored(tmp_path)[f"{UP}.qzeros"]
    words[0, 0] |= 0xF0  # column 1: z = 0, with the borrow that GPTQModel takes from column 2
    rewritten(tmp_path, **{f"{UP}.qzeros": words})
    with pytest.warns(QfxWarning, match="some of its zero points are 0.*read as GPTQModel does"):
        found = linears(qfx.import_checkpoint(tmp_path))[UP]
    assert int(zero_points(found)[1, 0]) == 0


def act_order(folder: Path, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a checkpoint's up_proj an activation order; its weight [N, K] and g_idx."""
    held = stored(folder, f"{UP}.")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    g_idx = (torch.arange(64, dtype=torch.int32) // group)[order]
    rewritten(folder, **{f"{UP}.g_idx": g_idx})
    codes = torch.stack([held["qweight"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    zero = torch.stack([held["qzeros"] >> 4 * i & 15 for i in range(8)], -1).flatten(1) + 1
    return ((codes - zero[g_idx.long()]) * held["scales"].float()[g_idx.long()]).t(), g_idx


def test_activation_order_is_exact(tmp_path: Path) -> None:
    qfx.export_gptq(pack(llama(), "u4/g32/f16"), tmp_path / "a")
    weight, g_idx = act_order(tmp_path / "a")
    model = qfx.import_checkpoint(tmp_path / "a", strict=True)
    found = linears(model)[UP]
    assert isinstance(found, QuantPermuted) and torch.equal(found.weight, weight)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found(x), x @ weight.t(), atol=1e-5)
    qfx.export_gptq(model, tmp_path / "b")
    assert quantization_config(tmp_path / "b")["desc_act"] is True
    assert torch.equal(stored(tmp_path / "b")[f"{UP}.g_idx"], g_idx)
    for name, tensor in stored(tmp_path / "a").items():
        assert torch.equal(stored(tmp_path / "b")[name], tensor), name


def test_groups_of_unequal_size_are_dequantized(tmp_path: Path) -> None:
    qfx.export_gptq(pack(llama(), "u4/g32/f16"), tmp_path)
    g_idx = torch.zeros(64, dtype=torch.int32)
    g_idx[:20] = 1
    rewritten(tmp_path, **{f"{UP}.g_idx": g_idx})
    with pytest.warns(QfxWarning, match=f"{UP}: its g_idx has groups of unequal size"):
        model = qfx.import_checkpoint(tmp_path)
    held = stored(tmp_path, f"{UP}.")
    codes = torch.stack([held["qweight"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    zero = torch.stack([held["qzeros"] >> 4 * i & 15 for i in range(8)], -1).flatten(1) + 1
    wanted = ((codes - zero[g_idx.long()]) * held["scales"].float()[g_idx.long()]).t()
    assert type(model.get_submodule(UP)) is torch.nn.Linear and torch.equal(model.get_submodule(UP).weight, wanted)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="unequal size"):
        qfx.import_checkpoint(tmp_path, strict=True)


def regrouped(folder: Path, group: int, *, keep: tuple[str, ...] = (), **fields: Any) -> torch.nn.Module:
    """A checkpoint of 160 columns in groups of `group` (the last of them shorter) whose config says something else; of
    g_idx those that `keep` names. Returns the model that was written."""
    model: torch.nn.Module = pack(
        llama(hidden_size=160, num_attention_heads=5, num_key_value_heads=5), f"u4/g{group}/f16"
    )
    qfx.export_gptq(model, folder, version="gptq_v2")
    save_file(
        {n: t for n, t in stored(folder).items() if "g_idx" not in n or n.endswith(keep)}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"group_size": 16, "dynamic": {"-:.*lm_head": {}, r"+:model\.layers\..*": {"bits": 4, "group_size": 64}}},
        {"group_size": 16, "dynamic": {r".*": {"group_size": 64}, ".*_proj": {"group_size": 16}}},
    ],
)
def test_group_sizes_of_their_own_are_read(fields: dict[str, Any], tmp_path: Path) -> None:
    model = regrouped(tmp_path, 64, **fields)
    assert torch.equal(logits(qfx.import_checkpoint(tmp_path, strict=True)), logits(model))


@pytest.mark.parametrize("size", [-1, 16])
def test_the_group_of_each_column_tells_the_size(size: int, tmp_path: Path) -> None:
    model = regrouped(tmp_path, 64, keep=("g_idx",), group_size=size)
    assert torch.equal(logits(qfx.import_checkpoint(tmp_path, strict=True)), logits(model))


def test_a_group_size_that_nothing_tells_is_told_or_refused(tmp_path: Path) -> None:
    model = regrouped(tmp_path / "a", 64, group_size=-1)
    with pytest.warns(QfxWarning) as told:
        assert torch.equal(logits(qfx.import_checkpoint(tmp_path / "a")), logits(model))
    for counts in ("2 for 96", "3 for 160"):
        reason = f"the config says no group size, the file has {counts} columns: read as groups of 64"
        assert any(reason in str(warning.message) for warning in told)
    with pytest.raises(UnsupportedError, match="read as groups of 64"):
        qfx.import_checkpoint(tmp_path / "a", strict=True)
    regrouped(tmp_path / "b", 24, group_size=128)
    with pytest.raises(ValueError, match=r"scales' does not fit(.|\n)*columns in groups of 128, as the config says"):
        qfx.import_checkpoint(tmp_path / "b")


@pytest.mark.parametrize(
    ("leaf", "tensor", "message"),
    [
        ("g_idx", torch.full((64,), 2, dtype=torch.int32), r"up_proj.g_idx' does not fit.*(.|\n)*groups 0 to 1"),
        ("g_idx", torch.zeros(60, dtype=torch.int32), r"up_proj.g_idx' does not fit"),
        ("scales", torch.ones(3, 96, dtype=torch.float16), r"up_proj.scales' does not fit|qzeros"),
        ("qweight", torch.zeros(9, 96, dtype=torch.int32), r"up_proj.qweight' does not fit.*another architecture"),
        ("qzeros", torch.zeros(2, 11, dtype=torch.int32), r"up_proj.qzeros' does not hold 96 codes of 4 bits"),
    ],
)
def test_tensors_that_do_not_fit_are_named(leaf: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    qfx.export_gptq(pack(llama(), "u4/g32/f16"), tmp_path)
    rewritten(tmp_path, **{f"{UP}.{leaf}": tensor})
    with pytest.raises(ValueError, match=message):
        qfx.import_checkpoint(tmp_path)


def test_unknown_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown version 'v3'(.|\n)*'gptq' or 'gptq_v2'"):
        qfx.export_gptq(pack(llama(), "i4/g32/f16"), tmp_path, version="v3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown version 'marlin' of GPTQ's layout"):
        decoder({"checkpoint_format": "marlin", "group_size": 128})
    with pytest.raises(ValueError, match="pack_dtype 'int32'"):
        decoder({"pack_dtype": "int64", "group_size": 128})


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64]), st.booleans(), st.integers(0, 2**30))
def test_any_columns_in_any_order_decode(bits: int, group: int, ordered: bool, seed: int) -> None:
    """w = scale (code - z) of the column's group, whatever the order."""
    from qfx.interop.linear import Linear
    from qfx.interop.words import pack_words

    generator = torch.Generator().manual_seed(seed)
    n, k = 32, 64
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (n, k // group), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) + 0.1).to(torch.float16)
    g_idx = torch.arange(k) // group
    g_idx = g_idx if ordered else g_idx[torch.randperm(k, generator=generator)]
    tensors = {
        "qweight": pack_words(codes, bits).t(), "qzeros": pack_words(zero.t(), bits), "scales": scale.t(),
        "g_idx": g_idx.to(torch.int32),
    }  # fmt: skip
    settings = {"checkpoint_format": "gptq_v2", "group_size": group}
    found = decoder(settings).decode("a", ("Linear",), tensors, (n, k))
    assert isinstance(found, Linear)
    weight = found.packed.dequantize()
    if found.columns is not None:
        weight = weight[:, torch.argsort(found.columns)]
    assert torch.equal(weight, (codes.float() - zero.float()[:, g_idx]) * scale.float()[:, g_idx])


# --- with GPTQModel itself -------------------------------------------------------------------------------------------


def library_linear(bits: int, group: int, n: int, k: int, **more: Any) -> Any:
    pytest.importorskip("gptqmodel", reason="pip install qfx[interop]")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=k, out_features=n, bias=False, **more
    )


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("fmt", FORMATS[:-1])
@pytest.mark.filterwarnings("ignore")
def test_the_library_dequantizes_the_same_values(fmt: str, version: Any, tmp_path: Path) -> None:
    kind = qfx.Format.parse(fmt)
    model = pack(llama(), fmt)
    qfx.export_gptq(model, tmp_path, version=version)
    if kind.bits == 4:
        act_order(tmp_path)
    found = linears(qfx.import_checkpoint(tmp_path))
    for name in (UP, "model.layers.1.mlp.down_proj"):
        module = found[name]
        n, k = module.shape
        other = library_linear(kind.bits, kind.group or -1, n, k)
        held = stored(tmp_path, f"{name}.")
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            assert getattr(other, leaf).shape == held[leaf].shape, leaf
            setattr(other, leaf, held[leaf])
        if version == "gptq":
            from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

            convert_gptq_v1_to_v2_format_module(other, kind.bits, torch.int32)
        other.post_init()
        values = other.dequantize_weight().t()
        # the library multiplies in float16
        assert torch.equal(values, module.to(torch.float16).weight) or torch.allclose(
            values.float(), module.weight.float(), rtol=1e-3, atol=0
        ), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.filterwarnings("ignore")
def test_what_the_library_packs_is_read_exactly(bits: int) -> None:
    n, k, group = 96, 64, 32
    other = library_linear(bits, group, n, k)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator)
    zero = torch.randint(0, 2**bits, (n, k // group), generator=generator)
    scale = torch.rand(n, k // group, generator=generator).to(torch.float16).float() + 0.25
    order = (torch.arange(k) // group)[torch.randperm(k, generator=generator)]
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = (codes - zero[:, order]) * scale[:, order]
    other.pack_original(linear=linear, scales=scale, zeros=zero.float(), g_idx=order.to(torch.int32))
    tensors = {leaf: getattr(other, leaf) for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    settings = {"checkpoint_format": "gptq_v2", "group_size": group}
    found: Any = decoder(settings).decode("a", ("Linear",), tensors, (n, k))
    weight = found.packed.dequantize()[:, torch.argsort(found.columns)]
    assert torch.equal(weight, (codes - zero[:, order]) * scale.to(torch.float16).float()[:, order])


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="pip install qfx[interop]")
    pytest.importorskip("optimum", reason="pip install qfx[interop]")
    import transformers

    model = pack(llama(), "u4/g32/f16")
    qfx.export_gptq(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float16)
    assert type(loaded.get_submodule(UP)).__module__.startswith("gptqmodel")
    wanted = logits(model)  # in float32
    assert torch.allclose(logits(loaded).float(), wanted, atol=5e-3 * float(wanted.abs().max()))
