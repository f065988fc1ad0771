"""Experts that a checkpoint holds one by one, read into models that hold them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qfx
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.interop import compressed_tensors
from qfx.interop.experts import joined
from qfx.interop.linear import Dequantized, Linear
from qfx.packing import pack_weight
from tests.interop import pack, stored
from tests.zoo import ZOO

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
    with pytest.warns(QfxWarning, match="experts.gate_up_proj and 3 more: experts of several formats"):
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
