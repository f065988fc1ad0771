"""Linear layers whose weights alone are quantized.

qfx_triton::linear_weight_only(Tensor x, Tensor[] w, Tensor? bias, Tensor? smooth, str w_format, int n, str act="")
    -> Tensor

By the number M of rows of x: for a few tensor cores on weights that stay in the registers of who read them
(`fragments`, on 9.x from 9 rows on `abreast`), or, for float32 and formats that these do not serve, a product of
vectors (`gemv`); then tensor cores on unpacked tiles, where these are few with K split between programs and the parts
added in a fixed order (`dot_tiles`); for many rows the weight is written out in x.dtype and multiplied by torch
(`dequantize`).
`weight_only_config` has the numbers. w and w_format come from `qfx.backends.triton.weight_only_pack`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.backends.triton.decode_asm import TABLES, biased_asm, decode_asm
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels import weight_only as kernels
from qfx.backends.triton.kernels.decode import parts_of
from qfx.backends.triton.kernels.weight_only_abreast import abreast
from qfx.backends.triton.kernels.weight_only_fragments import columns_of, fragments, together_of
from qfx.backends.triton.kernels.weight_only_gemv import gemv
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.layout import UNIT_THREE, padded
from qfx.backends.triton.library import define
from qfx.backends.triton.pair_asm import gain, pair_asm
from qfx.backends.triton.products import ACTIVATIONS
from qfx.backends.triton.row_codes import dense
from qfx.backends.triton.weight_only_config import (
    ABREAST,
    DEQUANTIZE,
    FEWEST_DEQUANTIZE,
    FRAGMENTS,
    GEMV,
    UNIT,
    blocks_of,
    choose,
    fitting,
    heuristic,
    without_fragments,
)
from qfx.backends.triton.weight_only_pack import group_of, reason_against_weight, stored_bits
from qfx.errors import UnsupportedError, explain, warn
from qfx.format import Format

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 1024
LANGUAGE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Weight:
    """The tensors of a packed weight, or of one for each expert, by name, and what kernels are told of its format."""

    codes: Tensor
    upper: Tensor
    scale: Tensor
    whole: Tensor
    zero: Tensor | None
    table: Tensor | None
    fmt: Format

    @property
    def constants(self) -> dict[str, Any]:
        fmt, bits = self.fmt, stored_bits(self.fmt)
        kinds = {"nf4": "lut", "f4e2m1": "lut", "f8e4m3": "e4m3", "f8e5m2": "e5m2"}
        return {
            "BITS": bits,
            "KIND": kinds.get(fmt.type, "int"),
            "SCALE": fmt.scale_type if fmt.scale_dtype.itemsize == 1 else "",
            "GROUP": group_of(fmt),
            "OFFSET": 1 << (bits - 1) if fmt.is_integer and fmt.symmetric else 0,
        }


def linear_weight_only(
    x: Tensor, w: list[Tensor], bias: Tensor | None, smooth: Tensor | None, w_format: str, n: int, act: str = ""
) -> Tensor:
    """x [.., K] float16, bfloat16 or float32 times a packed weight [n, K]: [.., n] in x.dtype.

    act: an activation of ACTIVATIONS, [.., n / 2] are that function of the first half of the columns, times the second
    half: the gate of a gated layer in the rows above those that it is for. Where `fragments` serve, nothing is rounded
    before.
    smooth f32 [K] divides x first, rounded to x.dtype. Products of float32 are those of three tf32 terms on tensor
    cores, else sums are f32 and integers exact; NF4's values and, on tiles, weights in groups below 128 columns are
    rounded to x.dtype. Raises ValueError for other dtypes, unknown functions, sizes that do not fit
    and tensors on different devices.
    """
    weight = named(w, Format.parse(w_format))
    _check(x, weight, bias, smooth, n, act)
    bias = dense(bias)
    if smooth is not None:
        x = (x.to(torch.float32) / smooth).to(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    m, k = rows.shape
    device = device_of(x)
    config = dict(choose(device, weight.fmt, m, n, k, x.dtype))
    if config["PATH"] in (FRAGMENTS, ABREAST) and not begins_aligned(weight):  # it reads two bytes and more at once
        config = dict(without_fragments(device, weight.fmt, m, n, k, x.dtype))
    path = config.pop("PATH")
    if k == 0 or m == 0:
        out = _finished(x.new_zeros((1, m, n)), bias, x.dtype, act)
    elif path == FRAGMENTS:
        out = _fragments(rows, weight, bias, act, n, config)
    elif path == GEMV:
        out = _finished(_gemv(rows, weight, bias, n, config), None, x.dtype, act)
    elif path == DEQUANTIZE:
        out = _multiplied(rows, weight, bias, n, act)
    else:
        parts = (_abreast if path == ABREAST else _dot)(rows, weight, bias, n, config)
        out = _finished(parts, bias if len(parts) > 1 else None, x.dtype, act)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _fragments(x: Tensor, w: Weight, bias: Tensor | None, act: str, n: int, config: Config) -> Tensor:
    device, (m, k), warps = device_of(x), x.shape, config["num_warps"]
    to = dot_dtype(x.dtype)
    columns = n // 2 if act else n
    out = torch.empty((m, columns), dtype=x.dtype, device=x.device)
    launch(fragments, (triton.cdiv(columns, columns_of(act) * config["ROWS"]),), x, w.codes, w.upper, w.scale, w.zero,
           w.whole, w.table, bias, out, m, columns, k, x.stride(0), w.codes.stride(0), w.upper.stride(0),
           w.scale.stride(0), **w.constants, **pairs_of(w.fmt, to, device), TO=LANGUAGE[to], **fitting(w.fmt, k, warps),
           TOKENS=triton.cdiv(m, 8), S=warps, ACT=act, config=config)  # fmt: skip
    return out


def _abreast(x: Tensor, w: Weight, bias: Tensor | None, n: int, config: Config) -> Tensor:
    device, (m, k), warps, splits = device_of(x), x.shape, config["num_warps"], config["SPLITS"]
    to = dot_dtype(x.dtype)
    blocks, whole = blocks_of(w.fmt, k)
    parts = _parts(x, n, splits)
    launch(abreast, (triton.cdiv(n, 16 * warps), splits), x, w.codes, w.upper, w.scale, w.zero, w.whole, w.table, bias,
           parts, m, n, k, x.stride(0), w.codes.stride(0), w.upper.stride(0), w.scale.stride(0),
           triton.cdiv(blocks, splits), **w.constants, **pairs_of(w.fmt, to, device), TO=LANGUAGE[to], EVEN=whole,
           T=max(16, triton.next_power_of_2(m)), W=warps, config=config)  # fmt: skip
    return parts


def _parts(x: Tensor, n: int, splits: int) -> Tensor:
    """For parts of K [SPLITS, M, N] f32, or for the whole product in x.dtype, to which bias is added."""
    return torch.empty((splits, x.shape[0], n), dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)


def _finished(parts: Tensor, bias: Tensor | None, dtype: torch.dtype, act: str) -> Tensor:
    """Parts of K [SPLITS, M, N] added in their order, plus bias, and their halves as `act` says."""
    if len(parts) == 1 and bias is None and not act:
        return parts[0]
    _, m, n = parts.shape
    out = torch.empty((m, n // 2 if act else n), dtype=dtype, device=parts.device)
    launch(kernels.sum_splits, (triton.cdiv(out.numel(), _BLOCK),), parts, bias, out, out.numel(), out.shape[1],
           SPLITS=len(parts), BLOCK=_BLOCK, ACT=act, config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return out


def pairs_of(fmt: Format, dtype: torch.dtype, device: Device) -> dict[str, Any]:
    """How `fragments` unpacks: constants of the kernel."""
    if device.interpreted:
        return {"ASM": "", "ASM_ODD": "", "GAIN": 1}
    bits = stored_bits(fmt)
    zeros = parts_of(bits) // together_of(bits, group_of(fmt)) if fmt.has_zero else 0
    asm, odd = (pair_asm(fmt, dtype, odd, zeros) for odd in range(2))
    return {"ASM": asm, "ASM_ODD": odd, "GAIN": gain(fmt, dtype)}


def _gemv(x: Tensor, w: Weight, bias: Tensor | None, n: int, config: Config) -> Tensor:
    device, (m, k) = device_of(x), x.shape
    out = _parts(x, n, 1)
    exact = x.dtype == torch.float32
    asm = "" if exact or device.interpreted else gemv_asm(w)
    launch(gemv, (triton.cdiv(n, config["BN"]),), x, w.codes, w.upper, w.scale, w.zero, w.whole, w.table, bias, out,
           n, k, x.stride(0), w.codes.stride(0), w.upper.stride(0), w.scale.stride(0), M=m, **w.constants,
           NATIVE=device.has_fp8 and not device.interpreted, EXACT=exact, ASM=asm, config=config)  # fmt: skip
    return out


def begins_aligned(w: Weight) -> bool:
    """Whether the codes begin at multiples of 16 bytes, as those do that were not cut out of other tensors."""
    return (w.codes.data_ptr() | w.upper.data_ptr()) % 16 == 0


def gemv_asm(w: Weight) -> str:
    if w.fmt.bits == 3 and not begins_aligned(w):
        return ""  # it takes four bytes for those of one row, as they are where a thread reads 16
    return _gemv_asm(w.fmt)


@functools.cache
def _gemv_asm(fmt: Format) -> str:
    return biased_asm(stored_bits(fmt)) if fmt.is_integer else decode_asm(fmt, torch.float16)


def _dot(x: Tensor, w: Weight, bias: Tensor | None, n: int, config: Config) -> Tensor:
    device, (m, k) = device_of(x), x.shape
    splits, height, width = config["SPLITS"], config["BM"], config["BN"]
    to = dot_dtype(x.dtype)
    asm, odd = ("", "") if device.interpreted else (decode_asm(w.fmt, to), decode_asm(w.fmt, to, 1))
    parts = _parts(x, n, splits)
    unit = UNIT_THREE if w.fmt.bits == 3 else UNIT
    each = triton.cdiv(triton.cdiv(k, unit), splits)
    launch(kernels.dot_tiles, (triton.cdiv(n, width) * triton.cdiv(m, height), splits), x, w.codes, w.upper, w.scale,
           w.zero, w.whole, w.table, bias, parts, m, n, k, x.stride(0), w.codes.stride(0), w.upper.stride(0),
           w.scale.stride(0), each, **w.constants, NATIVE=device.has_fp8 and not device.interpreted,
           EXACT=to == torch.float32, ASM=asm, ASM_ODD=odd, TO=LANGUAGE[to], EVEN=k % unit == 0,
           config=config)  # fmt: skip
    return parts


def _multiplied(x: Tensor, w: Weight, bias: Tensor | None, n: int, act: str) -> Tensor:
    """By torch, with the weight written out; by tiles where there is no memory for that, which is told."""
    try:
        full = _dequantized(w, n, x.shape[1], x.dtype)
    except torch.OutOfMemoryError as error:
        warn(
            explain(
                f"no memory for a weight [{n}, {x.shape[1]}] in {x.dtype}: it is unpacked by tiles, which is slower",
                found=str(error).partition("\n")[0],
                next_step="leave more memory free, or call with fewer rows at a time",
            )
        )
        fewer = (64 if x.dtype == torch.float32 else FEWEST_DEQUANTIZE) - 1  # rows for which tiles are chosen
        config = heuristic(device_of(x), w.fmt, fewer, n, x.shape[1], x.dtype)
        kept = {key: 1 if key == "SPLITS" else value for key, value in config.items() if key != "PATH"}
        whole = _dot(x, w, bias, n, kept)
    else:
        whole = torch.nn.functional.linear(x, full, None if bias is None else bias.to(x.dtype))[None]
    return _finished(whole, None, x.dtype, act)


def _dequantized(w: Weight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The weight [n, k] in `dtype`."""
    full = torch.empty((n, k), dtype=dtype, device=w.codes.device)
    rows = 32
    launch(kernels.dequantize, (triton.cdiv(k, UNIT), triton.cdiv(n, rows)), w.codes, w.upper, w.scale, w.zero,
           w.whole, w.table, full, n, k, w.codes.stride(0), w.upper.stride(0), w.scale.stride(0), **w.constants,
           BN=rows, config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return full


def named(w: list[Tensor], fmt: Format) -> Weight:
    """The tensors of `pack_weight_only` by name."""
    count = 3 + (fmt.bits == 3) + fmt.has_zero + (fmt.type in TABLES)
    if reason := reason_against_weight(str(fmt)):
        raise UnsupportedError(explain(f"qfx_triton::linear_weight_only: {reason}", found=str(fmt)))
    if len(w) != count:
        raise ValueError(
            explain(
                f"the tensors are not those of a packed weight in the format '{fmt}'",
                expected=f"{count} tensors",
                found=f"{len(w)} tensors",
                next_step="pass both results of pack_weight_only",
            )
        )
    codes, *rest = w
    upper = rest.pop(0) if fmt.bits == 3 else codes
    scale, whole, *rest = rest
    zero = rest.pop(0) if fmt.has_zero else None
    return Weight(codes, upper, scale, whole, zero, rest[0] if rest else None, fmt)


def _check(x: Tensor, w: Weight, bias: Tensor | None, smooth: Tensor | None, n: int, act: str) -> None:
    """Raises ValueError for an input that the kernels cannot read."""
    k = x.shape[-1] if x.dim() else 0
    unit = UNIT_THREE if w.fmt.bits == 3 else UNIT
    bits = 2 if w.fmt.bits == 3 else stored_bits(w.fmt)
    expected = (n, padded(k, unit) * bits // 8)
    fits = [
        ("x", x.dtype in DTYPES and x.dim() > 0, ", ".join(map(str, DTYPES)), x.dtype),
        ("the packed weight", w.codes.shape == expected, f"codes {list(expected)} for K = {k}", list(w.codes.shape)),
        ("bias", bias is None or bias.shape == (n,), f"shape [{n}]", bias),
        ("smooth", smooth is None or smooth.shape == (k,), f"shape [{k}]", smooth),
        ("act", act in ACTIVATIONS, f"one of {ACTIVATIONS}", repr(act)),
        ("n", not act or n % 2 == 0, "two halves", n),
    ]
    for name, good, due, found in fits:
        if not good:
            shown = list(found.shape) if isinstance(found, Tensor) else found
            raise ValueError(explain(f"qfx_triton::linear_weight_only: {name} does not fit", expected=due, found=shown))
    given = [t for t in (x, w.codes, w.scale, w.whole, bias, smooth) if t is not None]
    if len({t.device for t in given}) > 1:
        places = ", ".join(sorted({str(t.device) for t in given}))
        raise ValueError(explain("qfx_triton::linear_weight_only: tensors lie on several devices", found=places,
                                 next_step="move input, weight and bias to one GPU"))  # fmt: skip


def _fake(
    x: Tensor, w: list[Tensor], bias: Tensor | None, smooth: Tensor | None, w_format: str, n: int, act: str = ""
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // 2 if act else n))


define(
    "linear_weight_only(Tensor x, Tensor[] w, Tensor? bias, Tensor? smooth, str w_format, int n, str act='') -> Tensor",
    linear_weight_only,
    _fake,
)
