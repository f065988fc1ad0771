"""Quantize-on-append for packed caches of fixed length: qfx_triton::cache_append, as qfx::cache_append.

    append_codes    whole groups of the newest tokens to codes and scales, bit for bit those of the reference; for a few
                    new tokens (FEW) also what append_newest does, in the same launch
    append_newest   what is left moves to the front, and new tokens come behind

How many tokens there are is read on the device: nothing waits for the host. On a GPU memory that is full is a
device-side assertion, as it is where torch writes beyond a tensor; nothing is written then.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from torch import Tensor

from qfx.backends.triton import cache_layout
from qfx.backends.triton.cache_layout import BY_TOKENS, Layout, Role
from qfx.backends.triton.kernels.cache_append import append_codes, append_newest
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define
from qfx.errors import explain
from qfx.kv.packed_ops import FEW
from qfx.kv.static import full

_SCALES = {"f32": 0, "f16": 1, "bf16": 2, "e8m0": 3}
_EMAX = {"f8e4m3": 8, "f8e5m2": 15}
_TOKENS, _CHANNELS = 32, 64  # of a program
_CONFIG = {"num_warps": 4, "num_stages": 1}


def cache_append(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> None:
    """Store k and v [B, G, n, D] behind the first `length` tokens (i64 []); see `qfx.kv.packed_ops`.

    Raises ValueError for states that do not fit the memory, for formats that are not taken and, where Triton
    interprets, for more tokens than there is room for.
    """
    device = device_of(k)
    found = _checked(memory, k, v, length, spec)
    if device.interpreted and not k.is_meta and int(length) + k.shape[2] > found.length:
        raise ValueError(full(found.length, int(length) + k.shape[2]))
    if not k.numel() and not v.numel():
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    new, fmt, room = k.shape[2], found.fmt, memory[3].shape[2]
    few, strides = new <= FEW, (*k.stride()[:3], *v.stride()[:3])
    sizes = {"D": found.widths[0], "DV": found.widths[1], "SINKS": fmt.sinks, "RESIDUAL": fmt.residual,
             "STEP": fmt.step, "ROOM": room, "TAKEN": _TOKENS,
             "SINKS_BLOCK": triton.next_power_of_2(max(fmt.sinks, 1))}  # fmt: skip
    arguments = (length, *memory[:5], k, v)
    parts = [(part, _constants(part.keys, "K"), _constants(part.values, "V")) for part in found.parts]
    programs = sum(k.shape[0] * part.count * (keys[2] + values[2]) for part, keys, values in parts)
    for (part, keys, values), tensors in zip(parts, found.tensors(memory), strict=True):
        # at most so many tokens can be stored by this call
        blocks = 1 if few else max(triton.cdiv(room - fmt.residual + new, each[1]) for each in (keys, values))
        rows = [t.shape[2] for two in tensors for t in two[:2] if t is not None]
        launch(
            append_codes, (k.shape[0] * part.count, blocks, keys[2] + values[2]), *arguments, *tensors[0], *tensors[1],
            cache_layout.signed(part.heads), part.count, found.groups, new, *strides, *rows, keys[2], programs,
            found.length, **sizes, ALL=part.heads is None, FEW=few, BY_HAND=device.interpreted or not device.has_fp8,
            debug=True, sanitize_overflow=False,  # so that the kernel's assertion is compiled
            **keys[0], **values[0], config=_CONFIG,
        )  # fmt: skip
    if not few:
        chunks = [triton.cdiv(width, _CHANNELS) for width in found.widths]
        count = k.shape[0] * found.groups
        launch(
            append_newest, (count, sum(chunks)), *arguments, found.groups, new, *strides, chunks[0],
            count * sum(chunks), found.length, **sizes, SPAN=_CHANNELS, config=_CONFIG,
        )  # fmt: skip


@functools.cache
def _constants(role: Role, prefix: str) -> tuple[dict[str, Any], int, int]:
    """What `encode` must know of keys or values, the tokens of a block, and how many chunks of channels there are."""
    fmt = role.fmt
    by_tokens = role.mode == BY_TOKENS
    if by_tokens or role.mode == cache_layout.PLAIN:
        span = min(_CHANNELS, triton.next_power_of_2(role.width))
        whole = span
    else:
        whole = min(role.group, role.width)
        span = triton.next_power_of_2(whole)
    plain, tokens = fmt.is_plain, role.group if by_tokens else _TOKENS
    own = {
        "GROUPED": fmt.group is not None, "QMIN": 0 if plain else fmt.qmin, "QMAX": 0 if plain else fmt.qmax,
        "LARGEST": 127 if fmt.bits < 8 else 32767, "AS": 0 if plain else _SCALES[fmt.scale_type],
        "EMAX": _EMAX.get(fmt.type, fmt.bits - 2), "LEAST": str(fmt) == "i8/tok/f16",
        "TOKENS": tokens, "SPAN": span,
        "PADDED": triton.next_power_of_2(max(tokens // role.planes, 1)),
    }  # fmt: skip
    constants = role.constants(prefix) | {f"{prefix}_{name}": value for name, value in own.items()}
    return constants, tokens, triton.cdiv(role.width, whole)


def _checked(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> Layout:
    found = cache_layout.require(spec, memory, length, device_of(k))
    for role, (x, held) in enumerate(zip((k, v), memory[3:5], strict=True)):
        expected = (*held.shape[:2], k.shape[2], held.shape[3])
        if tuple(x.shape) != expected or x.dtype != held.dtype or x.device != held.device:
            raise ValueError(
                explain(
                    f"new {('keys', 'values')[role]} do not fit the cache",
                    expected=f"{list(expected)}, {held.dtype}, on {held.device}",
                    found=f"{list(x.shape)}, {x.dtype}, on {x.device}",
                    next_step="make the cache with the config of the model that uses it",
                )
            )
    return found


def _fake(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> None:
    return None


define("cache_append(Tensor(a!)[] memory, Tensor k, Tensor v, Tensor length, str spec) -> ()", cache_append, _fake)
