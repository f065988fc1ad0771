"""Read a checkpoint of another library into qfx's modules: codes and scales as they lie in the file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import Note, check_flags, explain, listed, reading
from qfx.interop import awq, bnb, compressed_tensors, experts, gptq
from qfx.interop.checkpoint import Checkpoint
from qfx.interop.linear import Decoder, Dequantized, Linear, Loss, is_transposed
from qfx.live.modules import QuantEmbedding, QuantLinear, take_place
from qfx.live.parameters import pack_parameter
from qfx.live.permuted import QuantPermuted
from qfx.pipeline import told
from qfx.storage.skeleton import config_of, of_config, set_generation

DECODERS: dict[str, Callable[[Mapping[str, Any]], Decoder]] = {
    "compressed-tensors": compressed_tensors.decoder,
    "gptq": gptq.decoder,
    "awq": awq.decoder,
    "bitsandbytes": bnb.decoder,
}
_CACHE = re.compile(r"\.[kvq]_(scale|zero_point)$")
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias)$")


def import_checkpoint(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, strict: bool = False
) -> nn.Module:
    """The model of a checkpoint that compressed-tensors, GPTQ, AWQ or bitsandbytes wrote, in eval mode.

    Codes and scales are those of the file, nothing is rounded again. dtype: of the float parameters and of the
    computation; None is the checkpoint's own. What qfx has no format for is dequantized, each a QfxWarning; an
    UnsupportedError if strict. Raises FileNotFoundError for missing files, ValueError for unknown layouts, files cut
    short and checkpoints of another architecture.
    """
    check_flags(strict=strict)
    with reading(folder):
        return _imported(Checkpoint.open(folder), dtype, strict=strict)


def _imported(checkpoint: Checkpoint, dtype: torch.dtype | None, *, strict: bool) -> nn.Module:
    method = str(checkpoint.quantization.get("quant_method", "")).replace("_", "-").lower()
    if method not in DECODERS:
        raise ValueError(
            explain(
                f"unknown layout {method or 'without a quant_method'!r} in {checkpoint.folder}",
                expected=", ".join(DECODERS),
                next_step="load it by transformers and quantize the float model",
            )
        )
    decoder = DECODERS[method](checkpoint.quantization)
    model = _skeleton(checkpoint, dtype)
    return _Filler(model, checkpoint, decoder).fill(strict=strict)


class _Filler:
    """Puts the tensors of a checkpoint into a float model, module by module."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self.model, self.checkpoint, self.decoder = model, checkpoint, decoder
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.notes: list[Note] = []
        self.experts: dict[str, experts.Leaves] = {}

    def fill(self, *, strict: bool) -> nn.Module:
        quantized, plain = self._sorted()
        self._check(quantized, plain)
        found = 0
        for fqn, leaves in quantized.items():
            tensors = self.checkpoint.tensors(leaves.values())
            found += self._module(fqn, {leaf: tensors[name] for leaf, name in leaves.items()})
        for fqn, parts in self.experts.items():
            found += self._experts(fqn, parts)
        if not found:
            raise ValueError(
                explain(
                    f"{self.checkpoint.folder} holds no quantized {self.decoder.name} weight, against its config",
                    next_step="load it by transformers",
                )
            )
        told(self.notes, strict=strict)
        for name, source in plain.items():
            self._parameter(name, self.checkpoint.tensors([source])[source])
        for target, source in self.tied.items():
            self._tie(target, source)
        return self.model.eval()

    def _sorted(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Quantized modules: FQN -> leaf -> name in the file; other tensors: name in the model -> name in the file."""
        quantized: dict[str, dict[str, str]] = {}
        plain: dict[str, str] = {}
        names = _aligned(self.checkpoint.files, self.modules)
        self.experts = experts.sort_out(names, self.modules)
        for name, source in names.items():
            owner, leaf = _owner(name, self.modules)
            if leaf != "weight" and leaf in self.decoder.leaves and _shape(self.modules[owner]) is not None:
                quantized.setdefault(owner, {})[leaf] = source
            else:
                plain[name] = source
        for fqn, leaves in quantized.items():
            if f"{fqn}.weight" in plain:
                leaves["weight"] = plain.pop(f"{fqn}.weight")
        return quantized, plain

    def _check(self, quantized: Mapping[str, Any], plain: dict[str, str]) -> None:
        """Every tensor of the model is in the file and the other way round, as far as the class lets it be."""
        own = {name: tuple(t.shape) for name, t in self.model.state_dict(keep_vars=True).items()}
        unknown = []
        for name in [name for name in plain if name not in own]:
            if self._may_be_left(name, plain[name]):
                del plain[name]
            else:
                unknown.append(name)
        missing = [name for name in own if name not in plain and not self._may_be_missing(name, quantized)]
        for name in plain.keys() & own.keys():
            if self.checkpoint.shapes[plain[name]] != own[name]:
                missing.append(f"{name} {list(own[name])}")
                unknown.append(f"{name} {list(self.checkpoint.shapes[plain[name]])}")
        if missing or unknown:
            raise ValueError(
                explain(
                    f"the checkpoint does not fit {type(self.model).__name__}, which its config names",
                    expected=f"a tensor for each of the model's; missing: {listed(missing) or 'none'}",
                    found=f"tensors that it does not have: {listed(unknown) or 'none'}",
                    next_step="check that config.json and the weights are of one checkpoint",
                )
            )

    def _may_be_left(self, name: str, source: str) -> bool:
        if _CACHE.search(name):
            self._lose(
                name, ("scales of the key-value cache are not read", "a quantized cache is asked for at run time")
            )
            return True
        if _DERIVED.search(name) or _matches(self.model, "_keys_to_ignore_on_load_unexpected", name):
            return True
        return name.endswith(".bias") and not bool(self.checkpoint.tensors([source])[source].any())

    def _may_be_missing(self, name: str, quantized: Mapping[str, Any]) -> bool:
        owner, _, leaf = name.rpartition(".")
        if (leaf == "weight" and owner in quantized) or (leaf in experts.PARTS and owner in self.experts):
            return True
        return name in self.tied or _matches(self.model, "_keys_to_ignore_on_load_missing", name)

    def _lose(self, name: str, *losses: Loss) -> None:
        self.notes += [Note(name, *loss) for loss in losses]

    def _module(self, fqn: str, tensors: dict[str, Tensor]) -> bool:
        """Put a quantized module in the place of the float one; whether there was something quantized."""
        old = self.modules[fqn]
        shape = _shape(old)
        assert shape is not None
        found = self.decoder.decode(fqn, _kinds(old), tensors, shape)
        if found is None:
            weight = tensors.get("weight")
            if weight is None or not weight.is_floating_point():
                raise ValueError(
                    explain(f"the checkpoint lacks the weight of {fqn!r}", found=", ".join(sorted(tensors)))
                )
            self._parameter(f"{fqn}.weight", weight)
            return False
        self._lose(fqn, *found.lost)
        if isinstance(found, Dequantized):
            weight = found.weight.t() if is_transposed(old) else found.weight
            self._parameter(f"{fqn}.weight", weight.contiguous())
            return True
        new = take_place(_quantized(found, old), old)
        for name, module in self.modules.items():
            if module is old:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, new)
                self.modules[name] = new
        return True

    def _experts(self, fqn: str, leaves: experts.Leaves) -> bool:
        """Fill a module of experts from those of the file; whether one was quantized."""
        module, some = self.modules[fqn], False
        held = module._parameters["down_proj"]
        assert held is not None
        for name, kinds in experts.PARTS.items():
            rows: list[list[Linear | Dequantized | Tensor]] = []
            for number in range(held.shape[0]):
                rows.append(
                    [
                        self._part(f"{fqn}.{number}.{kind}", module, kind, leaves.get((number, kind), {}))
                        for kind in kinds
                    ]
                )
                some = some or any(isinstance(part, Linear) for part in rows[-1])
            value, lost = experts.joined(rows)
            self._lose(f"{fqn}.{name}", *lost)
            if isinstance(value, Tensor):
                self._parameter(f"{fqn}.{name}", value)
            else:
                pack_parameter(module, name, value)
        return some

    def _part(self, fqn: str, module: nn.Module, kind: str, leaves: Mapping[str, str]) -> Linear | Dequantized | Tensor:
        """A part of one expert, [N, K]. ValueError where it is missing or has another shape."""
        held = self.checkpoint.tensors(leaves.values())
        tensors = {leaf: held[name] for leaf, name in leaves.items()}
        for leaf, name in leaves.items():
            fqn = name.removesuffix(f".{leaf}")  # schemes go by the names of the file
        shape = experts.shape_of(module, kind)
        found = self.decoder.decode(fqn, ("Linear",), tensors, shape)
        if found is not None:
            return found
        weight = tensors.get("weight")
        if weight is None or tuple(weight.shape) != shape or not weight.is_floating_point():
            raise ValueError(
                explain(
                    f"the checkpoint lacks the expert {fqn!r}",
                    expected=f"its tensors, for a weight [{shape[0]}, {shape[1]}]",
                    found=", ".join(sorted(tensors)) or "none",
                )
            )
        return weight

    def _parameter(self, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.modules[owner]
        held = module._parameters.get(leaf)
        if held is None:
            buffer = module._buffers[leaf]
            assert buffer is not None
            module._buffers[leaf] = value.to(buffer.dtype)
            return
        module._parameters[leaf] = nn.Parameter(value.to(held.dtype), requires_grad=held.requires_grad)

    def _tie(self, target: str, source: str) -> None:
        """What the class ties is one tensor, unless the checkpoint quantizes one of both."""
        (owner, _, leaf), (head, _, first) = target.rpartition("."), source.rpartition(".")
        held = self.modules[head]._parameters.get(first)
        if held is not None and self.modules[owner]._parameters.get(leaf) is not None:
            self.modules[owner]._parameters[leaf] = held


def _quantized(found: Linear, old: nn.Module) -> nn.Module:
    weight = old._parameters["weight"]
    assert weight is not None
    if isinstance(old, nn.Embedding):
        return QuantEmbedding(found.packed, old.padding_idx, dtype=weight.dtype)
    bias = old._parameters.get("bias")
    formats: dict[str, Any] = {"x_format": found.x, "x_scale": found.x_scale, "x_zero": found.x_zero}
    formats["dtype"] = weight.dtype
    if found.columns is not None:
        return QuantPermuted(found.packed, bias, found.columns, **formats)
    return QuantLinear(found.packed, bias, **formats)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """[N, K] of a module that a quantized one can stand for; None for others."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    if is_transposed(module):
        return weight.shape[1], weight.shape[0]
    return (weight.shape[0], weight.shape[1]) if isinstance(module, nn.Linear | nn.Embedding) else None


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's class and of those that it is derived from, by any of which a checkpoint may mean it."""
    return tuple(kind.__name__ for kind in type(module).__mro__)


def _owner(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The module that the name begins with, the longest there is, and the rest of the name."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        fqn = ".".join(parts[:length])
        if fqn in modules:
            return fqn, ".".join(parts[length:])
    return "", name


def _aligned(files: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name in the model -> name in the file. A file's names may lack the prefix of the bare model, or have it."""
    prefix = f"{getattr(modules[''], 'base_model_prefix', '') or 'model'}."
    if any(_owner(name, modules)[0] for name in files):
        return {name: name for name in files}
    if any(_owner(f"{prefix}{name}", modules)[0].startswith(prefix) for name in files):
        return {f"{prefix}{name}": name for name in files}
    return {name.removeprefix(prefix): name for name in files}


def _matches(model: nn.Module, attribute: str, name: str) -> bool:
    patterns = getattr(model, attribute, None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """The float model of the checkpoint's config, its weights without content."""
    config = config_of(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = of_config(config, dtype=dtype or config.dtype or torch.float32, implementations={})
    set_generation(model, checkpoint.folder)
    return model
