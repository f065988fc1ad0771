"""Where each tensor of a GGUF file comes from in a live model: float parameters and what qfx packed, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qfx.errors import Note, UnsupportedError, explain, listed
from qfx.format import Format
from qfx.interop.gguf_arch import Architecture
from qfx.interop.gguf_exact import Exact, as_blocks
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantEmbedding, QuantLinear, as_packed, as_read
from qfx.live.permuted import QuantPermuted
from qfx.packing import Packed


@dataclass(frozen=True, eq=False)
class Source:
    """Parameter `leaf` of the module `fqn`: "weight" or "bias"."""

    fqn: str
    module: nn.Module
    leaf: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the module knows it, columns last."""
        if self.leaf == "weight" and isinstance(self.module, QuantLinear | QuantEmbedding | QuantMixed):
            return tuple(self.module.shape)
        return tuple(getattr(self.module, self.leaf).shape)

    @property
    def is_linear(self) -> bool:
        """It is the weight of a linear layer."""
        return self.leaf == "weight" and isinstance(self.module, nn.Linear | QuantLinear | QuantMixed)

    def value(self) -> Tensor:
        """The weight by which the inputs are multiplied, f32."""
        value: Tensor = getattr(self.module, self.leaf).detach().to(torch.float32)
        smooth = getattr(self.module, "smooth", None)
        if smooth is None or self.leaf != "weight":
            return value
        smooth, around = smooth.to(torch.float32), (getattr(self.module, "rotation", None), self.gain)
        if isinstance(self.module, QuantPermuted):  # the input is divided in the stored order
            smooth = smooth[torch.argsort(self.module.columns)]
        return as_read(as_packed(value, *around) / smooth, *around)

    @property
    def gain(self) -> Tensor | None:
        """That of a norm, which acts on the input of a linear that shares its table."""
        return self.module._buffers.get("gain")

    def exact(self) -> Exact | str | None:
        """Blocks with the values of a packed weight, the reason why there are none, or None for a float one."""
        if self.leaf != "weight":
            return None
        if isinstance(self.module, QuantMixed):
            return "it has several formats"
        packed = _packed(self.module)
        if packed is None:
            return None
        if getattr(self.module, "smooth", None) is not None:
            return "its inputs are divided first, which its weight takes over"
        if getattr(self.module, "rotation", None) is not None:
            return "its inputs are rotated first, which its weight takes back"
        if getattr(self.module, "low", None) is not None:
            return "a part of its weight stands beside the packed one"
        if isinstance(self.module, QuantPermuted):
            return "its columns are stored in another order"
        return as_blocks(packed)

    def pointer(self) -> int:
        """What two names of one weight have in common."""
        packed = _packed(self.module) if self.leaf == "weight" else None
        held = getattr(self.module, self.leaf) if packed is None else packed.data
        return int(held.data_ptr())


def sources_of(model: nn.Module, arch: Architecture) -> tuple[dict[str, Source], list[Note]]:
    """GGUF name -> source, in the order of the file, and notes on what has no place there.

    A table that is also the output's is there once, unless a gain acts on what the output reads. Raises
    UnsupportedError where the model lacks modules, or holds tensors that change its results and have no place.
    """
    base = _base(model, arch)
    modules = arch.modules(int(model.config.num_hidden_layers))  # type: ignore[union-attr, arg-type]
    found: dict[str, Source] = {}
    missing = []
    for stem, fqn in modules.items():
        try:
            module = base.get_submodule(fqn)
        except AttributeError:
            missing.append(fqn)
            continue
        name = f"{_prefix(model, base)}{fqn}"
        for leaf in ("weight", "bias"):
            if getattr(module, leaf, None) is not None:
                found[f"{stem}.{leaf}"] = Source(name, module, leaf)
    if missing:
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} is no whole {arch.kind}",
                expected=f"modules {listed(missing)}",
                found=f"{len(missing)} of {len(modules)} are not there",
                next_step=f"load it as transformers.{arch.kind}",
            )
        )
    _check_biases(found, arch)
    output, table = found.get("output.weight"), found["token_embd.weight"]
    if output is not None and output.pointer() == table.pointer() and output.gain is None:
        del found["output.weight"]
    return found, [*_unplaced(model, base, modules), *_activations(found)]


def _check_biases(found: dict[str, Source], arch: Architecture) -> None:
    for name, source in found.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "bias" and stem.rpartition(".")[2] not in arch.biased:
            raise UnsupportedError(
                explain(
                    f"{source.fqn!r} has a bias, for which {arch.name} has no place in GGUF",
                    expected=f"biases of {', '.join(arch.biased) or 'none'} only",
                    next_step="leave out bias correction (Recipe.bias_correction)",
                )
            )


def _base(model: nn.Module, arch: Architecture) -> nn.Module:
    """The module that the architecture's names start from."""
    if arch.name != "bert":
        return model
    inner = getattr(model, "bert", model)
    assert isinstance(inner, nn.Module)
    return inner


def _prefix(model: nn.Module, base: nn.Module) -> str:
    return "" if base is model else "bert."


def _unplaced(model: nn.Module, base: nn.Module, modules: dict[str, str]) -> list[Note]:
    """Heads and poolers of BERT are left out, with a note; any other tensor without a place is an error."""
    prefix = _prefix(model, base)
    placed = {f"{prefix}{fqn}" for fqn in modules.values()}
    rest = [name for name in model.state_dict() if _holder(name) not in placed]
    if not rest:
        return []
    if all(name.startswith(f"{prefix}pooler.") or not name.startswith(prefix) for name in rest):
        heads = sorted({name.removeprefix("bert.").partition(".")[0] for name in rest})
        reason = f"GGUF holds the encoder: {', '.join(heads)} ({len(rest)} tensors) are left out"
        return [Note(heads[0], reason, "none needed for embeddings from the last states", minor=True)]
    raise UnsupportedError(
        explain(
            "the model holds tensors that have no place in GGUF",
            expected="weights of the architecture only",
            found=listed(rest),
            next_step="export the model without what was added to it",
        )
    )


def _holder(name: str) -> str:
    """The module whose own tensor, or parametrized one, this is: what an adapter adds is that of a module within."""
    whole, parametrized, _ = name.partition(".parametrizations.")
    return whole if parametrized else name.rpartition(".")[0]


def _activations(sources: dict[str, Source]) -> list[Note]:
    return [
        Note(s.fqn, f"inputs in {x} have no place in GGUF: llama.cpp chooses how it reads them", "none", minor=True)
        for s in sources.values()
        if s.leaf == "weight" and (x := getattr(s.module, "x_format", ""))
    ]


def _packed(module: nn.Module) -> Packed | None:
    """The packed weight of a module, None where it is float or has several formats."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        return Packed(module.w_codes, module.w_scale, module.w_zero, Format.parse(module.w_format), module.shape)
    spec = getattr(module, "qfx_packed", {}).get("weight")
    if spec is None or spec.transposed or spec.view:
        return None
    codes, scale, zero = (module._buffers[f"weight_w_{leaf}"] for leaf in ("codes", "scale", "zero"))
    assert codes is not None and scale is not None
    return Packed(codes, scale, zero, Format.parse(spec.format), spec.shape)
