"""What ops whose result goes straight to codes share: formats, outputs, configurations. See `kernels/row_codes.py`.

Such an op returns a list: the operand, just as `quantize_rows.quantize_dynamic` gives it (codes [.., aligned(K)], scale
f32 [.., 1], zero uint8 [.., 1] or [0]), or `quantize_static` (codes alone); then the float results that were asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.backends.triton.tuning import tuned
from qfx.errors import explain
from qfx.format import Format, dtype_name

ALIGNMENT = 16  # bytes
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WHOLE = 16384  # elements of a row that a program holds
_LONG_BLOCK = 8192
_TILE = 2048  # elements that a program with several short rows holds
_A_THREAD = 16  # elements
_LEAST_PART = 128  # columns
_WARPS = 16  # that a processor holds with as many registers as a thread may have, halved


def aligned(k: int) -> int:
    """K rounded up to whole units of 16 bytes of 8-bit codes."""
    return -(-k // ALIGNMENT) * ALIGNMENT


@functools.lru_cache(maxsize=256)
def reason_against(fmt: Format) -> str | None:
    """Why activations of this format have no kernel here, or None."""
    if not (fmt.is_integer or fmt.type == "f8e4m3"):
        return f"the codes of '{fmt}' are neither integers nor f8e4m3"
    if fmt.group is not None:
        if not fmt.dynamic or fmt.is_integer:
            return f"'{fmt}': scales in groups of an activation are for f8e4m3, and found at run time"
        if fmt.group & (fmt.group - 1) or not 32 <= fmt.group <= 4096:
            return f"'{fmt}': groups of activations are powers of two from 32 to 4096"
    elif fmt.granularity not in ("", "tok"):
        return f"'{fmt}': activations have a scale for the tensor or for each token"
    if fmt.scale_type != "f32" and fmt.dynamic:
        return f"'{fmt}': scales found at run time are f32"
    return f"'{fmt}': a scale above others has no kernel" if fmt.has_global_scale else None


def shift_of(fmt: Format) -> int:
    """What is taken from the codes of a format, and from its zero points, to fit int8."""
    return 128 if fmt.has_zero and fmt.bits == 8 else 0


@functools.lru_cache(maxsize=256)
def reason_against_rows(fmt: Format) -> str | None:
    """Why such an op does not round to a format, or None."""
    if reason := reason_against(fmt):
        return reason
    if fmt.granularity != ("tok" if fmt.dynamic else ""):
        return f"'{fmt}': a row has one scale of its own, found at run time (/tok), or one fixed for all rows"
    return None


def outputs(x: Tensor, fmt: Format) -> list[Tensor]:
    """The tensors of an operand, without values."""
    dtype = fmt.code_dtype if fmt.is_float else torch.int8
    made = [x.new_empty((*x.shape[:-1], aligned(x.shape[-1])), dtype=dtype)]
    if fmt.dynamic:
        one = (*x.shape[:-1], 1)
        made += [x.new_empty(one, dtype=torch.float32), x.new_empty(one if fmt.has_zero else (0,), dtype=torch.uint8)]
    return made


def slots(made: list[Tensor], fmt: Format) -> list[Tensor | None]:
    """(codes, scale, zero) as kernels take them, of a list by `outputs`: float codes as their bits."""
    codes = made[0].view(torch.uint8) if fmt.is_float else made[0]
    if not fmt.dynamic:
        return [codes, None, None]
    return [codes, made[1], made[2] if fmt.has_zero else None]


def constants(x: Tensor, smooth: Tensor | None, fmt: Format, device: Device) -> dict[str, Any]:
    """The constexprs of a format, for the results in x.dtype that smooth divides."""
    return {
        "QMIN": fmt.qmin, "QMAX": fmt.qmax, "CLIP": fmt.clip / 100, "SHIFT": shift_of(fmt),
        "SIGNED": fmt.symmetric, "FP8": 0 if fmt.is_integer else 2 if device.by_hand else 1,
        "BY_HAND": device.interpreted, "TWICE": x.dtype == torch.float32 or smooth is not None,
    }  # fmt: skip


def known_scale(fmt: Format, scale: Tensor | None, zero: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale f32 and zero point of a format, as far as they are not found at run time."""
    if fmt.dynamic:
        return None, None
    return None if scale is None else scale.to(torch.float32), zero if fmt.has_zero else None


def flat(x: Tensor) -> Tensor:
    """x [.., K] as rows [M, K] whose elements lie side by side; a copy only where that needs one."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector whose elements lie side by side, as kernels read it."""
    return None if vector is None else vector.contiguous()


def settings(
    device: Device, kernel: str, rows: Tensor, other: Tensor | None, smooth: Tensor | None, held: int = 0
) -> tuple[int, dict[str, int]]:
    """(programs, configuration of the kernel) for rows [M, K], perhaps with others like them, and smooth [K].

    held: how many vectors [K] a program holds while it walks. Without STAGES it is one of the kernel for long rows.
    """
    m, k = rows.shape
    if k > WHOLE:
        return m, {"BLOCK": _LONG_BLOCK, "num_warps": _warps(_LONG_BLOCK), "num_stages": 1}
    read = [t.dtype for t in (rows, other, smooth) if t is not None]  # tiles of each are on their way together
    problem = f"k={k} {dtype_name(rows.dtype)}"
    problem += ("" if other is None else " two") + ("" if smooth is None else " smooth")
    width = sum(dtype.itemsize for dtype in read)
    known = tuned(device, kernel, problem, m, lambda _: candidates(device, k, width))
    found = dict(known or heuristic(device, m, k, width, held))
    tiles = triton.cdiv(m, found["ROWS"])
    resident = found.pop("PROGRAMS")
    return min(tiles, resident * device.processors) if resident else tiles, found


