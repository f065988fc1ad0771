"""The numbers of every format: choosing scales, quantizing, dequantizing. The one source of truth for all backends.

    integers   q = clamp(round_half_even(x / scale) + zero)        x' = (q - zero) * scale
    floats     q = nearest value of the type to x / scale          x' = value(q) * scale

All arithmetic is f32. A scale that would be zero or subnormal (an all-zero channel) becomes 1, so its codes are 0.
Scales are shaped by `Format.scale_shape` and stored in `Format.scale_dtype`; the second tensor of `QParams` is the
uint8 zero point of an affine format, or the f32 scale of the whole tensor, shape (), where scales are e4m3 (NVFP4), or
mean and block scales, f32 [1 + blocks], where they are dq (see `qfx.rounding.nested`).
These exclude each other, so one slot serves all everywhere (`w_zero` in the ops, `Packed.zero`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import Format
from qfx.rounding import nested

TINY = torch.finfo(torch.float32).tiny
_E4M3_MAX = 448.0
_LEAST_SCALE = {"f16": 2.0**-24, "bf16": TINY, "e4m3": 2.0**-9}
# QLoRA (Dettmers et al. 2023), appendix E, as in bitsandbytes
NF4_VALUES: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# OCP Microscaling v1.0, 5.3.3: sign, two exponent bits, one mantissa bit; code 8 is minus zero
F4_MAGNITUDES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
F4_VALUES: tuple[float, ...] = (*F4_MAGNITUDES, *(-v for v in F4_MAGNITUDES))
_CELLS, _MANY_VALUES = 64, 4096  # of `_below`
_MX_EMAX = {"f4e2m1": 2, "f8e4m3": 8, "f8e5m2": 15}  # exponent of the greatest value of the type


class QParams(NamedTuple):
    """scale in `Format.scale_dtype`; zero: uint8 zero point, or f32 global scale of e4m3 scales, or None."""

    scale: Tensor
    zero: Tensor | None


def choose_qparams(x: Tensor, fmt: Format, *, activation: bool = False, name: str = "tensor") -> QParams:
    """Scales (and zero points) from the extremes of `x`, shaped `fmt.scale_shape(x.shape)`.

    Raises ValueError naming `name` where `x` holds NaN or Inf.
    """
    assert not fmt.is_plain, f"{fmt} has no scale"
    params = range_qparams(*value_range(x, fmt, activation=activation), fmt)
    scale = effective_scale(params.scale, params.zero, fmt)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(_not_finite(x, name))
    return params


def value_range(x: Tensor, fmt: Format, *, activation: bool = False) -> tuple[Tensor, Tensor]:
    """Least and greatest value of `x` (f32) for each scale of `fmt`. An empty tensor has the range (0, 0)."""
    x = x.detach().to(torch.float32)
    shape = fmt.scale_shape(x.shape, activation=activation)
    if x.numel() == 0:
        return x.new_zeros(shape), x.new_zeros(shape)
    x = split(x, fmt)
    dims = _reduced_dims(x.ndim, fmt, activation)
    return x.amin(dims).reshape(shape), x.amax(dims).reshape(shape)


def sums_by_scale(x: Tensor, fmt: Format) -> Tensor:
    """Sum of a weight-shaped `x` over the elements that share a scale of `fmt`, f32, `fmt.scale_shape(x.shape)`."""
    shape = fmt.scale_shape(x.shape)
    parts = split(x.to(torch.float32), fmt)
    return parts.sum(_reduced_dims(parts.ndim, fmt, activation=False)).reshape(shape)


def range_qparams(low: Tensor, high: Tensor, fmt: Format) -> QParams:
    """Scales and zero points for values known to lie in [low, high] (f32, any shape). Zero is always representable."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    absmax = torch.maximum(-low, high)
    if fmt.has_zero:
        scale = _store_scale(divided(high, fmt.qmax) - divided(low, fmt.qmax), fmt)
        zero = torch.round(-low / scale.to(torch.float32)).clamp(0, fmt.qmax)
        return QParams(scale, zero.to(torch.uint8))
    if fmt.scale_type == "e8m0" and fmt.type != "nf4":
        return QParams(_mx_scale(absmax, fmt), None)
    if fmt.nested:
        scale = divided(absmax, fmt.qmax)
        whole = nested.above(scale)
        return QParams(nested.encode(scale, whole), whole)
    if fmt.has_global_scale:
        total = absmax.amax() if absmax.numel() else absmax.new_zeros(())
        whole = _guard(divided(total, fmt.qmax * _E4M3_MAX))
        local = _store_scale(divided(absmax, fmt.qmax) / whole, fmt)
        return QParams(local, whole)
    return QParams(_store_scale(divided(absmax, fmt.qmax), fmt), None)


