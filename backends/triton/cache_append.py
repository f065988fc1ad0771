"""Quantize-on-append for packed caches of fixed length: qfx_triton::cache_append, as qfx::cache_append.

    append_codes    whole groups of the newest tokens to codes and scales, bit for bit those of the reference
    append_newest   what is left moves to the front, and new tokens come behind

How many tokens there are is read on the device: nothing waits for the host. On a GPU memory that is full is a
device-side assertion, as it is where torch writes beyond a tensor; nothing is written then.
"""

from __future__ import annotations

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


def cache_append(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> None:
    """Store k and v [B, G, n, D] behind the first `length` tokens (i64 []); see `qfx.kv.packed_ops`.

    Raises ValueError for states that do not fit the memory, for formats that are not taken and, where Triton
    interprets, for more tokens than there is room for.
    """
    device = device_of(k)
    found = _checked(memory, k, v, spec)
    if device.interpreted and not k.is_meta and int(length) + k.shape[2] > found.length:
        raise ValueError(full(found.length, int(length) + k.shape[2]))
    if not k.numel() and not v.numel():
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    stored, first_k, first_v, newest_k, newest_v = memory[:5]
    new, fmt, room = k.shape[2], found.fmt, newest_k.shape[2]
    strides = (*k.stride()[:3], *v.stride()[:3])
    sizes = {"D": found.widths[0], "DV": found.widths[1], "SINKS": fmt.sinks, "RESIDUAL": fmt.residual,
             "STEP": fmt.step, "ROOM": room, "LENGTH": found.length}  # fmt: skip
    most = room - fmt.residual + (new if new > FEW else 0)  # tokens that can be stored by this call
    for part, (keys, values) in zip(found.parts, found.tensors(memory), strict=True):
        constants, counts = zip(*(_constants(r, n) for r, n in ((part.keys, "K"), (part.values, "V"))), strict=True)
        blocks = max(triton.cdiv(most, each["_TOKENS"]) for each in counts)
        chunks = [each["_CHUNKS"] for each in counts]
        rows = [t.shape[2] for two in (keys, values) for t in two[:2] if t is not None]
        launch(
            append_codes, (k.shape[0] * part.count, blocks, sum(chunks)), length, stored, newest_k, newest_v, k, v,
            *keys, *values, cache_layout.signed(part.heads), part.count, found.groups, new, *strides, *rows, chunks[0],
            **sizes, ALL=part.heads is None, BY_HAND=device.interpreted or not device.has_fp8,
            **constants[0], **constants[1], config={"num_warps": 4, "num_stages": 1},
        )  # fmt: skip
    chunks = [triton.cdiv(width, _CHANNELS) for width in found.widths]
    launch(
        append_newest, (k.shape[0] * found.groups, sum(chunks)), length, stored, first_k, first_v, newest_k, newest_v,
        k, v, found.groups, new, *strides, chunks[0], **sizes,
        SINKS_BLOCK=triton.next_power_of_2(max(fmt.sinks, 1)), TOKENS=_TOKENS, SPAN=_CHANNELS,
        debug=True, sanitize_overflow=False,  # so that the kernel's assertion is compiled
        config={"num_warps": 4, "num_stages": 1},
    )  # fmt: skip


def _constants(role: Role, prefix: str) -> tuple[dict[str, Any], dict[str, int]]:
    """What `encode` must know of keys or values, and tokens and chunks of its programs."""
    fmt = role.fmt
    by_tokens = role.mode == BY_TOKENS
    if by_tokens or role.mode == cache_layout.PLAIN:
        span = min(_CHANNELS, triton.next_power_of_2(role.width))
        whole = span
    else:
        whole = min(role.group, role.width)
        span = triton.next_power_of_2(whole)
    plain = fmt.is_plain
    own = {
        "GROUPED": fmt.group is not None, "QMIN": 0 if plain else fmt.qmin, "QMAX": 0 if plain else fmt.qmax,
        "LARGEST": 127 if fmt.bits < 8 else 32767, "AS": 0 if plain else _SCALES[fmt.scale_type],
        "EMAX": _EMAX.get(fmt.type, fmt.bits - 2), "LEAST": str(fmt) == "i8/tok/f16",
        "TOKENS": role.group if by_tokens else _TOKENS, "SPAN": span,
    }  # fmt: skip
    constants = role.constants(prefix) | {f"{prefix}_{name}": value for name, value in own.items()}
    return constants, {"_TOKENS": own["TOKENS"], "_CHUNKS": triton.cdiv(role.width, whole)}


def _checked(memory: list[Tensor], k: Tensor, v: Tensor, spec: str) -> Layout:
    cache_layout.require(spec, device_of(k))
    found = cache_layout.of(spec)
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


_LIBRARY = define(
    "cache_append(Tensor(a!)[] memory, Tensor k, Tensor v, Tensor length, str spec) -> ()", cache_append, _fake
) or globals().get("_LIBRARY")
