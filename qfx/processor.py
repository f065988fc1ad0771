"""What the processor's integer instructions can do, as torch knows it (cpuinfo: Linux, macOS, Windows; x86 and ARM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_X86 = ("x86", "x86_64", "i386", "i686", "amd64")
_VNNI = ("avx512_vnni", "avx_vnni")


def capabilities() -> Mapping[str, Any]:
    """Names of instruction sets -> whether the processor has them, beside other facts (`architecture`, sizes)."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    return found


def saturates() -> bool:
    """Whether sums of two products of u8 and s8 are cut off at 16 bits: x86 without VNNI. On ARM they are exact."""
    found = capabilities()
    return str(found.get("architecture", "")).lower() in _X86 and not any(found.get(name) for name in _VNNI)


def instruction_sets() -> list[str]:
    """Architecture and instruction sets: equal lists, equal kernels."""
    found = capabilities()
    return [str(found.get("architecture", "")), *sorted(name for name, has in found.items() if has is True)]
