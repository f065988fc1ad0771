"""Attention of few queries to many keys in float: qfx_triton::float_attention, as torch's and as qfx::attention.

    mask_spans              the first and the last token that a mask shows, once for all layers
    split_float_attention   sums, maximum and total of each split of the tokens
    join_splits             y = sum of e^(maximum - greatest) sums / the same of the totals

What torch has for a mask goes through the tokens of a head one block after the other, in as many programs as there are
heads, and through all of a cache of fixed length, filled or not.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from qfx.backends.triton import tuning
from qfx.backends.triton.cache_attention import block_of, mask_of, put_together, varied
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.float_attention import mask_spans, split_float_attention
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.row_codes import dense
from qfx.backends.triton.weight_only import DTYPES, LANGUAGE
from qfx.errors import explain
from qfx.format import dtype_name

WIDEST = 256  # channels of a head
MOST = 16  # queries of a sequence
_SPLITS = 128  # at most: as many partial results are put together at once
_ROWS = 64  # rows of queries of a program, at most
_SCAN = 8192  # numbers of a mask that a program reads at a time
_BESIDE = 1024  # bytes of shared memory for what else there is


def float_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spans: Tensor | None, sinks: Tensor | None, scale: float,
    causal: bool, softcap: float,
) -> Tensor:  # fmt: skip
    """y [B, H, S, Dv] of q [B, H, S, D], k [B, G, L, D], v [B, G, L, Dv], H a multiple of G; see `qfx.ops.floats`.

    spans: of the mask, see `spans_of`; left out, all of k and v is read. f32 sums; weights are rounded to q.dtype
    before they are multiplied by values. Rows that see nothing are 0. Raises ValueError for operands that
    do not fit each other.
    """
    _check(q, k, v, mask)
    batch, heads, queries, width = q.shape
    groups, tokens, v_width = k.shape[1], k.shape[2], v.shape[3]
    y = torch.empty((batch, heads, queries, v_width), dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    if not tokens:
        return y.zero_()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    many = heads // groups
    rows = many * queries
    strides, masked = mask_of(mask, (batch, heads, queries), many)
    config = _config(q, k, v_width, rows, mask.dtype.itemsize if mask is not None and masked["EACH_ROW"] else 0)
    splits = config.pop("SPLITS")
    room = (batch, groups, splits, rows)
    one = splits == 1
    sums = y if one else torch.empty((*room, v_width), dtype=torch.float32, device=q.device)
    most, total = (sums,) * 2 if one else (torch.empty(room, dtype=torch.float32, device=q.device) for _ in range(2))
    spans_batch = 0 if spans is None or len(spans) == 1 else spans.stride(0)
    grid = (batch * groups * triton.cdiv(rows, config["BLOCK_M"]), splits)
    launch(
        split_float_attention, grid, q, k, v, mask, spans, dense(sinks), sums, most, total, groups, queries, tokens,
        float(scale), float(softcap) if softcap > 0 else None, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *strides, spans_batch, splits,
        MANY=many, D=width, DV=v_width, **masked, CAUSAL=causal, ONE=one, DOT=LANGUAGE[dot_dtype(q.dtype)],
        BLOCK_D=block_of(width), BLOCK_V=block_of(v_width), config=config,
    )  # fmt: skip
    if not one:
        put_together(sums, most, total, y)
    return y


def spans_of(mask: Tensor) -> Tensor:
    """i32 [B, 2]: the first place that a mask, [L] to [B, H, S, L], shows to any row of a sequence, and the one behind
    the last; B is 1 where the mask has no batch. A place is shown by True, or by what is not -inf.
    """
    batch, tokens = mask.shape[0] if mask.dim() == 4 else 1, mask.shape[-1]
    if mask.shape[:-1].numel() != batch:
        mask = (mask if mask.dtype == torch.bool else mask != -torch.inf).flatten(1 if mask.dim() == 4 else 0, -2)
        mask = mask.any(-2)
    mask = mask.reshape(batch, tokens)
    spans = torch.empty((batch, 2), dtype=torch.int32, device=mask.device)
    scan = min(max(triton.next_power_of_2(tokens), 128), _SCAN)
    launch(mask_spans, (batch,), mask, spans, tokens, *mask.stride(), BOOL=mask.dtype == torch.bool, SCAN=scan,
           config={"num_warps": min(max(scan // 512, 1), 8), "num_stages": 1})  # fmt: skip
    return spans


def problem(width: int, v_width: int, many: int, dtype: torch.dtype) -> str:
    """The key of a problem in the tables of measured configurations."""
    return f"d={width} dv={v_width} n={many} {dtype_name(dtype)}"


def heuristic(width: int, rows: int, dtype: torch.dtype) -> Config:
    """What is taken where nothing was measured: blocks of about 16 kB, three of them on their way."""
    single = dtype == torch.float32
    block = min(max(triton.next_power_of_2(rows), 16), 16 if single else _ROWS)
    tokens = {16: 128, 32: 128, 64: 128, 128: 64}.get(block_of(width), 32)
    tokens = max(tokens // 4, 16) if single else min(tokens, 64) if block > 16 else tokens
    return {"BLOCK_M": block, "BLOCK_R": tokens, "PER": 2, "num_warps": 4, "num_stages": 2 if single else 3}


def candidates(width: int, rows: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth a measurement. PER: programs for each processor of the GPU, which splits shall make."""
    first = heuristic(width, rows, dtype)
    tokens, warps, stages, per = (first[key] for key in ("BLOCK_R", "num_warps", "num_stages", "PER"))
    others = (
        (tokens, warps, stages, 1), (tokens, warps, stages, 4), (tokens, warps, 2, per), (tokens, warps, 4, per),
        (tokens, 8, stages, per), (max(tokens // 2, 16), warps, stages, per), (max(tokens // 2, 16), warps, 4, 4),
        (max(tokens // 2, 16), 2, stages, 4), (2 * tokens, 8, 2, 1), (2 * tokens, 8, 2, per),
    )  # fmt: skip
    return varied(first, others)


def fitted(config: Config, sizes: tuple[int, int, int, int], device: Device) -> dict[str, int]:
    """A configuration with as many stages, then rows, as there is shared memory for.

    sizes: bytes of a row of queries or keys, of values, of a weight, of an element of a mask if rows have their own.
    """
    found, (q, v, weight, mask) = dict(config), sizes

    def held() -> int:
        stages, rows, tokens = found["num_stages"] - 1, found["BLOCK_M"], found["BLOCK_R"]
        more = stages + device.from_shared  # what tensor cores read is no room for more
        return tokens * (more * (q + v) + rows * (stages * mask + weight)) + rows * q + _BESIDE

    while held() > device.shared and (found["num_stages"] > 2 or found["BLOCK_M"] > 16):
        if found["num_stages"] > 2:
            found["num_stages"] -= 1
        else:
            found["BLOCK_M"] //= 2
    return found


def _config(q: Tensor, k: Tensor, v_width: int, rows: int, mask: int) -> dict[str, int]:
    """With SPLITS: as many as fill the GPU, and as there can be blocks. mask: see `fitted`."""
    device, width = device_of(q), max(q.shape[3], v_width)
    key = problem(q.shape[3], v_width, rows // q.shape[2], q.dtype)
    worth = functools.partial(candidates, width, dtype=q.dtype)
    known = tuning.tuned(device, "float_attention", key, rows, worth) or heuristic(width, rows, q.dtype)
    each = q.dtype.itemsize
    config = fitted(known, (block_of(q.shape[3]) * each, block_of(v_width) * each, each, mask), device)
    programs = q.shape[0] * k.shape[1] * triton.cdiv(rows, config["BLOCK_M"])
    wanted = device.processors * config.pop("PER") // programs
    config["SPLITS"] = max(min(wanted, triton.cdiv(k.shape[2], config["BLOCK_R"]), _SPLITS), 1)
    return config


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError for operands that the kernel cannot read."""
    four = q.dim() == k.dim() == v.dim() == 4
    fits = [
        ("operands", four and q.dtype == k.dtype == v.dtype and q.dtype in DTYPES, "four axes, f16, bf16 or f32"),
        ("keys", four and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], "the queries' batch and width"),
        ("values", four and v.shape[:3] == k.shape[:3], "the keys' batch, heads and tokens"),
        ("heads", four and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, "queries' a multiple of the keys'"),
        ("heads", four and max(q.shape[3], v.shape[3]) <= WIDEST, f"at most {WIDEST} channels"),
        ("the mask", mask is None or (four and mask.shape[-1] in (1, k.shape[2])), "one place, or one for each key"),
    ]
    for name, good, due in fits:
        if not good:
            found = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v, mask) if x is not None)
            raise ValueError(explain(f"qfx_triton::float_attention: {name} do not fit", expected=due, found=found,
                                     next_step="pass q, k, v and mask as to scaled_dot_product_attention"))  # fmt: skip


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _fake_spans(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.shape[0] if mask.dim() == 4 else 1, 2), dtype=torch.int32)


_ANY = (torch.Tag.flexible_layout,)  # any strides are taken: Inductor then writes a mask once for all layers
define(
    "float_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? spans, Tensor? sinks, float scale, "
    "bool causal, float softcap) -> Tensor",
    float_attention,
    _fake,
    tags=_ANY,
)
define("mask_spans(Tensor mask) -> Tensor", spans_of, _fake_spans, tags=_ANY)
