"""A quantized linear as the layouts see it, and what several of them ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import explain
from qfx.format import Format, dtype_name
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear, as_packed, as_read
from qfx.live.permuted import QuantPermuted
from qfx.packing import Packed

SCALES: dict[torch.dtype, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_CLOSE = 2.0**-10  # relative change of a scale that float16 makes where it is no subnormal number

Loss = tuple[str, str]  # what is not kept and why, next step


@dataclass(frozen=True, eq=False)
class Linear:
    """fqn: its name. packed: the weight [N, K]. x: format of the input, "" for float, with its static scales.

    more: what it computes beside y = x W^T + b, which no layout holds. columns [K]: the order in which the input's
    columns are stored; None is their own.
    head: it gives the logits. transposed: the float class is Conv1D, which holds [K, N]. derived: it is one derived
    from nn.Linear. expert: it is a part of an expert. lost: what was in a file and is not here.
    """

    fqn: str
    packed: Packed
    x: str = ""
    x_scale: Tensor | None = None
    x_zero: Tensor | None = None
    more: Loss | None = None
    columns: Tensor | None = None
    head: bool = False
    transposed: bool = False
    derived: bool = False
    expert: bool = False
    lost: tuple[Loss, ...] = field(default=())

    @property
    def format(self) -> Format:
        """The weight's format."""
        return self.packed.format

    @property
    def group(self) -> int | None:
        """Elements of a row that share a scale: the group, or the whole row; None for blocks."""
        if self.format.group is not None:
            return self.format.group
        return self.packed.shape[-1] if self.format.granularity in ("", "ch") else None


@dataclass(frozen=True, eq=False)
class Dequantized:
    """A weight [N, K], float32, of a file that no format of qfx holds, and why."""

    fqn: str
    weight: Tensor
    lost: tuple[Loss, ...]


@dataclass(frozen=True, eq=False)
class Decoder:
    """How to read a library's checkpoint.

    leaves: what follows the FQN in the names of a quantized linear's tensors. decode: FQN, names of the float module's
    class and its bases, its tensors by leaf, [N, K] -> the linear; None where nothing of it is quantized. Raises
    ValueError for tensors that do not fit. Other leaves (biases) are left alone.
    """

    name: str
    leaves: frozenset[str]
    decode: Callable[[str, tuple[str, ...], Mapping[str, Tensor], tuple[int, int]], Linear | Dequantized | None]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a library stores a quantized model.

    refused: linears -> FQN -> why the layout cannot hold its weight (it is then written in float). lost: what else of a
    linear is not kept. encode: a linear -> its tensors, by what follows its FQN. config: what is held and FQNs of the
    float linears -> `quantization_config`. experts: packed experts are written, one by one. without: experts that are
    held so -> which reader of the layout does not take them.
    """

    name: str
    refused: Callable[[Sequence[Linear]], dict[str, Loss]]
    lost: Callable[[Linear], list[Loss]]
    encode: Callable[[Linear], dict[str, Tensor]]
    config: Callable[[Sequence[Linear], Sequence[str]], dict[str, Any]]
    experts: bool = False
    without: Callable[[Sequence[Linear]], str] = lambda held: ""


def of_module(fqn: str, module: nn.Module, twin: nn.Module, *, head: bool = False) -> Linear | None:
    """The linear of a module of qfx; None for modules that are none. twin: that of the float model in its place."""
    if type(module) not in (QuantLinear, QuantPermuted):
        return None
    assert isinstance(module, QuantLinear)
    packed = Packed(module.w_codes, module.w_scale, module.w_zero, Format.parse(module.w_format), module.shape)
    rest: dict[str, Any] = {name: module._buffers.get(name) for name in ("x_scale", "x_zero", "columns")}
    rest["more"] = _more(module)
    rest |= {"transposed": is_transposed(twin), "derived": isinstance(twin, nn.Linear) and type(twin) is not nn.Linear}
    return Linear(fqn, packed, module.x_format, head=head, **rest)


def unsigned(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] and zero points [N, G] (uint8, 0 to 2^b - 1) and scales [N, G] of an integer weight.

    A signed code q is q + 2^(b-1) with the zero point 2^(b-1). A scale of the whole tensor is that of each row.
    """
    fmt, half = packed.format, 1 << (packed.format.bits - 1)
    assert fmt.is_integer and (fmt.group or fmt.granularity in ("", "ch")), fmt
    codes, (scale, zero) = packed.codes(), packed.params()
    if fmt.granularity == "":
        scale = scale.reshape(1, 1).expand(codes.shape[0], 1)
        zero = None if zero is None else zero.reshape(1, 1).expand(codes.shape[0], 1)
    if zero is None:
        codes = (codes.to(torch.int16) + half).to(torch.uint8)
        zero = torch.full(scale.shape, half, dtype=torch.uint8, device=codes.device)
    return codes, zero, scale


