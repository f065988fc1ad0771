"""Which of the ways of `weight_only` a product with packed weights goes, and its tiles: by rule, or as measured."""

from __future__ import annotations

import functools

import torch
import triton

from qfx.backends.triton import tuning
from qfx.backends.triton.decode_asm import TABLES
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.decode import parts_of
from qfx.backends.triton.launch import Config
from qfx.backends.triton.layout import UNIT_THREE
from qfx.backends.triton.weight_only_pack import group_of, stored_bits
from qfx.format import Format, dtype_name

GEMV, DOT, DEQUANTIZE, FRAGMENTS, ABREAST = 0, 1, 2, 3, 4  # what a configuration's PATH says
UNIT = 128
FEWEST_DEQUANTIZE = 1024
_MOST_GEMV = 4
_MOST_FRAGMENTS = 16
_FEWEST_ABREAST, _MOST_ABREAST = 9, 64


def choose(device: Device, fmt: Format, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The configuration of a call: the measured one of this device, else by rule."""
    problem = f"{fmt} n={n} k={k} {dtype_name(dtype)}"
    found = tuning.tuned(device, "weight_only", problem, m, lambda most: candidates(fmt, most, k, dtype))
    return found or heuristic(device, fmt, m, n, k, dtype)


@functools.lru_cache(maxsize=4096)
def heuristic(device: Device, fmt: Format, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """A configuration by rule: bytes in flight for few rows, several programs a processor below 64, large tiles above.

    Fragments take less than half the instructions of vectors and of tiles for a byte of weights. From 9 rows on reading
    x takes longer than they do, and warps go abreast where tensor cores share x and keep weights in registers. Of what
    neither serves, up to 4 rows of 8-bit weights and 2 of smaller ones go to vectors: beyond, tiles take fewer. Tiles
    of float32 do not fit registers: such rows go to torch early.
    """
    if has_fragments(fmt, dtype):
        if device.from_registers and _FEWEST_ABREAST <= m <= most_abreast(fmt):
            return abreast_of(device, fmt, m, n, k)
        if m <= _MOST_FRAGMENTS:
            return fragments_of(device, fmt, m, n, k)
    return without_fragments(device, fmt, m, n, k, dtype)


@functools.lru_cache(maxsize=4096)
def without_fragments(device: Device, fmt: Format, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The same of the other ways."""
    units = -(-k // UNIT)
    if m <= (_MOST_GEMV if stored_bits(fmt) == 8 else _MOST_GEMV // 2):
        return {"PATH": GEMV, **vectors_of(device, fmt, n, k)}
    if m >= (64 if dtype == torch.float32 else FEWEST_DEQUANTIZE):
        return {"PATH": DEQUANTIZE}
    tile = tile_of(device, fmt, m, dtype)
    height = tile["BM"]
    programs = device.processors * (1 if m >= 64 else 4 if height <= 16 else 3 if height == 32 else 2)
    tiles = -(-n // tile["BN"]) * -(-m // tile["BM"])
    splits = max(1, min(programs // tiles, units // 4, 16))
    return {"PATH": DOT, **tile, "SPLITS": splits, "FIRST": 0}


def has_fragments(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether `fragments` serves such weights and inputs: integers and tables, groups from 32 columns on."""
    served = fmt.is_integer or fmt.type in TABLES
    return dtype.itemsize == 2 and served and (group_of(fmt) == 0 or group_of(fmt) >= 32)


def fragments_of(device: Device, fmt: Format, m: int, n: int, k: int) -> Config:
    """The tile of `fragments`: 16 rows of weights for four warps where that leaves work for all processors.

    32 rows for eight warps read x half as often: for more than 2 rows of x, and of 2 bits; for more than 4 also where
    no processor has two. Tables, 3 bits, and 2 bits for more than 8 rows of x take registers: of these 16 rows.
    """
    blocks, _ = blocks_of(fmt, k)
    bits = stored_bits(fmt)
    few = fmt.is_integer and (m <= 8 or bits >= 4) and bits != 3
    tall = few and n >= (48 if m <= 4 else 30) * device.processors and (m > 2 or bits == 2)
    most = 4 if not tall and n >= 56 * device.processors else 8
    warps = 8 if blocks >= 32 else 4 if blocks >= 4 else 2 if blocks >= 2 else 1
    return fragments_tile(fmt, 2 if tall else 1, min(warps, most), m)


def fragments_tile(fmt: Format, rows: int, warps: int, m: int) -> Config:
    """A tile of `fragments` for m rows of x.

    maxnreg: of its own accord the assembler would rather spill two registers than go beyond 64 or 128.
    """
    most = {(1, True): 112, (1, False): 128, (2, True): 168, (2, False): 208}.get((rows, m <= 8), 255)
    most = 255 if stored_bits(fmt) == 3 else most
    return {"PATH": FRAGMENTS, "ROWS": rows, "num_warps": warps, "num_stages": 1, "maxnreg": most}


def abreast_of(device: Device, fmt: Format, m: int, n: int, k: int) -> Config:
    """The tile of `abreast`: as many programs as processors hold at a time, with parts of K where that takes them."""
    kept = abreast_tile(fmt, 8, 1, m, k)
    held = 2 if kept["maxnreg"] == 128 else 1
    blocks, _ = blocks_of(fmt, k)
    return {**kept, "SPLITS": max(1, min(held * device.processors // -(-n // 128), blocks // 4, 16))}


def most_abreast(fmt: Format) -> int:
    """Rows of x up to which `abreast` fits registers."""
    return _MOST_ABREAST // 2 if stored_bits(fmt) == 3 else _MOST_ABREAST


def abreast_tile(fmt: Format, warps: int, splits: int, m: int, k: int) -> Config:
    """A tile of `abreast` for m rows of x. maxnreg: what lets a processor hold 16 warps, where that suffices.

    It does for fewer rows where groups are many and small, and of at most 4 bits where k is not whole units.
    """
    bits, group = stored_bits(fmt), group_of(fmt)
    most = 16 if bits == 3 or fmt.type in TABLES else 32
    many = (bits, group) in ((2, 32), (3, 32)) or ((bits, group) == (3, 64) and fmt.has_zero)
    if many or (fmt.is_integer and bits <= 4 and not blocks_of(fmt, k)[1]):
        most //= 2
    return {"PATH": ABREAST, "SPLITS": splits, "num_warps": warps, "num_stages": 1,
            "maxnreg": 128 if m <= most and warps <= 8 else 255}  # fmt: skip


def blocks_of(fmt: Format, k: int) -> tuple[int, bool]:
    """Blocks that `fragments` has of k columns, as the kernels count them, and whether they hold k and no more."""
    bits = stored_bits(fmt)
    unit = UNIT_THREE if bits == 3 else UNIT
    each = (2 if bits == 8 else 1) * (2 if bits >= 4 and group_of(fmt) == 32 else 1)
    return -(-k // unit) * each, k % unit == 0


def fitting(fmt: Format, k: int, warps: int) -> dict[str, bool]:
    """Constants of `fragments`: whether its blocks hold k columns and no more, and whether all warps have as many."""
    blocks, whole = blocks_of(fmt, k)
    return {"UNITS": whole, "EVEN": whole and blocks % warps == 0}


def vectors_of(device: Device, fmt: Format, n: int, k: int) -> Config:
    """The tile of `gemv` for n rows of weights in all."""
    bits = 2 if fmt.bits == 3 else stored_bits(fmt)  # of the plane in which a thread has 16 bytes
    chunks = max(32, min(128, triton.next_power_of_2(-(-k * bits // 128))))
    rows = 8 if n >= 64 * device.processors else 4 if n >= 16 * device.processors else 2
    rows = rows if bits > 2 else min(rows, 4)
    return {"BN": rows, "CHUNKS": chunks, "num_warps": chunks // 32, "num_stages": 1}


def tile_of(device: Device, fmt: Format, m: int, dtype: torch.dtype) -> Config:
    """The tile of `dot_tiles` for m rows, those of float32 at most 16 high."""
    if m < 64 or dtype == torch.float32:
        height, wide = max(8, triton.next_power_of_2(m)), dtype == torch.float32
        height = min(height, 16) if wide else height
        tile = {"BM": height, "BN": 64, "num_warps": 8 if wide else 4, "num_stages": 5 if height <= 16 else 4}
    else:
        height = 64 if m == 64 or not device.from_shared else 128  # mma.sync holds both operands in registers
        tile = {"BM": height, "BN": 128, "num_warps": 8, "num_stages": 3}
    while _shared(device, tile, fmt, dtype) > device.shared and tile["num_stages"] > 2:
        tile["num_stages"] -= 1
    return tile


def _shared(device: Device, tile: Config, fmt: Format, dtype: torch.dtype) -> int:
    """Bytes of shared memory for what is on its way over K: of x, of codes, of what a table gives in f32, of scales.

    (In other types the table lies in registers; what is counted for it holds scales, too.) Where tensor cores read x
    from there, what they read is no room for more. Scales of groups below a unit are read ahead as well; weights that
    they multiply 16 columns at a time come into the order of tensor cores by way of it, those of float32 as two terms.
    """
    unit, bits, stages = UNIT_THREE if fmt.bits == 3 else UNIT, stored_bits(fmt), tile["num_stages"]
    part, group = UNIT // parts_of(bits), group_of(fmt)
    looked_up = 4 * unit if fmt.type in TABLES and dtype == torch.float32 else 0
    early = group < UNIT and not looked_up  # weights are scaled before they are multiplied
    apart = min(group, part // 2) if early else 0  # columns that are read under one scale
    scales = unit // apart * fmt.scale_dtype.itemsize if apart else 0
    turned = part * (2 * dtype.itemsize if dtype == torch.float32 else dtype.itemsize) if apart == 16 else 0
    x = tile["BM"] * unit * dtype.itemsize * (stages if device.from_shared else stages - 1)
    return x + tile["BN"] * ((stages - 1) * (unit * bits // 8 + looked_up + scales) + turned)


def candidates(fmt: Format, m: int, k: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth measuring for M rows, at most 20."""
    found: list[Config] = []
    if m <= 2 * _MOST_FRAGMENTS and has_fragments(fmt, dtype):
        sizes = [(rows, warps) for rows in (1, 2, 4) for warps in (2, 4, 8) if rows * warps < 32]
        found += [fragments_tile(fmt, *size, m) for size in sizes]
    if 4 < m <= most_abreast(fmt) and has_fragments(fmt, dtype):
        pairs = [(8, 1), (8, 2), (8, 4), (8, 8), (4, 2), (4, 4), (4, 8)]
        found += [abreast_tile(fmt, *pair, m, k) for pair in pairs if pair[1] <= max(1, -(-k // UNIT) // 2)]
    if m <= _MOST_GEMV:
        found += [
            {"PATH": GEMV, "BN": rows, "CHUNKS": 32 * warps, "num_warps": warps, "num_stages": 1}
            for rows in ((4,) if found else (2, 4, 8))
            for warps in (2, 4, 8)
        ]
    height = min(max(8, triton.next_power_of_2(m)), 128)
    few = [(64, 1), (64, 2), (64, 4), (64, 8), (128, 1), (128, 2), (128, 4)]
    for width, splits in few if m <= 64 else [(64, 1), (128, 1), (128, 2), (128, 4)]:
        for stages in (3, 4, 5) if _MOST_GEMV < m <= 64 else (3, 4):
            if splits <= -(-k // UNIT):
                found.append(_tile(height, width, stages, splits, 0))
    if m > 64:
        found += [_tile(height, width, 3, 1, 1) for height in (128, 256) for width in (64, 128)]
    return [*found[:19], {"PATH": DEQUANTIZE}] if m >= 64 else found[:20]


def _tile(height: int, width: int, stages: int, splits: int, first: int) -> Config:
    return {"PATH": DOT, "BM": height, "BN": width, "num_warps": max(width // 16, height // 32), "num_stages": stages,
            "SPLITS": splits, "FIRST": first}  # fmt: skip
