"""The packed form of a parameter that its module reads itself: those of experts, tables of embeddings of their own.

It is stored as buffers and dequantized where it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import qfx.ops.packed  # noqa: F401  (registers torch.ops.qfx)
from qfx.live.stored import differs, tell
from qfx.live.subclass import class_maker
from qfx.packing import Packed


@dataclass(frozen=True)
class PackedSpec:
    """How a packed parameter reads: its format, the shape it is packed in, and the dtype that its module knows.

    transposed: the module knows it as [.., K, N]. view: the shape that the module knows, where it is another one yet.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    view: tuple[int, ...] = ()


def pack_parameter(module: nn.Module, name: str, packed: Packed, *, transposed: bool = False) -> None:
    """Store parameter `name` of `module` packed (buffers `<name>_w_codes`, `<name>_w_scale`, `<name>_w_zero`).

    The module's class becomes a subclass of itself in which reading `name` gives the dequantized weight, so that its
    own forward goes on working. The packed weight is [.., N, K]; transposed: the module knows it as [.., K, N].
    An nn.Embedding's own lookup reads the packed rows that it needs, not the whole table.
    """
    original = module._parameters.pop(name)
    assert original is not None
    specs = dict(module.__dict__.get("qfx_packed", {}))
    view = tuple(original.shape) if original.dim() != len(packed.shape) else ()
    specs[name] = PackedSpec(str(packed.format), tuple(packed.shape), original.dtype, transposed, view)
    for leaf, tensor in (("w_codes", packed.data), ("w_scale", packed.scale), ("w_zero", packed.zero)):
        module.register_buffer(f"{name}_{leaf}", tensor)
    module.qfx_packed = specs  # type: ignore[assignment]
    base = getattr(type(module), "qfx_float_class", type(module))
    assert isinstance(base, type)
    module.__class__ = _packed_class(base, tuple(specs))


@class_maker
def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reader(name: str) -> property:
        return property(lambda self: _read(self, name))

    def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        return _apply_keeping(self, lambda: super(kind, self)._apply(fn, recurse), fn)  # type: ignore[misc]

    def _save_to_state_dict(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        super(kind, self)._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        tell(destination, prefix, _stored(self))

    def _load_from_state_dict(
        self: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if wrong := differs(local_metadata, _stored(self), prefix[:-1] or base.__name__):
            error_msgs.append(wrong)
            return
        super(kind, self)._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    fields: dict[str, Any] = {name: reader(name) for name in names}
    fields |= {"qfx_float_class": base, "_apply": _apply, "__module__": base.__module__, "__doc__": base.__doc__}
    fields |= {"_save_to_state_dict": _save_to_state_dict, "_load_from_state_dict": _load_from_state_dict}
    looks_up = issubclass(base, nn.Embedding) and "weight" in names
    bases = (base,) if not looks_up else (_Lookup,) if base is nn.Embedding else (base, _Lookup)
    kind: type[nn.Module] = type(f"Packed{base.__name__}", bases, fields)
    return kind


class _Lookup(nn.Embedding):
    """Stands between a subclass of nn.Embedding and nn.Embedding, so that `super().forward(ids)` reads packed rows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Embedding's own name)
        spec: PackedSpec | None = self.__dict__.get("qfx_packed", {}).get("weight")
        if spec is None or spec.transposed or self.max_norm is not None:
            return super().forward(input)
        codes, scale, zero = (self._buffers[f"weight_{leaf}"] for leaf in ("w_codes", "w_scale", "w_zero"))
        rows: Tensor = torch.ops.qfx.embedding(input, codes, scale, zero, spec.format, spec.shape[-1], spec.dtype)
        return rows


LOADING = "qfx_loading"  # set while transformers loads a module and may give first values to what it holds


def _read(module: nn.Module, name: str) -> Tensor:
    spec: PackedSpec = module.qfx_packed[name]  # type: ignore[index, assignment]
    if module.__dict__.get(LOADING):
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    codes, scale, zero = (module._buffers[f"{name}_{leaf}"] for leaf in ("w_codes", "w_scale", "w_zero"))
    weight: Tensor = torch.ops.qfx.dequantize(codes, scale, zero, spec.format, spec.shape[-1], spec.dtype)
    if spec.view:
        return weight.reshape(spec.view)
    return weight.transpose(-2, -1) if spec.transposed else weight


def _apply_keeping(module: nn.Module, apply: Callable[[], Any], fn: Any) -> nn.Module:
    """Run nn.Module._apply, then put packed buffers back to their own types; note the activations' new dtype."""
    specs: dict[str, PackedSpec] = dict(module.qfx_packed)  # type: ignore[arg-type]
    keeping_types(module, [name for name in module._buffers if _LEAF.search(name)], apply)
    for name, spec in specs.items():
        probe = fn(torch.empty(0, dtype=spec.dtype, device=module._buffers[f"{name}_w_codes"].device))  # type: ignore[union-attr]
        if probe.dtype.is_floating_point:
            specs[name] = replace(spec, dtype=probe.dtype)
    module.qfx_packed = specs  # type: ignore[assignment]
    return module


def _stored(module: nn.Module) -> str:
    """How the packed parameters of a module are to be read: "gate_up_proj i4/g32 transposed, down_proj i4/g32"."""
    specs: dict[str, PackedSpec] = module.qfx_packed  # type: ignore[assignment]
    return ", ".join(f"{name} {s.format}{' transposed' * s.transposed}" for name, s in sorted(specs.items()))


_LEAF = re.compile(r"_w_(codes|scale|zero)$")


def keeping_types(module: nn.Module, names: Iterable[str], apply: Callable[[], Any]) -> None:
    """Run `apply`, which moves and casts a module, then put these of its buffers back to the types that they had."""
    held = {name: b for name in names if (b := module._buffers[name]) is not None}
    apply()
    for name, before in held.items():
        after = module._buffers[name]
        if after is not None and after.dtype != before.dtype:
            module._buffers[name] = before.to(after.device)
