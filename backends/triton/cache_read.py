"""Floats of all tokens of a packed cache, for prompts: qfx_triton::cache_read, as qfx::cache_read."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton import cache_layout
from qfx.backends.triton.kernels.cache_read import read_tokens
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define

_TOKENS = 32  # of a program, at least


def cache_read(memory: list[Tensor], length: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, places, D] in the dtype of the newest; places without a token are 0.

    length i64 [] is read on the device. Raises ValueError for formats that are not taken.
    """
    found = cache_layout.require(spec, memory, length, device_of(memory[3]))
    outs = _empty(memory, found.length)
    for part, both in zip(found.parts, found.tensors(memory), strict=True):
        for i, (role, tensors, out) in enumerate(zip((part.keys, part.values), both, outs, strict=True)):
            units = max(_TOKENS // role.planes, 1)
            tokens = max(found.length - found.fmt.sinks, 1)
            grid = (out.shape[0] * part.count, triton.cdiv(tokens, units * role.planes))
            rows = [t.shape[2] for t in tensors[:2] if t is not None]
            launch(
                read_tokens, grid, out, length, memory[0], memory[1 + i], memory[3 + i], *tensors,
                cache_layout.signed(part.heads), part.count, found.groups, *rows, found.length, WIDTH=role.width,
                SINKS=found.fmt.sinks, ROOM=memory[3 + i].shape[2], ALL=part.heads is None,
                **role.constants("X"), U=role.planes, SINKS_BLOCK=triton.next_power_of_2(max(found.fmt.sinks, 1)),
                BLOCK_R=units, BLOCK=triton.next_power_of_2(role.width), config={"num_warps": 4, "num_stages": 1},
            )  # fmt: skip
    return outs


def _empty(memory: list[Tensor], places: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.empty((*x.shape[:2], places, x.shape[3]), dtype=x.dtype, device=x.device) for x in memory[3:5])
    return k, v


def _fake(memory: list[Tensor], length: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    return _empty(memory, cache_layout.of(spec).length)


define("cache_read(Tensor[] memory, Tensor length, str spec) -> (Tensor, Tensor)", cache_read, _fake)
