"""Rows sorted by expert times packed weights of their experts, in kernels that ask nothing of the host.

    qfx_triton::grouped_weight_only(Tensor x, Tensor[] w, Tensor offs, str w_format, int n) -> Tensor

As `qfx::grouped_linear_quant` without a format of x. Where the rows of each expert end (offs) stays on the device: see
`kernels/experts.py`. As for one weight (`weight_only`): for up to 16 rows of an expert tensor cores on weights that
stay in registers (`FRAGMENTS`), or, of what that does not serve, for about one row of each a product of vectors
(`VECTORS`); else tensor cores on unpacked tiles (`TILES`). w and w_format come from `pack_experts`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton import tuning, weight_only, weight_only_config
from qfx.backends.triton.decode_asm import decode_asm
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels import experts as kernels
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.layout import UNIT_THREE, padded
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.products import check_devices
from qfx.backends.triton.weight_only import DTYPES, LANGUAGE, Weight, gemv_asm, named
from qfx.backends.triton.weight_only_config import UNIT
from qfx.backends.triton.weight_only_pack import pack_weight_only, stored_bits
from qfx.format import Format, dtype_name
from qfx.ops.floats import alone, of_expert

VECTORS, TILES, FRAGMENTS = 0, 1, 2  # what a configuration's PATH says
_MOST_FRAGMENTS = 16  # rows of an expert
_MOST_ROWS = 65535  # programs along the second axis of a grid
_INTERPRETED = 256  # elements of a result


def pack_experts(w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, k: int) -> tuple[list[Tensor], str]:
    """The tensors of a packed weight [E, N, K] as `pack_weight_only` gives them, with E in front, and their format.

    A table of values has none: all experts share it. Raises what `pack_weight_only` does.
    """
    w_scale, w_zero, fmt = alone(w_scale, w_zero, Format.parse(w_format))
    made, text = [], ""
    for e in range(w.shape[0]):
        tensors, text = pack_weight_only(w[e], *of_expert(w_scale, w_zero, e), str(fmt), k)
        made.append(tensors)
    if named(made[0], Format.parse(text)).table is None:
        return stacked(made), text
    return [*stacked([tensors[:-1] for tensors in made]), made[0][-1]], text


def stacked(made: list[list[Tensor]]) -> list[Tensor]:
    """The tensors of each expert as tensors of all experts."""
    return [torch.stack(list(each)) for each in zip(*made, strict=True)]


def grouped_weight_only(x: Tensor, w: list[Tensor], offs: Tensor, w_format: str, n: int) -> Tensor:
    """x [T, K] float16, bfloat16 or float32, sorted by expert, times packed weights [E, n, K]: [T, n] in x.dtype.

    offs int32 or int64 [E]: where the rows of each expert end; rows after the last end give zeros. Products and sums
    are those of `linear_weight_only`. Raises ValueError for other dtypes, sizes that do not fit and tensors on several
    devices.
    """
    weight = named(w, Format.parse(w_format))
    _check(x, weight, offs, n)
    offs = offs.to(torch.int32).contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    (t, k), experts = x.shape, offs.shape[0]
    out = torch.empty((t, n), dtype=x.dtype, device=x.device)
    if t == 0 or k == 0 or experts == 0:
        return out.zero_()
    device = device_of(x)
    config = dict(choose(device, weight.fmt, t, experts, n, k, x.dtype))
    if config["PATH"] == FRAGMENTS and not weight_only.begins_aligned(weight):  # it reads two bytes and more at once
        config = dict(without_fragments(device, weight.fmt, t, experts, n, k, x.dtype))
    {VECTORS: _vectors, TILES: _tiles, FRAGMENTS: _fragments}[config.pop("PATH")](x, weight, offs, out, config)
    return out


def choose(device: Device, fmt: Format, t: int, experts: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The configuration of a call: the measured one of this device, else by rule. Buckets are of rows, `t`."""
    problem = f"{fmt} e={experts} n={n} k={k} {dtype_name(dtype)}"
    found = tuning.tuned(device, "experts", problem, t, lambda most: candidates(fmt, most, experts, dtype))
    return found or heuristic(device, fmt, t, experts, n, k, dtype)