def run_time_qparams(x: Tensor, fmt: Format, *, activation: bool = True) -> QParams:
    """Scales and zero points of a dynamic format for the values at hand: of `fmt.clip` percent of their extremes."""
    low, high = value_range(x, fmt, activation=activation)
    if fmt.clip != 100:
        low, high = low * (fmt.clip / 100), high * (fmt.clip / 100)
    return range_qparams(low, high, fmt)


def signed_scale(scale: Tensor, whole: Tensor | None, fmt: Format) -> Tensor:
    """An f32 scale as it is stored, of either sign where the scale type has one. whole: the scale above e4m3 scales."""
    if fmt.has_global_scale:
        assert whole is not None, f"{fmt} needs its global scale"
        if fmt.nested:
            return nested.encode(scale, whole)
        scale = scale / whole
    stored = _store_scale(scale.abs(), fmt)
    if fmt.scale_type == "e8m0":
        return stored
    return torch.where(scale < 0, -stored.to(torch.float32), stored.to(torch.float32)).to(stored.dtype)


def effective_scale(scale: Tensor, zero: Tensor | None, fmt: Format) -> Tensor:
    """The f32 factor of the codes: the stored scale, times the global scale where the format has one."""
    if fmt.nested:
        assert zero is not None, f"{fmt} needs what stands above its scales"
        found = nested.decode(scale, zero)
        return torch.where(found.abs() < TINY, TINY, found)
    scale = scale.to(torch.float32)
    if fmt.has_global_scale:
        assert zero is not None, f"{fmt} needs its global scale"
        scale = scale * zero
    return scale


def quantize(x: Tensor, fmt: Format, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """Codes of `x`, same shape, dtype `fmt.code_dtype`; values beyond the range saturate. Plain formats only cast.

    NaN has no meaning in integer codes and is not looked for here.
    """
    if fmt.is_plain:
        return x.to(fmt.code_dtype)
    assert scale is not None, f"{fmt} needs a scale"
    steps = split(x.to(torch.float32), fmt) / spread(effective_scale(scale, zero, fmt), fmt)
    return join(_encode(steps, fmt, scale, zero), fmt, x.shape)


def dequantize(
    codes: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of unpacked `codes` (`fmt.code_dtype`), computed in f32 and cast to `dtype` once."""
    if fmt.is_plain:
        return codes.to(dtype)
    assert scale is not None, f"{fmt} needs a scale"
    values = split(_decode(codes, fmt), fmt)
    if fmt.has_zero:
        values = values - spread(zero_points(zero, scale, fmt), fmt)
    values = values * spread(effective_scale(scale, zero, fmt), fmt)
    return cast(join(values, fmt, codes.shape), dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which is left out where it changes nothing.

    The compiler of torch 2.11 takes an autograd.Function that ends with such a one for one without gradients.
    """
    return x if x.dtype == dtype else x.to(dtype)


def fake_quantize(
    x: Tensor, fmt: Format, scale: Tensor | None = None, zero: Tensor | None = None, *, activation: bool = False
) -> Tensor:
    """`x` as it comes back from `fmt`, in x.dtype. No scale: that of `x` itself, as dynamic formats have."""
    if fmt.is_plain:
        return x.to(fmt.code_dtype).to(x.dtype)
    if scale is None:
        scale, zero = run_time_qparams(x, fmt, activation=activation)
    return dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero, x.dtype)


def require_finite(x: Tensor, name: str) -> None:
    """Raises ValueError naming `name` where `x` holds NaN or Inf."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(_not_finite(x, name))


def split(x: Tensor, fmt: Format) -> Tensor:
    """`x`, zero padded, with groups on their own axis: [.., K] to [.., G, N], or [.., R, C] to [.., R/M, M, C/N, N]."""
    if fmt.group:
        groups = -(-x.shape[-1] // fmt.group)
        return _pad(x, groups * fmt.group, -1).reshape(*x.shape[:-1], groups, fmt.group)
    if fmt.block:
        (m, n), lead = fmt.block, x.shape[:-2]
        rows, columns = -(-x.shape[-2] // m), -(-x.shape[-1] // n)
        return _pad(_pad(x, columns * n, -1), rows * m, -2).reshape(*lead, rows, m, columns, n)
    return x


def join(x: Tensor, fmt: Format, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The inverse of `split`: back to `shape`, padding cut off."""
    if fmt.group:
        return x.flatten(-2)[..., : shape[-1]]
    if fmt.block:
        return x.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]
    return x


