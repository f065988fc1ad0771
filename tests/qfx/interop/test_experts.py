"""Experts that a checkpoint holds one by one, read into models that hold them together."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qfx
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.interop import compressed_tensors
from qfx.interop.experts import joined
from qfx.interop.linear import Dequantized, Linear
from qfx.live.parameters import pack_parameter
from qfx.packing import pack_weight
from tests.interop import pack, quantization_config, stored
from tests.zoo import ZOO

ONE_BY_ONE = pytest.mark.filterwarnings("ignore:.*experts one by one")
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def written(name: str, folder: Path, fmt: str, odd: str = "") -> tuple[Any, dict[str, Any]]:
    """A checkpoint with experts of its own, one by one, as `fmt` (the last one as `odd`); model and inputs."""
    model: Any
    model, inputs = ZOO[name]()
    pack(model, {"q_proj": fmt})
    qfx.export_compressed_tensors(model, folder)
    tensors = stored(folder)
    for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
        stem = key.removesuffix("gate_up_proj")
        gate_up, down = tensors.pop(key), tensors.pop(f"{stem}down_proj")
        module = model.get_submodule(stem[:-1])
        if name == "mixtral":
            stem = stem.replace(".mlp.", ".block_sparse_moe.")
        for number in range(len(down)):
            for part, weight in zip(NAMES[name], (*gate_up[number].chunk(2), down[number]), strict=True):
                fqn = f"{stem}{number}.{part}"
                text = odd if odd and number == len(down) - 1 else fmt
                if text == "float":
                    tensors[f"{fqn}.weight"] = weight.contiguous()
                    continue
                packed = pack_weight(weight, Format.parse(text))
                weight.copy_(packed.dequantize())
                leaves = compressed_tensors._encode(Linear(fqn, packed))
                tensors |= {f"{fqn}.{leaf}": tensor for leaf, tensor in leaves.items()}
        module.gate_up_proj.data, module.down_proj.data = gate_up, down
    for key in [key for key in tensors if ".mlp.gate." in key and name == "mixtral"]:
        tensors[key.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(key)
    save_file(tensors, folder / "model.safetensors")
    return model, inputs


@torch.no_grad()
@pytest.mark.parametrize("fmt", ["i4/g16", "u4/g16", "i8/ch", "i6"])
@pytest.mark.parametrize("name", list(NAMES))
def test_experts_are_put_together(name: str, fmt: str, tmp_path: Path) -> None:
    model, inputs = written(name, tmp_path, fmt)
    found: Any = qfx.import_checkpoint(tmp_path, strict=True)
    experts = found.model.layers[0].mlp.experts
    assert set(experts.qfx_packed) == {"gate_up_proj", "down_proj"}
    assert experts.qfx_packed["down_proj"].format == (fmt if fmt != "i6" else "i6/ch")
    assert torch.equal(experts.gate_up_proj, model.model.layers[0].mlp.experts.gate_up_proj)
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_experts_of_which_one_is_float_are_dequantized(tmp_path: Path) -> None:
    model, inputs = written("qwen3_moe", tmp_path, "i4/g16", "float")
    with pytest.warns(QfxWarning, match=r"experts.gate_up_proj.* \(4 nodes\): experts of several formats"):
        found: Any = qfx.import_checkpoint(tmp_path)
    assert not hasattr(found.model.layers[0].mlp.experts, "qfx_packed")
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("gone", ["0.gate_proj.weight_scale", "1.up_proj.weight_packed", "2.down_proj.weight"])
def test_a_missing_expert_is_named(gone: str, tmp_path: Path) -> None:
    written("qwen3_moe", tmp_path, "i4/g16")
    tensors = {name: t for name, t in stored(tmp_path).items() if f"layers.0.mlp.experts.{gone}" not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.\d\.(gate|up|down)"):
        qfx.import_checkpoint(tmp_path)


# --- written


WRITERS: dict[str, Any] = {
    "compressed-tensors": qfx.export_compressed_tensors, "gptq": qfx.export_gptq, "awq": qfx.export_awq,
}  # fmt: skip
LEAF = {"compressed-tensors": "weight_packed", "gptq": "qweight", "awq": "qweight"}


def packed_experts(
    name: str, fmt: str, down: str = "", *, sizes: int = 96, linears: str = ""
) -> tuple[Any, dict[str, Any]]:
    """A model whose q_proj (as `linears`) and experts (the second matrices as `down`, "float": not) are packed, and
    inputs."""
    model: Any
    model, inputs = ZOO[name]()
    config = copy.deepcopy(model.config)
    setattr(config, "intermediate_size" if name == "mixtral" else "moe_intermediate_size", sizes)
    torch.manual_seed(0)
    model = type(model)(config).eval()
    pack(model, {"q_proj": linears or fmt})
    for layer in model.model.layers:
        for leaf, text in (("gate_up_proj", fmt), ("down_proj", down or fmt)):
            if text != "float":
                held = layer.mlp.experts._parameters[leaf]
                pack_parameter(layer.mlp.experts, leaf, pack_weight(held, Format.parse(text)))
    return model, inputs


RUN = """
import sys, torch, gptqmodel
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
model = gptqmodel.GPTQModel.load(folder, backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16).model
with torch.no_grad():
    found = model(input_ids=load_file(f"{folder}/inputs.bin")["ids"]).logits.float()
