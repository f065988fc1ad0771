"""Rows sorted by expert times float weights of their experts.

    qfx_triton::grouped_floats(Tensor x, Tensor w, Tensor offs) -> Tensor

qfx::grouped_linear without a value that the host reads, on every device: torch's own grouped matmul does so too, but
only for bfloat16 from capability 9.0 on; elsewhere it brings offs to the host (pytorch issue 169970), which stops the
GPU and cannot be part of a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton import tuning
from qfx.backends.triton.device import Device
from qfx.backends.triton.experts import checked_ends, tiles_of
from qfx.backends.triton.kernels.experts_float import grouped_floats as kernel
from qfx.backends.triton.launch import Config, device_of, dot_dtype, each_once, launch
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.products import check_devices
from qfx.backends.triton.weight_only import DTYPES, LANGUAGE
from qfx.format import dtype_name

_SHAPES = ((16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3))
_EXACT = ((16, 64, 32, 4, 4), (64, 64, 32, 4, 3))  # float32 takes twice the bytes and three products


def grouped_floats(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """x [T, K] float16, bfloat16 or float32, sorted by expert, times w [E, N, K] of its dtype, any strides: [T, N].

    offs int32 or int64 [E]: where the rows of each expert end; rows after the last end give zeros. Raises ValueError
    for what does not fit.
    """
    _check(x, w, offs)
    offs = offs.to(torch.int32).contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    (t, k), (experts, n) = x.shape, w.shape[:2]
    out = torch.empty((t, n), dtype=x.dtype, device=x.device)
    if 0 in (t, n, k, experts):
        return out.zero_()
    config = choose(device_of(x), t, experts, n, k, x.dtype)
    tiles, by_row = tiles_of(t, experts, config["BM"])
    to = dot_dtype(x.dtype)
    launch(kernel, (tiles * triton.cdiv(n, config["BN"]),), x, w, offs, out, t, n, k, experts, tiles, x.stride(0),
           *w.stride(), EXACT=to == torch.float32, TO=LANGUAGE[to], EVEN=k % config["BK"] == 0,
           TURNED=w.stride(1) == 1 < w.stride(2), BY_ROW=by_row,
           EXPERTS=triton.next_power_of_2(experts + 1), config=config)  # fmt: skip
    return out


def choose(device: Device, t: int, experts: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The configuration of a call: the measured one of this device, else the least tile for an expert's share."""
    problem = f"e={experts} n={n} k={k} {dtype_name(dtype)}"
    found = tuning.tuned(device, "experts_float", problem, t, lambda most: candidates(most, experts, k, dtype))
    return found or heuristic(t, experts, k, dtype)


def heuristic(t: int, experts: int, k: int, dtype: torch.dtype) -> Config:
    """The tile that holds the rows of an expert, were they spread evenly, or the largest.

    Where rows begin anywhere, they are read element by element, which takes registers: then less of k at a time.
    """
    shapes = _EXACT if dtype == torch.float32 else _SHAPES
    config = _config(next((shape for shape in shapes if shape[0] * experts >= t), shapes[-1]))
    return config if k % 16 == 0 else {**config, "BK": 32}


def candidates(t: int, experts: int, k: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth measuring for `t` rows."""
    found = [heuristic(t, experts, k, dtype), *map(_config, _EXACT if dtype == torch.float32 else _SHAPES)]
    if dtype != torch.float32:
        found += [_config(shape) for shape in ((16, 32, 128, 2, 5), (16, 128, 64, 4, 4), (64, 64, 64, 4, 4))]
        found += [_config((128, 128, 64, 8, stages)) for stages in (2, 4)]
    return each_once(found)


def _config(shape: tuple[int, int, int, int, int]) -> Config:
    return dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), shape, strict=True))


def _check(x: Tensor, w: Tensor, offs: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise bad("x is no matrix of floats", f"[T, K] in {', '.join(map(str, DTYPES))}", f"{x.dtype}, {list(x.shape)}")
    if w.dim() != 3 or w.dtype != x.dtype or w.shape[2] != x.shape[1]:
        raise bad("the weight does not fit", f"{x.dtype} [E, N, {x.shape[1]}]", f"{w.dtype}, {list(w.shape)}")
    checked_ends(offs, w)
    check_devices(x.device, (w, offs))


def _fake(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


define("grouped_floats(Tensor x, Tensor w, Tensor offs) -> Tensor", grouped_floats, _fake)
