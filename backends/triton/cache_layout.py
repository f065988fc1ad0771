"""What kernels must know of the memory of a packed cache (see `qfx.kv.packed_ops`), and what they do not take."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfx.backends.triton.device import Device
from qfx.errors import explain
from qfx.format import Format
from qfx.kv.codes import Codes
from qfx.kv.formats import CacheFormat
from qfx.kv.packed_ops import layout

PLAIN, BY_TOKEN, BY_TOKENS, BY_CHANNELS = range(4)  # which values share a scale
_KINDS = {"i8": 1, "f8e4m3": 2, "f8e5m2": 3}
_WIDEST = 256
_HEADS = 64
_SHARED = 1 << 16


@dataclass(frozen=True)
class Role:
    """Keys or values of one part: constants of a kernel; see `kernels.cache_codes`."""

    fmt: Format
    width: int
    scales: int
    mode: int
    kind: int
    bits: int
    middle: int
    group: int

    @classmethod
    def of(cls, codes: Codes) -> Role:
        """The facts of codes without memory."""
        fmt, scales = codes.fmt, codes.scale.shape[-1]
        mode = BY_TOKENS if codes.by_tokens else BY_TOKEN if codes.one_scale else BY_CHANNELS
        group = codes.group if codes.by_tokens else (fmt.group or codes.width)
        kind, middle = _KINDS.get(fmt.type, 0), int(codes.middle or 0)
        return cls(fmt, codes.width, scales, PLAIN if fmt.is_plain else mode, kind, fmt.bits, middle, group)

    @property
    def planes(self) -> int:
        """Tokens that share bytes."""
        return 1 if self.bits >= 8 else 8 // self.bits if 8 % self.bits == 0 else 8

    @property
    def in_half(self) -> bool:
        """Its values are exact, or as exact as its scales, as f16: e4m3 and wide zero points with a scale are not."""
        if self.mode == PLAIN or (self.bits == 8 and self.fmt.has_zero):
            return False
        return self.mode == BY_TOKEN or (self.fmt.scale_type == "f16" and self.kind < 2)

    def constants(self, prefix: str) -> dict[str, Any]:
        """For the kernels, named with K_ or V_."""
        own = {"SCALES": self.scales, "MODE": self.mode, "KIND": self.kind, "BITS": self.bits, "MIDDLE": self.middle,
               "GROUP": self.group}  # fmt: skip
        return {f"{prefix}_{name}": value for name, value in own.items()}


@dataclass(frozen=True)
class Held:
    """Heads of one format. heads: their numbers as bits, None for all."""

    heads: int | None
    keys: Role
    values: Role
    count: int


@dataclass(frozen=True)
class Layout:
    """The memory of one layer."""

    fmt: CacheFormat
    length: int
    groups: int
    widths: tuple[int, int]
    parts: tuple[Held, ...]

    def tensors(self, memory: Sequence[Tensor]) -> list[list[list[Tensor | None]]]:
        """[data, scale, zero] of keys and of values of each part; see `qfx.kv.packed_ops`."""
        left = iter(memory[5:])
        return [
            [[next(left), next(left), next(left) if r.fmt.has_zero else None] for r in (part.keys, part.values)]
            for part in self.parts
        ]


@functools.lru_cache(maxsize=1024)
def of(spec: str) -> Layout:
    """The layout that a spec says."""
    fmt, length, parts = layout(spec)
    found, groups = [], 0
    for part in parts:
        count = part.keys.data.shape[1]
        groups += count
        heads = None if part.heads is None else sum(1 << int(h) for h in part.heads)
        found.append(Held(heads, Role.of(part.keys), Role.of(part.values), count))
    widths = (parts[0].keys.width, parts[0].values.width)
    return Layout(fmt, length, groups, widths, tuple(found))


@functools.lru_cache(maxsize=1024)
def reason_against(spec: str, device: Device) -> str | None:
    """Why the kernels do not take such a cache there, or None."""
    found = of(spec)
    if device.shared < _SHARED:
        return f"{device.name} gives a program {device.shared} bytes of shared memory, of {_SHARED} that tiles need"
    if max(found.widths) > _WIDEST:
        return f"heads of {max(found.widths)} channels, of at most {_WIDEST} that a tile has room for"
    if len(found.parts) > 1 and found.groups > _HEADS:
        return f"{found.groups} heads of several formats, of at most {_HEADS}"
    for part in found.parts:
        for role in (part.keys, part.values):
            if role.fmt.is_float and role.bits < 8:
                return f"codes that are looked up in a table ({role.fmt})"
            if role.fmt.clip != 100:
                return f"scales of {role.fmt.clip} percent of the extremes ({role.fmt})"
            if role.mode == BY_TOKENS and role.group % role.planes:
                return f"groups of {role.group} tokens, of which {role.planes} share bytes ({role.fmt})"
    return None


def require(spec: str, memory: Sequence[Tensor], length: Tensor, device: Device) -> Layout:
    """The layout. Raises ValueError for a cache that the kernels do not take, and for a length of another kind."""
    where = memory[0].device
    if length.dtype != torch.int64 or length.numel() != 1 or length.device != where:
        raise ValueError(
            explain(
                "how many tokens a cache holds is read where its memory is",
                expected=f"one number, int64, on {where}",
                found=f"{list(length.shape)}, {length.dtype}, on {length.device}",
                next_step="give the cache's own count, or move it there",
            )
        )
    if reason := reason_against(spec, device):
        raise ValueError(
            explain(
                f"the kernels do not take this cache: {reason}",
                next_step="take another format, or the reference, qfx::cache_attention and qfx::cache_append",
            )
        )
    return of(spec)


def signed(heads: int | None) -> int:
    """Bits of heads as an int64."""
    bits = heads or 0
    return bits - (1 << 64) if bits >> 63 else bits
