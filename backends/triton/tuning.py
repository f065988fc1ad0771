"""The configurations of kernels: measured ones, kept as JSON for each GPU, else a heuristic.

    tuned/NVIDIA_H200.json   {"int8_gemm": {"n=4096 k=4096 f16": {"16": {"BLOCK_M": 16, ..., "num_warps": 4}}}}

The last key is a bucket of M: the least power of two that is not below it, at most 8192. Nothing is measured here.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.errors import explain

_LARGEST = 8192
_SHIPPED = Path(__file__).parent / "tuned"


def bucket(m: int) -> int:
    """The bucket of M rows."""
    return min(1 << max(m - 1, 0).bit_length(), _LARGEST)


def tuned(device: Device, kernel: str, problem: str, m: int) -> Config | None:
    """What was measured to be best for this kernel, problem and bucket of M on this GPU, or None."""
    found: Config | None = _of_device(device.name, os.environ.get("QFX_TUNED_DIR", ""))
    for key in (kernel, problem, str(bucket(m))):
        if found is None:
            return None
        found = found.get(key)  # type: ignore[assignment]
    return found


def has_any(device: Device) -> bool:
    """Whether anything was measured for this GPU."""
    return bool(_of_device(device.name, os.environ.get("QFX_TUNED_DIR", "")))


def file_of(folder: Path, device: Device) -> Path:
    """Where the configurations of a GPU lie in a folder."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', device.name).strip('_')}.json"


@functools.cache
def _of_device(name: str, folder: str) -> dict[str, Any]:
    """Shipped ones, and over them those of the folder that QFX_TUNED_DIR names."""
    merged: dict[str, Any] = {}
    for place in (_SHIPPED, Path(folder) if folder else None):
        if place is None:
            continue
        path = file_of(place, Device(name, (0, 0), 0, 0))
        if not path.exists():
            continue
        for kernel, problems in _read(path).items():
            for problem, buckets in problems.items():
                merged.setdefault(kernel, {}).setdefault(problem, {}).update(buckets)
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            explain(f"{path} is no JSON: {error}", next_step="run `qfx tune` again, or remove the file")
        ) from error
    assert isinstance(found, dict), path
    return found
