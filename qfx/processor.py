"""What the processor's integer instructions can do, and work that is spread over its threads.

Instructions are those that torch knows of (cpuinfo: Linux, macOS, Windows; x86 and ARM).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_X86 = ("x86", "x86_64", "i386", "i686", "amd64")
_VNNI = ("avx512_vnni", "avx_vnni")


def capabilities() -> Mapping[str, Any]:
    """Names of instruction sets -> whether the processor has them, beside other facts (`architecture`, sizes)."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    return found


def each(function: Callable[[Any], Any], values: Iterable[Any], threads: int) -> list[Any]:
    """`map` in several threads, where there are several values."""
    values = list(values)
    if threads <= 1 or len(values) <= 1:
        return [function(value) for value in values]
    with ThreadPoolExecutor(min(threads, len(values))) as pool:
        return list(pool.map(function, values))


def is_x86() -> bool:
    """Whether the processor is one of Intel's and AMD's kind."""
    return str(capabilities().get("architecture", "")).lower() in _X86


def saturates() -> bool:
    """Whether sums of two products of u8 and s8 are cut off at 16 bits: x86 without VNNI. On ARM they are exact."""
    found = capabilities()
    return is_x86() and not any(found.get(name) for name in _VNNI)


def instruction_sets() -> list[str]:
    """Architecture and instruction sets: equal lists, equal kernels."""
    found = capabilities()
    return [str(found.get("architecture", "")), *sorted(name for name, has in found.items() if has is True)]


def flags() -> str:
    """What the processor can do, as the system tells it: equal texts, equal processors."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
