"""Small models with packed weights, made without a recipe, and libraries that read their checkpoints."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qfx.format import Format
from qfx.live.modules import QuantLinear
from qfx.packing import pack_weight, unpack_zeros

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of libraries that transformers imports where they are installed
    from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A float Llama of two layers, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **more}, tie_word_embeddings=tied)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def falcon(fmt: str) -> Any:
    """A Falcon of one layer, whose linears are of a class derived from nn.Linear, packed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    model = FalconForCausalLM(FalconConfig(**sizes)).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "FalconLinear":
            packed = pack_weight(module.weight, Format.parse(fmt), name=name)
            model.set_submodule(name, QuantLinear(packed, module.bias, dtype=torch.float32))
    return model


def ids() -> Tensor:
    """Token ids [2, 7]."""
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def pack(model: nn.Module, formats: str | Mapping[str, str], **more: Any) -> Any:
    """Put packed linears in the place of those of the blocks: one format for all, or by the end of their names."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "layers." not in name:
            continue
        text = formats if isinstance(formats, str) else next((f for k, f in formats.items() if name.endswith(k)), "")
        if text:
            new = QuantLinear(
                pack_weight(module.weight, Format.parse(text), name=name),
                module.bias,
                dtype=module.weight.dtype,
                **more,
            )
            model.set_submodule(name, new)
    return model


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def zero_points(module: QuantLinear) -> Tensor:
    """Those of an affine weight, one each, uint8 [N, G]."""
    found = unpack_zeros(module.w_zero, Format.parse(module.w_format), module.w_scale)
    assert found is not None
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all packed weights have the same codes, and the same scales up to their type."""
    first, second = linears(one), linears(other)
    assert first and first.keys() == second.keys()
    return all(
        torch.equal(a.w_codes, b.w_codes)
        and torch.equal(a.w_scale.to(torch.float32), b.w_scale.to(torch.float32))
        and (a.w_zero is None or (b.w_zero is not None and torch.equal(a.w_zero, b.w_zero)))
        for a, b in ((first[name], second[name]) for name in first)
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What the model says of `ids()`."""
    found: Tensor = model(ids()).logits
    return found


def quantization_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a folder says of how its weights are quantized."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def stored(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint of one file, those that begin with `prefix` by what follows it."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
