"""Experts that a checkpoint holds one by one, for models that hold those of a layer as one tensor.

    mlp.experts.3.gate_proj.<leaf>, .up_proj.<leaf>   (w1, w3)  ->  mlp.experts.gate_up_proj [E, 2 I, H]
    mlp.experts.3.down_proj.<leaf>                    (w2)      ->  mlp.experts.down_proj    [E, H, I]

Codes and scales are put side by side as they are; formats that differ, or whose scale serves a whole expert, are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qfx.format import Format
from qfx.interop.linear import Dequantized, Linear, Loss
from qfx.packing import Packed

PARTS: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
KIND = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_NAME = re.compile(rf"(.+\.experts)\.(\d+)\.({'|'.join(KIND)})\.(.+)$")
OLD = (".block_sparse_moe.", ".mlp.")  # how Mixtral's checkpoints call the layer

Leaves = dict[tuple[int, str], dict[str, str]]  # (number of the expert, part) -> leaf -> name in the file


def sort_out(names: dict[str, str], modules: Mapping[str, nn.Module]) -> dict[str, Leaves]:
    """Take the experts' tensors out of name -> name in the file; what belongs to which module of experts."""
    for name in [name for name in names if OLD[0] in name]:
        if not any(OLD[0] in f"{fqn}." for fqn in modules):
            names[name.replace(*OLD)] = names.pop(name)
    found: dict[str, Leaves] = {}
    for name in list(names):
        match = _NAME.match(name)
        held = modules.get(match[1]) if match else None
        if match and held is not None and all(held._parameters.get(part) is not None for part in PARTS):
            leaves = found.setdefault(match[1], {}).setdefault((int(match[2]), KIND[match[3]]), {})
            leaves[match[4]] = names.pop(name)
    return found


def shape_of(module: nn.Module, part: str) -> tuple[int, int]:
    """[N, K] of a part of one expert."""
    name = "down_proj" if part == "down" else "gate_up_proj"
    held = module._parameters[name]
    assert held is not None
    rows, columns = held.shape[1:]
    return (rows, columns) if part == "down" else (rows // 2, columns)


def joined(experts: Sequence[Sequence[Linear | Dequantized | Tensor]]) -> tuple[Packed | Tensor, list[Loss]]:
    """The parts of each expert one below the other, the experts stacked: [E, N, K], packed or float32; what is lost."""
    flat = [part for parts in experts for part in parts]
    lost = [loss for part in flat if not isinstance(part, Tensor) for loss in part.lost]
    packed = [_by_row(part.packed) for part in flat if isinstance(part, Linear) and part.columns is None]
    formats = {str(part.format) for part in packed}
    if len(packed) == len(flat) and len(formats) == 1 and packed[0].format.by_row:
        if any(part.x for part in flat if isinstance(part, Linear)):
            lost.append(("the inputs of experts stay float: their weights are read by a forward of its own", "nothing"))
        count = len(experts[0])
        rows = [_below(packed[i : i + count]) for i in range(0, len(packed), count)]
        return _stacked(rows), list(dict.fromkeys(lost))
    kinds = sorted({str(part.format) for part in flat if isinstance(part, Linear)})
    if kinds:
        reason = f"experts of several formats, or in an order of columns ({', '.join(kinds)}): dequantized"
        lost.append((reason, "quantize the float model with qfx"))
    values = [torch.cat([_values(part) for part in parts]) for parts in experts]
    return torch.stack(values), list(dict.fromkeys(lost))


def _by_row(packed: Packed) -> Packed:
    """A scale of the whole tensor as that of each of its rows."""
    fmt = packed.format
    if fmt.granularity or fmt.has_global_scale or fmt.is_plain:
        return packed
    rows = packed.shape[0]
    zero = None if packed.zero is None else packed.zero.reshape(1, 1).expand(rows, 1).contiguous()
    scale = packed.scale.reshape(1, 1).expand(rows, 1).contiguous()
    return Packed(packed.data, scale, zero, Format(fmt.type, "ch", fmt.scale_type), packed.shape)


def _below(parts: Sequence[Packed]) -> Packed:
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    data, scale, zero = (_all(torch.cat, (getattr(part, leaf) for part in parts)) for leaf in ("data", "scale", "zero"))
    assert data is not None and scale is not None
    return Packed(data, scale, zero, parts[0].format, shape)


def _stacked(rows: Sequence[Packed]) -> Packed:
    data, scale, zero = (_all(torch.stack, (getattr(row, leaf) for row in rows)) for leaf in ("data", "scale", "zero"))
    assert data is not None and scale is not None
    return Packed(data, scale, zero, rows[0].format, (len(rows), *rows[0].shape))


def _all(join: object, tensors: Iterable[Tensor | None]) -> Tensor | None:
    held = [tensor for tensor in tensors if tensor is not None]
    if not held:
        return None
    return torch.cat(held) if join is torch.cat else torch.stack(held)


def _values(part: Linear | Dequantized | Tensor) -> Tensor:
    if isinstance(part, Tensor):
        return part.to(torch.float32)
    if isinstance(part, Dequantized):
        return part.weight
    weight = part.packed.dequantize()
    return weight if part.columns is None else weight[:, torch.argsort(part.columns)]
