"""bitsandbytes checkpoints: NF4 written and read, double quantization, LLM.int8 and FP4 read, and the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.interop.bnb import _encode, decoder
from qfx.interop.linear import Dequantized, Linear
from qfx.numerics import NF4_VALUES, effective_scale
from qfx.rounding.nested import dynamic_map
from tests.interop import UP, falcon, linears, llama, logits, pack, same, stored

STATE = "weight.quant_state.bitsandbytes__nf4"


def state_of(folder: Path, name: str = UP) -> dict[str, Any]:
    return dict(json.loads(bytes(stored(folder, f"{name}.")[STATE].tolist())))


@pytest.mark.parametrize("fmt", ["nf4/g32", "nf4/g32/f16"])
def test_weights_come_back(fmt: str, tmp_path: Path) -> None:
    model = pack(llama(), fmt)
    qfx.export_bnb(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path, strict=True)
    assert same(model, found) and torch.equal(logits(model), logits(found))
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "bitsandbytes" and fields["bnb_4bit_quant_type"] == "nf4"
    assert fields["llm_int8_skip_modules"] == ["lm_head"] and fields["load_in_4bit"] is True


def test_the_layout_is_what_it_says(tmp_path: Path) -> None:
    model = pack(llama(), "nf4/g32")
    qfx.export_bnb(model, tmp_path)
    held = stored(tmp_path, f"{UP}.")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in held.items() if name != STATE} == {
        "weight": (torch.uint8, (3072, 1)), "weight.absmax": (torch.float32, (192,)),
        "weight.quant_map": (torch.float32, (16,)),
    }  # fmt: skip
    assert state_of(tmp_path) == {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [96, 64]}
    data, table = held["weight"].flatten(), held["weight.quant_map"]
    values = torch.stack((table[(data >> 4).long()], table[(data & 15).long()]), -1).reshape(-1, 32)
    assert torch.equal((values * held["weight.absmax"][:, None]).reshape(96, 64), linears(model)[UP].weight)


def test_double_quantization_rounds_scales_alone(tmp_path: Path) -> None:
    model = pack(llama(), "nf4/g32")
    qfx.export_bnb(model, tmp_path, double_quant=True)
    held = stored(tmp_path, f"{UP}.")
    assert held["weight.absmax"].dtype == torch.uint8 and held["weight.nested_absmax"].shape == (1,)
    assert state_of(tmp_path)["nested_blocksize"] == 256
    found = linears(qfx.import_checkpoint(tmp_path))
    for name, module in linears(model).items():
        assert torch.equal(found[name].w_codes, module.w_codes) and found[name].w_format == "nf4/g32/dq"
        change = (scales_of(found[name]) - module.w_scale).abs().max()
        assert 0 < change < 0.02 * module.w_scale.max()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]


def scales_of(module: Any) -> torch.Tensor:
    """The f32 scales of a linear."""
    return effective_scale(module.w_scale, module.w_zero, qfx.Format.parse(module.w_format))


@pytest.mark.parametrize("double_quant", [False, True])
def test_double_quantized_scales_are_kept(double_quant: bool, tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "nf4/g32/dq", "o_proj": "nf4/g64/dq", "q_proj": "nf4/g32"})
    qfx.export_bnb(model, tmp_path, double_quant=double_quant)
    held = stored(tmp_path, f"{UP}.")
    assert held["weight.absmax"].dtype == torch.uint8
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"]
    found = linears(qfx.import_checkpoint(tmp_path, strict=True))
    for name, module in linears(model).items():
        assert torch.equal(found[name].w_codes, module.w_codes)
        exact = module.w_format.endswith("dq") or not double_quant
        assert torch.equal(scales_of(found[name]), scales_of(module)) == exact, name
        assert found[name].w_format == (module.w_format if exact else "nf4/g32/dq")


@pytest.mark.parametrize("change", ["block", "table"])
def test_other_nested_scales_are_read_in_float32(change: str) -> None:
    tensors, _ = _tensors(4, 64, 32)
    block, table = (4, dynamic_map()) if change == "block" else (256, dynamic_map().flip(0))
    inner, codes = torch.rand(-(-8 // block)) + 1, torch.arange(8, dtype=torch.uint8) * 30
    (leaf,) = [name for name in tensors if "quant_state" in name]
    state = json.loads(bytes(tensors[leaf].tolist())) | {"nested_blocksize": block, "nested_offset": 3.0}
    tensors |= {
        "weight.absmax": codes, "weight.nested_absmax": inner, "weight.nested_quant_map": table,
        leaf: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    found = decoder({}).decode("a", ("Linear",), tensors, (4, 64))
    assert isinstance(found, Linear) and str(found.format) == "nf4/g32"
    assert f"blocks of {block} or under a table" in found.lost[0][0]
    wanted = table[codes.long()] * inner.repeat_interleave(block)[:8] + 3.0
    assert torch.equal(found.packed.scale.reshape(-1), wanted)


def test_nested_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    qfx.export_bnb(pack(llama(), "nf4/g32/dq"), tmp_path)
    held = {name.removeprefix(f"{UP}."): tensor for name, tensor in stored(tmp_path, f"{UP}.").items()}
    cut = {**held, "weight.nested_absmax": torch.ones(3)}
    with pytest.raises(ValueError, match=r"nested_absmax' does not fit(.|\n)*1 scales above the 192"):
        decoder({}).decode("a", ("Linear",), cut, (96, 64))
    state = json.loads(bytes(held[STATE].tolist()))
    del state["nested_offset"]
    cut = {**held, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="the quant_state of 'a' lacks nested_offset"):
        decoder({}).decode("a", ("Linear",), cut, (96, 64))


def test_the_dynamic_map() -> None:
    table = dynamic_map()
    assert table.shape == (256,) and torch.equal(table, table.sort().values) and table.unique().numel() == 256
    assert table[-1] == 1.0 and table[0] == -table[-2] and 0.0 in table.tolist()
    assert torch.isclose(table[-2], torch.tensor((1 + 1 - 0.9 / 64) / 2))
    assert torch.isclose(table[table > 0].min(), torch.tensor(0.55e-6))


@pytest.mark.parametrize(
    ("fmt", "reason"), [("i4/g32", "no layout for w=i4/g32"), ("nf4/g64", "96 columns are no whole groups"),
                        ("nf4/g16", "no layout for w=nf4/g16"), ("nf4/ch", "no layout for w=nf4/ch")]
)  # fmt: skip
def test_what_it_cannot_hold_is_written_in_float(fmt: str, reason: str, tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "nf4/g32", "down_proj": fmt})
    with pytest.warns(QfxWarning, match=rf"down_proj.* \(2 nodes\): .*{reason}"):
        qfx.export_bnb(model, tmp_path)
    found = qfx.import_checkpoint(tmp_path)
    assert len(linears(found)) == 2 and torch.allclose(logits(model), logits(found), atol=1e-5)
    with pytest.raises(UnsupportedError, match=reason):
        qfx.export_bnb(model, tmp_path / "strict", strict=True)


def test_rows_of_a_power_of_two_are_one_block(tmp_path: Path) -> None:
    model = pack(llama(), {"up_proj": "nf4/ch"})
    qfx.export_bnb(model, tmp_path)
    assert state_of(tmp_path)["blocksize"] == 64
    assert torch.equal(linears(qfx.import_checkpoint(tmp_path))[UP].weight, linears(model)[UP].weight)


def test_llm_int8_is_read() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (6, 10), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, generator=generator)
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = decoder({}).decode("a", ("Linear",), tensors, (6, 10))
    assert isinstance(found, Linear) and str(found.format) == "i8/ch"
    assert torch.equal(found.packed.codes(), codes)
    assert torch.equal(found.packed.dequantize(), codes * (scale / 127).reshape(-1, 1))
    with pytest.raises(ValueError, match=r"'a.weight' does not fit(.|\n)*int8, \[6, 12\]"):
        decoder({}).decode("a", ("Linear",), tensors, (6, 12))


def _tensors(n: int, k: int, block: int, kind: str = "nf4") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (n * k,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-n * k // block), generator=generator)
    table = torch.tensor(NF4_VALUES) if kind == "nf4" else torch.linspace(-1, 1, 16)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [n, k]}
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), "weight.absmax": absmax, "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    spread = absmax.repeat_interleave(block)[: n * k]
    return tensors, (table[codes.long()] * spread).reshape(n, k)


@pytest.mark.parametrize(
    ("n", "k", "kind", "reason"),
    [(4, 48, "nf4", "blocks of 32 across its rows of 48"), (4, 64, "fp4", "its type is fp4")],
)
def test_what_no_format_holds_is_dequantized(n: int, k: int, kind: str, reason: str) -> None:
    tensors, wanted = _tensors(n, k, 32, kind)
    found = decoder({}).decode("a", ("Linear",), tensors, (n, k))
    assert isinstance(found, Dequantized) and torch.equal(found.weight, wanted)
    assert reason in found.lost[0][0]


def test_other_storage_types_are_read() -> None:
    tensors, wanted = _tensors(4, 64, 32)
    tensors["weight"] = tensors["weight"].reshape(-1).view(torch.float32).reshape(-1, 1)
    found = decoder({}).decode("a", ("Linear",), tensors, (4, 64))
    assert isinstance(found, Linear) and torch.equal(found.packed.dequantize(), wanted)


def test_a_quant_state_that_is_cut_short_is_named(tmp_path: Path) -> None:
    qfx.export_bnb(pack(llama(), "nf4/g32"), tmp_path)
    held = stored(tmp_path)
    for value, message in ((held[f"{UP}.{STATE}"][:20], "is no JSON"), (torch.tensor([123, 125]), "lacks blocksize")):
        save_file({**held, f"{UP}.{STATE}": value.to(torch.uint8)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"nf4' {message}"):
            qfx.import_checkpoint(tmp_path)


# --- with the library itself -----------------------------------------------------------------------------------------


def library() -> Any:
    return pytest.importorskip("bitsandbytes", reason="pip install qfx[interop]")


@pytest.mark.filterwarnings("ignore")
def test_the_tables_are_the_librarys() -> None:
    functional = library().functional
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    assert torch.equal(torch.tensor(NF4_VALUES), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("fmt", ["nf4/g32", "nf4/g32/dq"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_the_library_dequantizes_the_same_values(double_quant: bool, fmt: str, tmp_path: Path) -> None:
    functional = library().functional
    model = pack(llama(), fmt)
    qfx.export_bnb(model, tmp_path, double_quant=double_quant)
    found = linears(qfx.import_checkpoint(tmp_path))
    for name, module in found.items():
        held = stored(tmp_path, f"{name}.")
        weight = held.pop("weight")
        state = functional.QuantState.from_dict(held, device=torch.device("cpu"))
        assert state.nested == (double_quant or fmt.endswith("dq"))
        assert torch.equal(functional.dequantize_4bit(weight, state), module.weight), name


@pytest.mark.parametrize("shape", [(96, 128), (200, 1024)])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_the_library_writes_is_read_exactly(double_quant: bool, block: int, shape: tuple[int, int]) -> None:
    """And written again the same, tensor by tensor."""
    functional = library().functional
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=double_quant, quant_type="nf4")
    tensors = {"weight": data, **{f"weight.{leaf}": t for leaf, t in state.as_dict(packed=True).items()}}
    found = decoder({}).decode("a", ("Linear",), tensors, shape)
    assert isinstance(found, Linear) and str(found.format) == f"nf4/g{block}" + ("/dq" if double_quant else "")
    assert torch.equal(found.packed.dequantize(), functional.dequantize_4bit(data, state))
    again = _encode(found, double_quant=False)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors if "quant_state" not in name)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_checkpoint(double_quant: bool, tmp_path: Path) -> None:
    library()
    import transformers

    model = pack(llama(), "nf4/g32")
    qfx.export_bnb(model, tmp_path, double_quant=double_quant)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = qfx.import_checkpoint(tmp_path)
    found = loaded.get_submodule(UP)
    values = library().functional.dequantize_4bit(found.weight.data, found.weight.quant_state)
    assert torch.allclose(values, linears(wanted)[UP].weight, rtol=1e-6, atol=0)
    # its kernels compute in less than float32
    assert torch.allclose(logits(loaded), logits(wanted), atol=0.05 * float(logits(wanted).abs().max()))


def test_a_class_derived_from_linear_is_written_in_float(tmp_path: Path) -> None:
    """transformers puts the library's linears in the place of nn.Linear itself alone."""
    model = falcon("nf4/g32")
    with pytest.raises(ValueError, match=r"takes the place of nn.Linear itself(.|\n)*export_compressed_tensors"):
        qfx.export_bnb(model, tmp_path)
