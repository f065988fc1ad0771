"""Attention of few queries to a packed cache of fixed length: qfx_triton::cache_attention, as qfx::cache_attention.

    split_attention   sums, maximum and total of each split of the stored tokens, and of the tokens in float
    join_splits       y = sum of e^(maximum - greatest) sums / the same of the totals

How many tokens there are is read on the device, so that neither a graph of CUDA nor a compiled graph is made anew for
the next token. A split takes its share of those that there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.backends.triton import cache_layout, tuning
from qfx.backends.triton.cache_layout import PLAIN, Held, Layout, Role
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.cache_attention import join_splits, split_attention
from qfx.backends.triton.launch import Config, device_of, dot_dtype, each_once, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.weight_only import LANGUAGE
from qfx.errors import explain
from qfx.format import dtype_name

_SPLITS = 128  # at most: as many partial results are put together at once
_SEVERAL = 8  # splits, of which one less costs little
_ROWS = 64  # rows of queries of a program, at most
_OUT = 32  # channels that a program of the last step puts together


def cache_attention(
    q: Tensor, memory: list[Tensor], length: Tensor, mask: Tensor | None, scale: float, causal: bool, spec: str
) -> Tensor:
    """y [B, H, S, Dv] of q [B, H, S, D], see `qfx.kv.packed_ops`; length i64 [], on the device of q.

    f32 sums; codes are multiplied as f16, exactly, floats as they are held. The mask may have one place or at least as
    many as there are tokens. Raises ValueError for a q that does not fit the memory and for formats that are not taken.
    """
    found = _checked(q, memory, length, spec)
    batch, heads, queries, _ = q.shape
    y = torch.empty((batch, heads, queries, found.widths[1]), dtype=q.dtype, device=q.device)
    rows = heads // found.groups * queries
    if not y.numel():
        return y
    config = dict(_config(found, q, rows))
    splits = config.pop("SPLITS")
    room = (batch, found.groups, splits + 1, rows)
    sums = torch.empty((*room, found.widths[1]), dtype=torch.float32, device=q.device)
    most, total = (torch.empty(room, dtype=torch.float32, device=q.device) for _ in range(2))
    q = q.contiguous()
    arguments = (q, sums, most, total, length, *memory[:5])
    for part, tensors in zip(found.parts, found.tensors(memory), strict=True):
        _split(arguments, found, part, tensors, mask, scale, causal, splits, config)
    put_together(sums, most, total, y)
    return y


def put_together(sums: Tensor, most: Tensor, total: Tensor, y: Tensor) -> None:
    """Write y [B, H, S, Dv], contiguous, of what splits give: sums f32 [B, G, splits, rows, Dv], maxima and totals."""
    batch, groups, splits, rows, width = sums.shape
    grid = (batch * groups * rows, triton.cdiv(width, _OUT))
    launch(join_splits, grid, sums, most, total, y, rows, splits, DV=width, SPLITS=triton.next_power_of_2(splits),
           BLOCK=_OUT, config={"num_warps": 4, "num_stages": 1})  # fmt: skip


def _split(
    arguments: tuple[Tensor, ...], found: Layout, part: Held, tensors: list[list[Tensor | None]], mask: Tensor | None,
    scale: float, causal: bool, splits: int, config: Config,
) -> None:  # fmt: skip
    q = arguments[0]
    batch, heads, queries, _ = q.shape
    many = heads // found.groups
    rows_of = [_rows(tensors[role][i]) for role in (0, 1) for i in (0, 1)]
    strides, masked = mask_of(mask, (batch, heads, queries), many)
    block = config["BLOCK_M"]
    grid = (batch * part.count * triton.cdiv(many * queries, block), splits + 1)
    plain = dot_dtype(torch.bfloat16) != torch.bfloat16  # interpreted
    roles = (part.keys, part.values)
    dots = [_dot(role, q.dtype, plain) for role in roles]
    fast = {f"{n}_FAST": r.in_half and dot == tl.float16 for n, r, dot in zip("KV", roles, dots, strict=True)}
    launch(
        split_attention, grid, *arguments, *tensors[0], *tensors[1], mask, cache_layout.signed(part.heads), part.count,
        queries, found.groups, float(scale), *rows_of, *strides, splits,
        MANY=many, D=found.widths[0], DV=found.widths[1], SINKS=found.fmt.sinks, ROOM=arguments[8].shape[2],
        U=math.lcm(part.keys.planes, part.values.planes), **part.keys.constants("K"), **part.values.constants("V"),
        K_DOT=dots[0], V_DOT=dots[1], **fast, Q_DOT=tl.float32 if plain else LANGUAGE[q.dtype],
        PRECISION="ieee", ALL=part.heads is None, **masked, CAUSAL=causal,
        BLOCK_D=block_of(found.widths[0]), BLOCK_V=block_of(found.widths[1]), config=config,
    )  # fmt: skip


def _dot(role: Role, dtype: torch.dtype, plain: bool) -> tl.dtype:
    """In what a role's tiles are multiplied."""
    if plain or dtype == torch.float32:
        return tl.float32
    return tl.float16 if role.in_half else LANGUAGE[dtype]