def heuristic(device: Device, fmt: Format, t: int, experts: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """A configuration by rule, for rows that go to the experts about evenly: fragments for up to 16 rows of one."""
    rows = -(-t // experts)
    served = weight_only_config.has_fragments(fmt, dtype) and rows <= _MOST_FRAGMENTS
    if served and not (device.interpreted and t * n > _INTERPRETED):
        return {**weight_only_config.fragments_of(device, fmt, 2 * rows, n * min(t, experts), k), "PATH": FRAGMENTS}
    return without_fragments(device, fmt, t, experts, n, k, dtype)


def without_fragments(device: Device, fmt: Format, t: int, experts: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The same of the other ways.

    Vectors up to as many rows as experts: most of these then have one row or two. A program takes two only where that
    is to be expected: both take twice the registers of one. Tiles are as high as an expert has rows, of float32 at most
    16, which fit the registers, and of 8 bits on mma.sync below 64. The interpreter takes vectors one after the other:
    only few.
    """
    few = t <= max(experts, 2) and (t * n <= _INTERPRETED if device.interpreted else t <= _MOST_ROWS)
    if few:
        config, rows = weight_only_config.vectors_of(device, fmt, n * min(t, experts), k), 1 if 4 * t <= experts else 2
        columns = min(config["BN"], 8 if stored_bits(fmt) == 8 else 4)  # more of few bits spill registers
        return {**config, "PATH": VECTORS, "ROWS": rows, "BN": max(columns // rows, 2)}
    rows = max(16, -(-t // experts))
    rows = min(rows, 63) if stored_bits(fmt) == 8 and not device.from_shared else rows
    return {"PATH": TILES, **weight_only_config.tile_of(device, fmt, rows, dtype), "FIRST": 0}


def candidates(fmt: Format, t: int, experts: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth measuring for `t` rows, at most 20."""
    found: list[Config] = []
    rows, kept = -(-t // experts), weight_only_config.has_fragments(fmt, dtype)
    if kept and rows <= 2 * _MOST_FRAGMENTS and t < tuning.LARGEST:  # the last bucket is that of any more rows, too
        sizes = [(width, warps) for width in (1, 2) for warps in (2, 4, 8)]
        found += [{**weight_only_config.fragments_tile(fmt, *size, 2 * rows), "PATH": FRAGMENTS} for size in sizes]
    if t <= 4 * experts and t <= _MOST_ROWS:
        found += [
            {"PATH": VECTORS, "ROWS": rows, "BN": n, "CHUNKS": 32 * warps, "num_warps": warps, "num_stages": 1}
            for rows, n in (((1, 4), (2, 2)) if found else ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4)))
            for warps in (1, 2, 4)
        ]
    even = max(16, triton.next_power_of_2(-(-t // experts)))
    for height in sorted({min(even, 128), min(2 * even, 128)}):
        for width, stages in ((64, 4), (128, 3)) if found else ((64, 3), (64, 4), (128, 3), (128, 4)):
            warps = max(width // 16, height // 32)
            found.append(
                {"PATH": TILES, "BM": height, "BN": width, "num_warps": warps, "num_stages": stages, "FIRST": 0}
            )
    return found[:20]


def _fragments(x: Tensor, w: Weight, offs: Tensor, out: Tensor, config: Config) -> None:
    device, (t, k), n, experts, warps = device_of(x), x.shape, out.shape[1], offs.shape[0], config["num_warps"]
    to = dot_dtype(x.dtype)
    tokens = 1 if 2 * -(-t // experts) <= 8 else 2
    tiles, by_row = tiles_of(t, experts, 8 * tokens)
    launch(kernels.grouped_fragments, (tiles * triton.cdiv(n, 16 * config["ROWS"]),), x, w.codes, w.upper, w.scale,
           w.zero, w.whole, w.table, offs, out, t, n, k, experts, tiles, x.stride(0), w.codes.stride(-2),
           w.upper.stride(-2), w.scale.stride(-2), **w.constants, **weight_only.pairs_of(w.fmt, to, device),
           TO=LANGUAGE[to], **weight_only_config.fitting(w.fmt, k, warps), TOKENS=tokens, S=warps, BY_ROW=by_row,
           EXPERTS=triton.next_power_of_2(experts + 1), config=config)  # fmt: skip


def _vectors(x: Tensor, w: Weight, offs: Tensor, out: Tensor, config: Config) -> None:
    device, (t, k), n, experts = device_of(x), x.shape, out.shape[1], offs.shape[0]
    exact = x.dtype == torch.float32
    asm = "" if exact or device.interpreted else gemv_asm(w)
    launch(kernels.grouped_vectors, (triton.cdiv(n, config["BN"]), t), x, w.codes, w.upper, w.scale, w.zero, w.whole,
           w.table, offs, out, t, n, k, experts, x.stride(0), w.codes.stride(-2), w.upper.stride(-2),
           w.scale.stride(-2), **w.constants, NATIVE=device.has_fp8 and not device.interpreted, EXACT=exact, ASM=asm,
           EXPERTS=triton.next_power_of_2(experts + 1), config=config)  # fmt: skip


def _tiles(x: Tensor, w: Weight, offs: Tensor, out: Tensor, config: Config) -> None:
    device, (t, k), n, experts = device_of(x), x.shape, out.shape[1], offs.shape[0]
    to = dot_dtype(x.dtype)
    asm, odd = ("", "") if device.interpreted else (decode_asm(w.fmt, to), decode_asm(w.fmt, to, 1))
    unit = UNIT_THREE if w.fmt.bits == 3 else UNIT
    tiles, by_row = tiles_of(t, experts, config["BM"])
    launch(kernels.grouped_tiles, (tiles * triton.cdiv(n, config["BN"]),), x, w.codes, w.upper, w.scale, w.zero,
           w.whole, w.table, offs, out, t, n, k, experts, tiles, x.stride(0), w.codes.stride(-2), w.upper.stride(-2),
           w.scale.stride(-2), **w.constants, NATIVE=device.has_fp8 and not device.interpreted,
           EXACT=to == torch.float32, ASM=asm, ASM_ODD=odd, TO=LANGUAGE[to], EVEN=k % unit == 0,
           BY_ROW=by_row, EXPERTS=triton.next_power_of_2(experts + 1), config=config)  # fmt: skip


def tiles_of(t: int, experts: int, height: int) -> tuple[int, bool]:
    """How many tiles of `height` rows of one expert there are at most, for any ends; and whether one begins each row.

    Both ways to count them are those of `kernels/experts.py`.
    """
    tiles = t // height + experts + 1
    return (t, True) if t < tiles else (tiles, False)


def checked_ends(offs: Tensor, weight: Tensor) -> None:
    """Raises ValueError where offs are not as many integers as weight [E, ..] has experts."""
    if offs.dtype not in (torch.int32, torch.int64) or tuple(offs.shape) != tuple(weight.shape[:1]):
        found = f"{offs.dtype}, {list(offs.shape)}"
        raise bad("offs says where the rows of each expert end", f"integers [{weight.shape[0]}]", found)


def _check(x: Tensor, w: Weight, offs: Tensor, n: int) -> None:
    """Raises ValueError for an input that the kernels cannot read."""
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise bad("x is no matrix of floats", f"[T, K] in {', '.join(map(str, DTYPES))}", f"{x.dtype}, {list(x.shape)}")
    unit, bits = (UNIT_THREE, 2) if w.fmt.bits == 3 else (UNIT, stored_bits(w.fmt))
    expected = (n, padded(x.shape[1], unit) * bits // 8)
    if w.codes.dim() != 3 or tuple(w.codes.shape[1:]) != expected:
        due = f"codes [E, {expected[0]}, {expected[1]}] for K = {x.shape[1]}"
        raise bad("the packed weight does not fit", due, list(w.codes.shape))
    checked_ends(offs, w.codes)
    check_devices(x.device, (w.codes, w.scale, w.whole, offs))


def _fake(x: Tensor, w: list[Tensor], offs: Tensor, w_format: str, n: int) -> Tensor:
    return x.new_empty((x.shape[0], n))


define(
    "grouped_weight_only(Tensor x, Tensor[] w, Tensor offs, str w_format, int n) -> Tensor",
    grouped_weight_only,
    _fake,
)
