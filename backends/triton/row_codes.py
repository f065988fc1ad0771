"""What ops whose result goes straight to codes share: formats, outputs, configurations. See `kernels/row_codes.py`.

Such an op returns a list: the operand, just as `quantize_rows.quantize_dynamic` gives it (codes [.., aligned(K)], scale
f32 [.., 1], zero uint8 [.., 1] or [0]), or `quantize_static` (codes alone); then the float results that were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from qfx.backends.triton import quantize_rows
from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.backends.triton.tuning import tuned
from qfx.errors import explain
from qfx.format import Format

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WHOLE = 16384  # elements of a row that a program holds
_LONG_BLOCK = 8192
_TILE = 2048  # elements that a program with several short rows holds
_A_THREAD = 16  # elements
_WARPS = 16  # that a processor holds with as many registers as a thread may have, halved


def reason_against(fmt: Format) -> str | None:
    """Why such an op does not round to a format, or None."""
    if reason := quantize_rows.reason_against(fmt):
        return reason
    if fmt.granularity != ("tok" if fmt.dynamic else ""):
        return f"'{fmt}': a row has one scale of its own, found at run time (/tok), or one fixed for all rows"
    return None


def outputs(x: Tensor, fmt: Format) -> list[Tensor]:
    """The tensors of an operand, without values."""
    dtype = fmt.code_dtype if fmt.is_float else torch.int8
    made = [x.new_empty((*x.shape[:-1], quantize_rows.aligned(x.shape[-1])), dtype=dtype)]
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
        "QMIN": fmt.qmin, "QMAX": fmt.qmax, "CLIP": fmt.clip / 100, "SHIFT": quantize_rows.shift_of(fmt),
        "SIGNED": fmt.symmetric, "FP8": 0 if fmt.is_integer else 2 if device.by_hand else 1,
        "BY_HAND": device.interpreted, "TWICE": x.dtype == torch.float32 or smooth is not None,
    }  # fmt: skip


def flat(x: Tensor) -> Tensor:
    """x [.., K] as rows [M, K] whose elements lie side by side; a copy only where that needs one."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def settings(device: Device, kernel: str, rows: Tensor, inputs: int) -> tuple[int, dict[str, int]]:
    """(programs, configuration of the kernel) for `inputs` tensors of rows [M, K].

    Without STAGES it is one of the kernel for long rows.
    """
    m, k = rows.shape
    if k > WHOLE:
        return m, {"BLOCK": _LONG_BLOCK, "num_warps": _warps(_LONG_BLOCK), "num_stages": 1}
    problem = f"k={k} {str(rows.dtype).removeprefix('torch.')} {inputs}"
    width = inputs * rows.dtype.itemsize
    known = tuned(device, kernel, problem, m, lambda: candidates(device, m, k, width))
    found = dict(known or heuristic(device, m, k, width))
    tiles = triton.cdiv(m, found["ROWS"])
    resident = found.pop("PROGRAMS")
    return min(tiles, resident * device.processors) if resident else tiles, found


def heuristic(device: Device, m: int, k: int, width: int) -> Config:
    """What is taken for M rows of K elements where nothing was measured. width: bytes of an element of all inputs.

    ROWS: rows of a tile. PROGRAMS: that walk over the tiles, for each processor, all at work at once; 0 is one for each
    tile. STAGES: tiles of a program, one at work and the others on their way from memory.
    """
    block = _block(k)
    rows = max(1, _TILE // block)
    while rows > 1 and triton.cdiv(m, rows) < 2 * device.processors and not device.interpreted:
        rows //= 2
    walking = _warps(rows * block)
    if walking < _WARPS * 2:
        walking = max(1, walking // 2)  # fewer threads have less to do for each row, and registers are there
    resident = _resident(device, rows * block * width, walking)
    if resident and triton.cdiv(m, rows) > 2 * resident * device.processors:
        return _config(rows, block, resident, walking)
    return _config(rows, block, 0, _warps(rows * block))


def candidates(device: Device, m: int, k: int, width: int) -> list[Config]:
    """What is worth measuring for M rows of K elements, see `heuristic`; [] for rows that no program holds."""
    if k > WHOLE:
        return []
    block = _block(k)
    found: dict[str, Config] = {}
    for rows in sorted({1, max(1, _TILE // block)}):
        usual = _warps(rows * block)
        for warps in sorted({max(1, usual // 2), usual, min(32, 2 * usual)}):
            most = _resident(device, rows * block * width, warps)
            for resident in (0, most, most // 2):
                config = _config(rows, block, resident, warps)
                found.setdefault(str(config), config)
    return list(found.values())[:20]


def _block(k: int) -> int:
    return max(int(triton.next_power_of_2(quantize_rows.aligned(k))), quantize_rows.ALIGNMENT)


def _resident(device: Device, tile: int, warps: int) -> int:
    """How many programs a processor surely holds at once with two tiles of so many bytes on their way each."""
    return int(min(max(_WARPS // warps, 1), device.shared // (2 * tile + 1024)))


def _config(rows: int, block: int, resident: int, warps: int) -> Config:
    return {"ROWS": rows, "BLOCK": block, "PROGRAMS": resident, "STAGES": 3 if resident else 1, "num_warps": warps,
            "num_stages": 1}  # fmt: skip


def _warps(elements: int) -> int:
    return min(max(elements // (32 * _A_THREAD), 1), 32)


def check(op: str, x: Tensor, fmt: Format, *, alike: Mapping[str, Tensor | None],
          vectors: Mapping[str, Tensor | None], static: tuple[Tensor | None, Tensor | None]) -> None:  # fmt: skip
    """Raises ValueError where an op cannot take these tensors.

    alike: of x's shape and dtype. vectors: of one value for each column. static: scale and zero point.
    """
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(explain(f"{op} takes no such x", expected="f16, bf16 or f32, [.., K]", found=_told(x)))
    if reason := reason_against(fmt):
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
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