@functools.lru_cache(maxsize=4096)
def heuristic(device: Device, m: int, k: int, width: int, held: int = 0) -> Config:
    """What is taken for M rows of K elements where nothing was measured. width: bytes of an element of all inputs.

    ROWS: rows of a tile, each in PARTS of BLOCK columns. PROGRAMS: that walk over the tiles, for each processor, all at
    work at once; 0 is one for each tile. STAGES: tiles of a program, one at work and the others on their way from
    memory.
    """
    block, parts = _blocks(k)
    rows = _power(_TILE // (block * parts))
    while rows > 1 and triton.cdiv(m, rows) < 2 * device.processors and not device.interpreted:
        rows //= 2
    tile = rows * block * parts
    walking = _warps(tile)
    if walking < _WARPS * 2 and parts == 1 and held < 2:
        walking = max(1, walking // 2)  # fewer threads have less to do for each row, and registers are there
    resident = _resident(device, tile * width, walking)
    if resident and triton.cdiv(m, rows) > 2 * resident * device.processors:
        return _config(rows, block, parts, resident, walking)
    return _config(rows, block, parts, 0, _warps(tile))


def candidates(device: Device, k: int, width: int) -> list[Config]:
    """What is worth measuring for rows of K elements, see `heuristic`; [] for rows that no program holds."""
    if k > WHOLE:
        return []
    block, parts = _blocks(k)
    found: dict[str, Config] = {}
    for rows in sorted({1, _power(_TILE // (block * parts))}):
        usual = _warps(rows * block * parts)
        for warps in sorted({max(1, usual // 2), usual, min(32, 2 * usual)}):
            most = _resident(device, rows * block * parts * width, warps)
            for resident in (0, most, most // 2):
                config = _config(rows, block, parts, resident, warps)
                found.setdefault(str(config), config)
    return list(found.values())[:20]


def _blocks(k: int) -> tuple[int, int]:
    """(columns of a block, blocks) of which a row of codes is made: a power of two, once or three times."""
    width = max(aligned(k), ALIGNMENT)
    whole = int(triton.next_power_of_2(width))
    return (whole // 4, 3) if width <= whole // 4 * 3 and whole >= 4 * _LEAST_PART else (whole, 1)


def _resident(device: Device, tile: int, warps: int) -> int:
    """How many programs a processor surely holds at once with two tiles of so many bytes on their way each."""
    return int(min(max(_WARPS // warps, 1), device.shared // (2 * tile + 1024)))


def _config(rows: int, block: int, parts: int, resident: int, warps: int) -> Config:
    return {"ROWS": rows, "BLOCK": block, "PARTS": parts, "PROGRAMS": resident, "STAGES": 3 if resident else 1,
            "num_warps": warps, "num_stages": 1}  # fmt: skip


def _warps(elements: int) -> int:
    return min(_power(elements // (32 * _A_THREAD)), 32)


def _power(n: int) -> int:
    """The greatest power of two that is not above n; 1 below it."""
    return 1 << max(n.bit_length() - 1, 0)


def check(op: str, x: Tensor, fmt: Format, *, alike: Mapping[str, Tensor | None],
          vectors: Mapping[str, Tensor | None], static: tuple[Tensor | None, Tensor | None]) -> None:  # fmt: skip
    """Raises ValueError where an op cannot take these tensors.

    alike: of x's shape and dtype. vectors: of one value for each column. static: scale and zero point.
    """
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(explain(f"{op} takes no such x", expected="f16, bf16 or f32, [.., K]", found=_told(x)))
    if reason := reason_against_rows(fmt):
        step = "write 'i8/tok', 'u8/tok' or 'f8e4m3/tok'"
        raise ValueError(explain(f"{op}: {reason}", found=str(fmt), next_step=step))
    for name, other in alike.items():
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype or other.device != x.device):
            raise ValueError(explain(f"{op}: {name} does not fit x", expected=_told(x), found=_told(other)))
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != x.shape[-1:] or vector.device != x.device):
            expected = f"shape [{x.shape[-1]}] on {x.device}"
            raise ValueError(explain(f"{op}: {name} does not fit x", expected=expected, found=_told(vector)))
    missing = static[0] is None or (fmt.has_zero and static[1] is None)
    if not fmt.dynamic and missing:
        what = "scale" if static[0] is None else "zero point"
        step = f"calibrate the layer, or use '{fmt.type}/tok' to find the scale at run time"
        raise ValueError(explain(f"{op}: static format '{fmt}' has no {what}", found="None", next_step=step))
    for value in static:
        if value is not None and (value.numel() != 1 or value.device != x.device):
            expected = f"one value on {x.device}"
            raise ValueError(
                explain(f"{op}: a static scale is one for all rows", expected=expected, found=_told(value))
            )


def _told(x: Tensor) -> str:
    return f"{dtype_name(x.dtype)} {list(x.shape)} on {x.device}"