def from_unsigned(codes: Tensor, zero: Tensor, scale: Tensor, bits: int, group: int) -> Packed:
    """The inverse of `unsigned`: signed where all zero points are 2^(b-1). group: as `Linear.group`."""
    half = 1 << (bits - 1)
    kind = "i" if bool((zero == half).all()) else "u"
    granularity = "ch" if group >= codes.shape[-1] else f"g{group}"
    fmt = Format(f"{kind}{bits}", granularity, SCALES[scale.dtype])
    if kind == "u":
        return Packed.from_codes(codes, fmt, scale.contiguous(), zero.contiguous())
    return Packed.from_codes((codes.to(torch.int16) - half).to(torch.int8), fmt, scale.contiguous())


def half_scale(scale: Tensor) -> tuple[Tensor, float]:
    """The scale in float16 and the greatest relative change; infinite where float16 does not reach."""
    full = scale.to(torch.float32)
    half = full.to(torch.float16)
    change = float(
        ((half.to(torch.float32) - full).abs() / full.abs().clamp(min=torch.finfo(torch.float32).tiny)).max()
    )
    return half, change if change <= _CLOSE else float("inf")


def half_scale_loss(linear: Linear) -> list[Loss]:
    """That a layout with float16 scales rounds those of this linear."""
    if half_scale(linear.packed.scale)[1] == 0.0:
        return []
    asked = f"{linear.format.type}/{linear.format.granularity or 'ch'}"
    return [
        (
            f"the layout's scales are float16: those of {linear.format} are rounded (by less than 1 in 1,000)",
            f"quantize with w={asked}/f16, whose scales are float16 already",
        )
    ]


def input_loss(linear: Linear) -> list[Loss]:
    """That a layout of weights alone leaves the input in float."""
    if not linear.x:
        return []
    return [
        (
            f"the layout holds weights only: the input, x={linear.x}, stays float",
            "nothing, or export_compressed_tensors, which holds formats of inputs",
        )
    ]


def _more(module: QuantLinear) -> Loss | None:
    """That a linear does something to its input, or beside its weight, which no layout can say."""
    if module.rotation is not None:
        what, step = "its input is rotated while the model runs", "quantize without online rotations"
    elif module.low is not None:
        what, step = "a low-rank part stands beside its weight", "quantize without low-rank compensation"
    elif module.smooth is not None:
        what, step = "its input is divided by smoothing factors", "fold the smoothing into norms, or leave it out"
    else:
        return None
    return f"{what}, which no layout holds: the weight is written in float", step


def float_weight(module: QuantLinear | QuantMixed) -> Tensor:
    """[N, K] in the model's dtype, so that y = x W^T + b does what the module does: its smoothing factors in it."""
    weight, smooth = module.weight, module._buffers.get("smooth")
    if smooth is None:
        return weight
    around = module.rotation, module._buffers.get("gain")
    inner = as_packed(weight.to(torch.float32), *around) / smooth
    return as_read(inner, *around).to(weight.dtype)


def sorted_groups(g_idx: Tensor, group: int) -> Tensor | None:
    """The order of columns that brings each group's together, int64 [K]; None where the groups are not of `group`
    columns each (the last may be shorter)."""
    count = g_idx.numel()
    wanted = torch.arange(count, device=g_idx.device) // group
    order = torch.argsort(g_idx.to(torch.int64), stable=True)
    return order if torch.equal(g_idx.to(torch.int64)[order], wanted) else None


def in_order(order: Tensor) -> bool:
    """Whether columns are where they were."""
    return bool(torch.equal(order, torch.arange(order.numel(), device=order.device)))


def misfit(name: str, expected: str, tensor: Tensor) -> ValueError:
    """A tensor of a file that does not fit the linear it belongs to."""
    return ValueError(
        explain(
            f"{name!r} does not fit the model: the checkpoint is of another architecture, or altered",
            expected=expected,
            found=f"{dtype_name(tensor.dtype)}, shape {list(tensor.shape)}",
        )
    )


def need(tensors: Mapping[str, Tensor], fqn: str, *leaves: str) -> list[Tensor]:
    """Those tensors of a linear; ValueError where one is missing."""
    for leaf in leaves:
        if leaf not in tensors:
            found = ", ".join(sorted(tensors))
            raise ValueError(explain(f"the checkpoint lacks '{fqn}.{leaf}'", expected=", ".join(leaves), found=found))
    return [tensors[leaf] for leaf in leaves]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