def block_of(width: int) -> int:
    """Channels of a tile that holds a head's."""
    return 1 << max((width - 1).bit_length(), 4)


def _rows(x: Tensor | None) -> int:
    assert x is not None
    return x.shape[2]


def mask_of(
    mask: Tensor | None, shape: tuple[int, int, int], many: int
) -> tuple[tuple[int, int, int, int], dict[str, Any]]:
    """The strides by which a mask is read, and the constants of a kernel: its kind (see `seen`), and whether the rows
    of a head of keys see different tokens. shape: B, H, S; many: heads of queries to one of keys.
    """
    if mask is None:
        return (0, 0, 0, 0), {"MASK": 0, "EACH_ROW": False}
    batch, heads, queries, place = mask.expand(*shape, mask.shape[-1]).stride()
    place = 0 if mask.shape[-1] == 1 else place
    each = (queries != 0 and shape[2] > 1) or (heads != 0 and many > 1)
    return (batch, heads, queries, place), {"MASK": 1 if mask.dtype == torch.bool else 2, "EACH_ROW": each}


def candidates(device: Device, found: Layout, rows: int, many: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth a measurement. PER: programs for each processor of the GPU, which splits shall make."""
    first = heuristic(device, found, rows, many, dtype)
    units, warps, stages, per = (first[key] for key in ("BLOCK_R", "num_warps", "num_stages", "PER"))
    others = (
        (units, warps, stages, 2 * per), (units, warps, stages, max(per // 2, 1)), (units, warps, stages + 1, per),
        (units, warps, 2, per), (units, 8, stages, per), (units, 8, stages, 2 * per), (2 * units, 8, stages, per),
        (2 * units, 4, 2, 2), (max(units // 2, 16), 4, stages, per), (max(units // 2, 16), 2, stages, 2 * per),
        (max(units // 2, 16), 4, 4, 2 * per),
    )  # fmt: skip
    return varied(first, others)


def varied(first: Config, others: Iterable[tuple[int, int, int, int]]) -> list[Config]:
    """A configuration, and the same with other values of BLOCK_R, num_warps, num_stages and PER; none stands twice."""
    names = ("BLOCK_R", "num_warps", "num_stages", "PER")
    return each_once([first, *({**first, **dict(zip(names, other, strict=True))} for other in others)])


def problem(found: Layout, many: int, dtype: torch.dtype) -> str:
    """The key of a problem in the tables of measured configurations."""
    return f"{found.fmt} d={found.widths[0]} dv={found.widths[1]} n={many} {dtype_name(dtype)}"


def heuristic(device: Device, found: Layout, rows: int, many: int, dtype: torch.dtype) -> Config:
    """What is taken where nothing was measured: a tile of at most 16 kB that stays in registers.

    rows: of a head of keys; many: heads of queries to it. Every code of a unit is written out, so that more codes to
    a byte leave room for fewer rows, as tensor cores do that read rows from registers; rows that see different tokens
    have masks beside them.
    """
    roles = [role for part in found.parts for role in (part.keys, part.values)]
    tokens = max(math.lcm(p.keys.planes, p.values.planes) for p in found.parts)
    wide, single = max(found.widths) > 128, dtype == torch.float32
    grouped = not all(role.in_half or role.mode == PLAIN for role in roles)
    several = tokens > 1
    most = 32 if wide or (several and not device.from_shared) else _ROWS
    most = 16 if single or tokens == 8 or (wide and several) else most
    block = min(max(triton.next_power_of_2(rows), 16), most)
    units = {1: 64, 2: 64, 4: 32}.get(tokens, 16)
    if single or (wide and several):
        units = 16
    elif wide or grouped or block > 16 or any(role.mode == PLAIN for role in roles):
        tight = block > 16 if tokens == 4 else grouped and block > 32
        units = min(units, 16 if tight else 32)
    odd = any(width != block_of(width) for width in found.widths)  # what is beyond is masked
    heavy = wide or single or grouped or odd or rows > many or block > 16 or tokens == 8
    stages = 2 if wide or single or tokens == 1 or block > 32 else 3
    if wide and any(4 < role.bits < 8 for role in roles):
        stages = 1  # all planes of two bytes a code on their way would be more shared memory than a program has
    return {"BLOCK_M": block, "BLOCK_R": units, "FLOATS": 16 if wide or single else 32, "PER": 4 if tokens == 1 else 2,
            "num_warps": 8 if heavy else 4, "num_stages": stages}  # fmt: skip


def _config(found: Layout, q: Tensor, rows: int) -> Config:
    """With SPLITS: as many as fill the GPU, and as there can be blocks."""
    device = device_of(q)
    many = q.shape[1] // found.groups
    key = problem(found, many, q.dtype)
    worth = functools.partial(candidates, device, found, many=many, dtype=q.dtype)
    known = tuning.tuned(device, "cache_attention", key, rows, worth) or heuristic(device, found, rows, many, q.dtype)
    config = dict(known)
    programs = q.shape[0] * found.groups * triton.cdiv(rows, config["BLOCK_M"])
    least = config["BLOCK_R"] * min(math.lcm(p.keys.planes, p.values.planes) for p in found.parts)
    wanted = device.processors * config.pop("PER") // programs  # all run at once
    wanted -= wanted >= _SEVERAL  # with those of the floats, which are soon done
    config["SPLITS"] = max(min(wanted, triton.cdiv(found.length, least), _SPLITS - 1), 1)
    return config


def _checked(q: Tensor, memory: list[Tensor], length: Tensor, spec: str) -> Layout:
    found = cache_layout.require(spec, memory, length, device_of(q))
    keys = memory[3]
    expected = f"[{keys.shape[0]}, a multiple of {found.groups}, queries, {found.widths[0]}]"
    fits = q.dim() == 4 and q.shape[0] == keys.shape[0] and q.shape[3] == found.widths[0]
    if not fits or q.shape[1] % found.groups or q.dtype not in LANGUAGE:
        raise ValueError(
            explain(
                "queries do not fit the cache",
                expected=f"{expected}, f16, bf16 or f32",
                found=f"{list(q.shape)}, {q.dtype}",
                next_step="make the cache with the config of the model that uses it",
            )
        )
    return found


def _fake(q: Tensor, memory: list[Tensor], *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], memory[4].shape[3]))


define(
    "cache_attention(Tensor q, Tensor[] memory, Tensor length, Tensor? mask, float scale, bool causal, str spec) "
    "-> Tensor",
    cache_attention,
    _fake,
)