save_file({"logits": found.contiguous()}, f"{folder}/logits.safetensors")
"""


def parts_of(folder: Path, leaf: str) -> set[str]:
    return {key.removesuffix(f".{leaf}") for key in stored(folder) if ".experts." in key and key.endswith(leaf)}


@torch.no_grad()
@pytest.mark.parametrize("fmt", ["u4/g32/f16", "i4/g32/f16"])
@pytest.mark.parametrize("layout", list(WRITERS))
@pytest.mark.parametrize("name", list(NAMES))
def test_experts_are_written_one_by_one(name: str, layout: str, fmt: str, tmp_path: Path) -> None:
    model, inputs = packed_experts(name, fmt)
    with pytest.warns(QfxWarning, match=r"experts.* \(2 nodes\): .* one by one, and transformers") as told:
        WRITERS[layout](model, tmp_path, strict=True, **({"version": "gptq_v2"} if layout == "gptq" else {}))
    assert len(told) == 1
    layer = "block_sparse_moe" if name == "mixtral" else "mlp"
    count, layers = model.config.num_local_experts if name == "mixtral" else model.config.num_experts, range(2)
    assert parts_of(tmp_path, LEAF[layout]) == {
        f"model.layers.{i}.{layer}.experts.{e}.{leaf}" for i in layers for e in range(count) for leaf in NAMES[name]
    }
    names = stored(tmp_path).keys()
    assert f"model.layers.0.{layer}.gate.weight" in names and not any("gate_up_proj" in key for key in names)
    found: Any = qfx.import_checkpoint(tmp_path, strict=True)
    for one, other in zip(model.model.layers, found.model.layers, strict=True):
        for leaf in ("gate_up_proj", "down_proj"):
            assert other.mlp.experts.qfx_packed[leaf].format.startswith(fmt.removesuffix("/f16"))
            for part in ("codes", "zero"):
                held = one.mlp.experts._buffers[f"{leaf}_w_{part}"], other.mlp.experts._buffers[f"{leaf}_w_{part}"]
                assert held[0] is held[1] is None or torch.equal(*held)
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
@ONE_BY_ONE
def test_what_the_layout_does_not_hold_of_experts_is_float(tmp_path: Path) -> None:
    model, inputs = packed_experts("qwen3_moe", "i4/g32/f16", "i4/g32/f16", sizes=48)  # groups do not divide 48
    with pytest.warns(QfxWarning, match=r"down_proj.* \(8 nodes\): .* needs whole groups"):
        qfx.export_compressed_tensors(model, tmp_path)
    assert {name.rpartition(".")[2] for name in parts_of(tmp_path, "weight_packed")} == {"gate_proj", "up_proj"}
    assert {name.rpartition(".")[2] for name in parts_of(tmp_path, "weight")} == {"down_proj"}
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.1.mlp.gate", "model.layers.0.mlp.experts.3.down_proj", "lm_head"} <= set(ignored)
    found: Any = qfx.import_checkpoint(tmp_path)
    assert torch.allclose(found(**inputs).logits, model(**inputs).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("down", ["float", "i8/ch"])
def test_other_formats_beside(down: str, tmp_path: Path) -> None:
    model, inputs = packed_experts("mixtral", "i4/g32", down)
    with pytest.warns(QfxWarning, match="one by one"):
        qfx.export_compressed_tensors(model, tmp_path, strict=True)
    found: Any = qfx.import_checkpoint(tmp_path, strict=True)
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    held = {"gate_up_proj"} if down == "float" else {"gate_up_proj", "down_proj"}
    assert set(found.model.layers[0].mlp.experts.qfx_packed) == held


@ONE_BY_ONE
@pytest.mark.parametrize("fmt", ["nf4/g32/dq", "i8/b64x16"])
def test_scales_across_experts_are_not_cut(fmt: str, tmp_path: Path) -> None:
    """Double quantization has blocks over all experts, and 96 rows are no whole blocks of 64."""
    model, _ = packed_experts("mixtral", "i4/g32")
    experts = model.model.layers[0].mlp.experts
    for leaf in ("gate_up_proj", "down_proj"):
        value = getattr(experts, leaf)
        experts.register_parameter(f"{leaf}_float", torch.nn.Parameter(value))
        del experts._parameters[f"{leaf}_float"]
        specs = dict(experts.qfx_packed)
        packed = pack_weight(value, Format.parse(fmt))
        specs[leaf] = dataclasses.replace(specs[leaf], format=fmt)
        experts.qfx_packed = specs
        for part, tensor in (("codes", packed.data), ("scale", packed.scale), ("zero", packed.zero)):
            experts._buffers[f"{leaf}_w_{part}"] = tensor
    with pytest.warns(QfxWarning, match=r"layers\.0\.mlp\.experts\..*a parameter that its module reads itself"):
        qfx.export_compressed_tensors(model, tmp_path)
    names = stored(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names, "together, in float"
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight_packed" in names


@pytest.mark.parametrize("layout", list(WRITERS))
def test_transformers_may_want_them_in_float(layout: str, tmp_path: Path) -> None:
    model, inputs = packed_experts("qwen3_moe", "i4/g32/f16")
    with pytest.warns(
        QfxWarning, match=r"experts.gate_up_proj.* \(4 nodes\): .*a parameter that its module reads itself"
    ):
        WRITERS[layout](model, tmp_path, experts=False)
    assert not parts_of(tmp_path, LEAF[layout]) and "model.layers.0.mlp.experts.down_proj" in stored(tmp_path)
    with torch.no_grad():
        found = qfx.import_checkpoint(tmp_path)(**inputs).logits
        assert torch.allclose(found, model(**inputs).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gptqmodel_runs_them(tmp_path: Path) -> None:
    """In a process of its own: the library changes classes of transformers."""
    pytest.importorskip("gptqmodel", reason="pip install qfx[interop]")
    model, inputs = packed_experts("qwen3_moe", "i4/g32/f16", sizes=128)
    qfx.export_gptq(model, tmp_path)
    save_file({"ids": inputs["input_ids"]}, tmp_path / "inputs.bin")
    done = subprocess.run([sys.executable, "-c", RUN, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.allclose(found, model(**inputs).logits, atol=5e-3)


@ONE_BY_ONE
def test_the_group_of_experts_is_known_by_an_expression(tmp_path: Path) -> None:
    """By which transformers tells their scheme from that of the other linears."""
    model, inputs = packed_experts("qwen3_moe", "i8/ch", "i4/g32")
    qfx.export_compressed_tensors(model, tmp_path)
    groups = quantization_config(tmp_path)["config_groups"]
    names = [name for group in groups.values() for name in group["targets"] if "experts" in name]
    assert len(groups) == 2 and r"re:^model\.layers\.0\.mlp\.experts\.3\.down_proj$" in names
    assert all(name.startswith("re:") for name in names)
    with torch.no_grad():
        assert torch.equal(qfx.import_checkpoint(tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("fmt", "down", "told"),
    [
        (
            "i4/g32",
            "i4/g32/f16",
            r"transformers without CompressedTensorsConfig\(dequantize=True\) takes them together",
        ),
        ("u4/g32", "", "transformers reads no experts of u4/g32, or makes wrong numbers of them"),
        ("i4/g32", "i8/ch", "transformers reads no experts of i4/g32, i8/ch, or makes"),
        ("f8e4m3/b32x32", "", "transformers reads no experts of f8e4m3/b32x32"),
    ],
)
def test_who_does_not_read_them_is_told(fmt: str, down: str, told: str, tmp_path: Path) -> None:
    model, _ = packed_experts("qwen3_moe", fmt, down)
    with pytest.warns(QfxWarning, match=told):
        qfx.export_compressed_tensors(model, tmp_path)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("mixtral", ""), ("qwen3_moe", ""), ("qwen3_moe", "i8/ch")])
@pytest.mark.filterwarnings("ignore")
def test_transformers_puts_them_together(name: str, other: str, tmp_path: Path) -> None:
    """other: the format of the linears, where it is not that of the experts."""
    pytest.importorskip("compressed_tensors", reason="pip install qfx[interop]")
    import transformers

    model, inputs = packed_experts(name, "i4/g32", linears=other)
    qfx.export_compressed_tensors(model, tmp_path)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert torch.allclose(found(**inputs).logits, model(**inputs).logits, atol=1e-4)


def part(seed: int, fmt: str, n: int = 4) -> Linear:
    weight = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return Linear(f"e{seed}", pack_weight(weight, Format.parse(fmt)))


def values(rows: list[list[Linear]]) -> Tensor:
    return torch.stack([torch.cat([p.packed.dequantize() for p in parts]) for parts in rows])


@pytest.mark.parametrize("fmt", ["u3/g16", "i5/ch", "f8e4m3/ch", "nf4/g32", "f4e2m1/g32/e8m0"])
def test_joined_parts_are_what_they_were(fmt: str) -> None:
    rows = [[part(2 * i, fmt), part(2 * i + 1, fmt)] for i in range(3)]
    found, lost = joined(rows)
    assert not isinstance(found, Tensor) and not lost and found.shape == (3, 8, 32)
    assert str(found.format) == fmt and torch.equal(found.dequantize(), values(rows))


@pytest.mark.parametrize("fmt", ["f4e2m1/g16/e4m3", "i8/b2x16"])
def test_scales_of_a_whole_expert_are_not_put_together(fmt: str) -> None:
    rows = [[part(i, fmt)] for i in range(2)]
    found, lost = joined(rows)
    assert isinstance(found, Tensor) and torch.equal(found, values(rows)) and "dequantized" in lost[0][0]


def test_an_order_of_columns_is_undone() -> None:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    first = part(0, "i4/g16")
    weight = first.packed.dequantize()
    turned = Linear("a", first.packed, columns=order)
    whole = Dequantized("b", weight, (("why", "step"),))
    found, lost = joined([[turned], [whole]])
    assert isinstance(found, Tensor) and torch.equal(found[0][:, order], weight) and torch.equal(found[1], weight)
    assert lost[0] == ("why", "step") and len(lost) == 2