def spread(scale: Tensor, fmt: Format) -> Tensor:
    """A tensor of `fmt.scale_shape` with axes added so that it broadcasts against `split(x)`."""
    if fmt.group:
        return scale.unsqueeze(-1)
    if fmt.block:
        return scale.unsqueeze(-1).unsqueeze(-3)
    return scale


def zero_points(zero: Tensor | None, scale: Tensor, fmt: Format) -> Tensor:
    """Zero points of a format that has them, f32. Packed ones (see `qfx.packing`) could broadcast in silence."""
    assert zero is not None, f"{fmt} needs a zero point"
    assert not zero.dim() or zero.shape == scale.shape, f"{fmt}: zero points of {zero.shape}, scales of {scale.shape}"
    return zero.to(torch.float32)


def _reduced_dims(ndim: int, fmt: Format, activation: bool) -> tuple[int, ...]:
    if fmt.granularity == "":
        return tuple(range(ndim))
    if fmt.granularity == "head":
        return tuple(dim for dim in range(ndim) if dim != ndim - 3)
    if fmt.granularity == "ch" and activation:
        return tuple(range(ndim - 1))
    return (-3, -1) if fmt.block else (-1,)


def _pad(x: Tensor, size: int, dim: int) -> Tensor:
    extra = size - x.shape[dim]
    if extra == 0:
        return x
    shape = list(x.shape)
    shape[dim] = extra
    return torch.cat([x, x.new_zeros(shape)], dim)


