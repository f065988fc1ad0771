"""Weights that a method rounded beforehand (GPTQ, learned rounding, ...), as a plan carries them.

    plan.tensors["model.layers.0.mlp.up_proj/codes"]    as stored, see `qfx.packing`
                                          ".../scale"
                                          ".../zero"    where the format has zero points or a global scale

The name is the FQN of a linear, or "<FQN>.rows0", "<FQN>.columns1", ... for the segments of a weight of several
formats. A weight that several linears read is held under the name of each. What is not there is rounded by
`qfx.rounding.nearest` as ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import Format, dtype_name
from qfx.packing import Packed, check_storage, pack_zeros, unpack_zeros
from qfx.rounding.parts import round_in_parts

_LEAVES = {"codes": "data", "scale": "scale", "zero": "zero"}


def put(tensors: MutableMapping[str, Tensor], name: str, packed: Packed) -> None:
    """Keep a rounded weight under `name`, in place of an earlier one."""
    for leaf, field in _LEAVES.items():
        held = getattr(packed, field)
        if held is None:
            tensors.pop(f"{name}/{leaf}", None)
        else:
            tensors[f"{name}/{leaf}"] = held


def get(tensors: Mapping[str, Tensor], name: str, fmt: Format, shape: tuple[int, ...]) -> Packed | None:
    """The rounded weight [.., N, K] under `name`, None where there is none.

    A model may hold the matrices of several groups in one [G * N, K]: where rows have scales of their own these are the
    same rows. Raises ValueError where what is there does not fit the format or the shape.
    """
    codes, scale, zero = (tensors.get(f"{name}/{leaf}") for leaf in _LEAVES)
    if codes is None:
        return None
    rows = codes.shape[:-1]
    if fmt.by_row and rows != shape[:-1] and rows.numel() == math.prod(shape[:-1]):
        scale, zero = (
            t.reshape(*shape[:-1], -1) if t is not None and t.dim() and t.shape[:-1] == rows else t
            for t in (scale, zero)
        )
        codes = codes.reshape(*shape[:-1], -1)
    expected = () if fmt.is_plain else fmt.scale_shape(shape)
    if (
        scale is None
        or tuple(codes.shape[:-1]) != tuple(shape[:-1])
        or tuple(scale.shape) != tuple(expected)
        or scale.dtype != (torch.float32 if fmt.is_plain else fmt.scale_dtype)
        or (zero is None) != (not (fmt.has_zero or fmt.has_global_scale))
    ):
        found = ", ".join(f"{leaf} {_text(t)}" for leaf, t in zip(_LEAVES, (codes, scale, zero), strict=True))
        raise ValueError(
            explain(
                f"the plan's rounded weight of {name!r} does not fit the model",
                expected=f"format '{fmt}' of shape {list(shape)}, scales of shape {list(expected)}",
                found=found,
                next_step="make the plan again for this model and recipe",
            )
        )
    check_storage(codes, fmt, shape[-1])
    return Packed(codes, scale, pack_zeros(unpack_zeros(zero, fmt, scale), fmt), fmt, tuple(shape))


def pack(tensors: Mapping[str, Tensor], weight: Tensor, fmt: Format, method: str, *, name: str) -> Packed:
    """The weight as it was rounded beforehand, else rounded now by `method` (`nearest.round_weight`)."""
    found = get(tensors, name, fmt, tuple(weight.shape))
    return round_in_parts(weight, fmt, method, name=name) if found is None else found


def _text(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
