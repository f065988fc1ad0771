"""Packed experts of a layer, taken apart into linears as checkpoints hold them: one by one, by the names of old.

    mlp.experts.gate_up_proj [E, 2 I, H]  ->  mlp.experts.3.gate_proj [I, H], mlp.experts.3.up_proj [I, H], ...
    mlp.experts.down_proj    [E, H, I]    ->  mlp.experts.3.down_proj [H, I]
    or block_sparse_moe.experts.3.w1, .w3, .w2, where the class of the model calls them so

The inverse of `qfx.interop.experts`. The names are those from which transformers itself puts experts together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qfx.format import Format
from qfx.interop.experts import KIND, OLD, PARTS
from qfx.interop.linear import Linear
from qfx.live.parameters import PackedSpec
from qfx.packing import Packed

_SOURCE = re.compile(r"experts\\?\.\*\\?\.(\w+)\\?\.weight$")


@dataclass(frozen=True)
class Naming:
    """leaves: "gate", "up", "down" -> what checkpoints call them. old: the layer has Mixtral's older name."""

    leaves: Mapping[str, str]
    old: bool

    @classmethod
    def of(cls, model: nn.Module) -> Naming | None:
        """The names for a model of transformers; None where its checkpoints hold experts together."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        leaves: dict[str, str] = {}
        old = False
        for rule in get_model_conversion_mapping(model):
            sources = [str(source) for source in rule.source_patterns]
            old = old or sources == [OLD[0]]
            for source in sources:
                found = _SOURCE.search(source)
                if found and found[1] in KIND:
                    leaves.setdefault(KIND[found[1]], found[1])
        return cls(leaves, old) if leaves.keys() == {"gate", "up", "down"} else None

    def fqn(self, experts: str, number: int, kind: str) -> str:
        """The name of a part of one expert of a module of experts."""
        return f"{self.layer(experts)}.{number}.{self.leaves[kind]}"

    def layer(self, name: str) -> str:
        """A name inside the layer that holds experts."""
        return f"{name}.".replace(OLD[1], OLD[0])[:-1] if self.old else name


def taken_apart(model: nn.Module, naming: Naming) -> dict[str, list[Linear]]:
    """FQN of a module of experts -> the parts of its packed experts."""
    found: dict[str, list[Linear]] = {}
    for fqn, module in model.named_modules():
        specs: Mapping[str, PackedSpec] = getattr(module, "qfx_packed", {})
        if not fqn.endswith(".experts") or not all(_is_held(module, specs, name) for name in PARTS):
            continue
        for name in PARTS.keys() & specs.keys():
            codes, scale, zero = (module._buffers[f"{name}_w_{leaf}"] for leaf in ("codes", "scale", "zero"))
            assert codes is not None and scale is not None
            packed = Packed(codes, scale, zero, Format.parse(specs[name].format), specs[name].shape)
            found.setdefault(fqn, []).extend(_parts(packed, naming, fqn, PARTS[name]))
    return found


def _is_held(module: nn.Module, specs: Mapping[str, PackedSpec], name: str) -> bool:
    """Whether it is a stack of matrices [E, N, K], in float, or packed so that it can be cut between them."""
    if name not in specs:
        held = module._parameters.get(name)
        return held is not None and held.dim() == 3
    spec = specs[name]
    fmt, rows = Format.parse(spec.format), spec.shape[-2] // len(PARTS[name])
    whole = not fmt.is_plain and not fmt.nested and (fmt.block is None or rows % fmt.block[0] == 0)
    return whole and len(spec.shape) == 3 and not spec.transposed and not spec.view


def _parts(packed: Packed, naming: Naming, fqn: str, kinds: tuple[str, ...]) -> Iterator[Linear]:
    for number in range(packed.shape[0]):
        for i, kind in enumerate(kinds):
            data, scale, zero = (_cut(t, number, i, len(kinds)) for t in (packed.data, packed.scale, packed.zero))
            assert data is not None and scale is not None
            shape = (packed.shape[1] // len(kinds), packed.shape[2])
            yield Linear(naming.fqn(fqn, number, kind), Packed(data, scale, zero, packed.format, shape), expert=True)


def _cut(tensor: Tensor | None, number: int, i: int, count: int) -> Tensor | None:
    """One of the `count` parts of an expert; what is one for all experts stays."""
    if tensor is None or tensor.dim() < 3:
        return tensor
    return tensor[number].chunk(count)[i]


def routers(plain: nn.Module, experts: Iterable[str]) -> list[str]:
    """Modules beside experts that hold a matrix and are no linears: no scheme is for them, by whatever name it goes."""
    found = []
    for fqn in experts:
        parent = fqn.rpartition(".")[0]
        for name, module in plain.get_submodule(parent).named_children():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Linear):
                found.append(f"{parent}.{name}")
    return found