def _guard(scale: Tensor) -> Tensor:
    """1 where the scale is zero or subnormal; NaN and Inf stay."""
    return torch.where(scale < TINY, torch.ones_like(scale), scale)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number rounded once on every device: on a GPU torch multiplies by the reciprocal of a Python number."""
    return x / (x.new_full((), number) if x.device.type == "cuda" else number)


def _store_scale(scale: Tensor, fmt: Format) -> Tensor:
    """An f32 scale rounded to the stored type (e8m0: up), saturated, never zero; NaN where it is not finite."""
    dtype = fmt.scale_dtype
    if dtype == torch.float32:
        return _guard(scale)
    if fmt.scale_type == "e8m0":
        mantissa, exponent = torch.frexp(_guard(scale))
        return _power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype), scale)
    fitted = _guard(scale).clamp(_LEAST_SCALE[fmt.scale_type], torch.finfo(dtype).max)
    kept = torch.where(torch.isfinite(scale), fitted, torch.full_like(scale, torch.nan))
    return kept.to(dtype)


def _mx_scale(absmax: Tensor, fmt: Format) -> Tensor:
    """OCP Microscaling v1.0, 6.3: 2^(floor(log2(absmax)) - emax); b-bit integers have b - 2 binary places."""
    emax = _MX_EMAX[fmt.type] if fmt.is_float else fmt.bits - 2
    _, exponent = torch.frexp(absmax)
    exponent = torch.where(absmax < TINY, torch.zeros_like(exponent), exponent - 1 - emax)
    return _power_of_two(exponent, absmax)


def _power_of_two(exponent: Tensor, like: Tensor) -> Tensor:
    """e8m0 scales 2^exponent; code 255 is NaN, kept where `like` is not finite."""
    codes = exponent.clamp(-126, 127) + 127
    codes = torch.where(torch.isfinite(like), codes, torch.full_like(codes, 255))
    return codes.to(torch.uint8).view(torch.float8_e8m0fnu)


def _encode(steps: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes of values already divided by their scale."""
    if fmt.type == "nf4":
        table = torch.tensor(NF4_VALUES, dtype=torch.float64, device="cpu")
        middles = ((table[1:] + table[:-1]) / 2).to(torch.float32).to(steps.device)
        return _below(steps.contiguous(), middles).to(torch.uint8)
    if fmt.type == "f4e2m1":
        return _encode_f4(steps)
    if fmt.is_float:
        return steps.clamp(fmt.qmin, fmt.qmax).to(fmt.code_dtype)
    codes = torch.round(steps)
    if fmt.has_zero:
        codes = codes + spread(zero_points(zero, scale, fmt), fmt)
    return codes.clamp(fmt.qmin, fmt.qmax).to(fmt.code_dtype)


def _encode_f4(steps: Tensor) -> Tensor:
    """Round half to even: a tie between magnitudes i and i + 1 goes up where i is odd."""
    magnitudes = torch.tensor(F4_MAGNITUDES, dtype=torch.float32, device="cpu")
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))
    codes = _below(steps.abs().contiguous(), middles.to(steps.device))
    return codes.to(torch.uint8) | (torch.signbit(steps).to(torch.uint8) << 3)


def _below(x: Tensor, middles: Tensor) -> Tensor:
    """How many of a few ascending middles are less than each value, int32; all of them for NaN."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < _MANY_VALUES:
        return torch.bucketize(x, middles, out_int32=True)
    # torch.bucketize searches value by value. A cell of even width that holds at most one middle tells all but that.
    low, cells = middles[0], _CELLS / (middles[-1] - middles[0])

    def cell(values: Tensor) -> Tensor:
        found = (values - low).mul_(cells).add_(1).clamp_(0, _CELLS + 2).nan_to_num_(_CELLS + 2)
        return found.to(torch.int32)

    before = (cell(middles)[None, :] < torch.arange(_CELLS + 3, device="cpu")[:, None]).sum(1, dtype=torch.int32)
    following = torch.cat([middles, middles.new_full((1,), torch.inf)])[before]
    at = cell(x.reshape(-1))
    beyond = x.reshape(-1) > following.index_select(0, at)
    return before.index_select(0, at).add_(beyond.to(torch.int32)).reshape(x.shape)


def _decode(codes: Tensor, fmt: Format) -> Tensor:
    """f32 values of codes before the zero point and the scale."""
    if fmt.type in ("nf4", "f4e2m1"):
        table = torch.tensor(NF4_VALUES if fmt.type == "nf4" else F4_VALUES, dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    if fmt.type == "f8e4m3" and codes.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch's own cast is scalar code there: a look-up takes a quarter of its time
        table = torch.arange(256, dtype=torch.uint8, device="cpu").view(codes.dtype).to(torch.float32)
        return table.index_select(0, codes.view(torch.uint8).reshape(-1).to(torch.int32)).reshape(codes.shape)
    return codes.to(torch.float32)


def _not_finite(x: Tensor, name: str) -> str:
    nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    found = f"{nan} NaN and {inf} Inf of {x.numel()} values"
    if nan + inf == 0:
        found = f"values up to {float(x.abs().max()):g}, beyond float32"
    return explain(
        f"cannot quantize {name!r}, shape {list(x.shape)}: it is not finite",
        expected="finite values",
        found=found,
        next_step="look for a failed load or an overflow in half precision before quantizing",
    )
