"""The configurations of kernels: measured ones, kept as JSON for each GPU, else a heuristic.

    tuned/NVIDIA_H200.json   {"int8_gemm": {"n=4096 k=4096 f16": {"16": {"BLOCK_M": 16, ..., "num_warps": 4}}}}

The last key is a bucket of M: the least power of two that is not below it, at most 8192. Files are looked for in the
package, in the user's folder ("tuned" in that of qfx's caches) and in the folder that QFX_TUNED_DIR names; the later
wins; calls that are repeated (see `repeated`) ask no more. A configuration whose constants are not those of the kernel,
which another qfx measured, is passed over, and a warning says so. Nothing is measured here: `tune` does that, and
learns by `watched` what there is to choose.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qfx.backends.triton import repeated
from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.errors import explain, warn
from qfx.storage.files import locked, read_json, write_text
from qfx.storage.folders import default_folder

LARGEST = 8192
SHIPPED = Path(__file__).parent / "tuned"

Choice = tuple[str, str, str]  # kernel, problem, bucket of M
Candidates = Callable[[int], Sequence[Config]]
_WATCHED: ContextVar[dict[Choice, list[Config]] | None] = ContextVar("qfx_triton_watched", default=None)
_TRIED: ContextVar[tuple[Choice, Config] | None] = ContextVar("qfx_triton_tried", default=None)


def bucket(m: int) -> int:
    """The bucket of M rows."""
    return min(1 << max(m - 1, 0).bit_length(), LARGEST)


def tuned(device: Device, kernel: str, problem: str, m: int, candidates: Candidates) -> Config | None:
    """What was measured to be best for this kernel, problem and bucket of M on this GPU, or None.

    candidates: of rows, what is worth a measurement for as many. It is called with the most that the bucket has, while
    one is made, and to tell whether what was found has the constants of the kernel as it is.
    """
    choice = (kernel, problem, str(bucket(m)))
    watched_now, tried = _WATCHED.get(), _TRIED.get()
    if watched_now is not None:
        watched_now.setdefault(choice, list(candidates(bucket(m))))
    if tried is not None and tried[0] == choice:
        return tried[1]
    found: Config | None = _of_device(device.name, *_named()).get(kernel, {}).get(problem, {}).get(choice[2])
    if found is None or any(found.keys() == one.keys() for one in candidates(bucket(m))):
        return found
    _tell_other(device.name, kernel, " ".join(sorted(found)))
    return None


@contextmanager
def watched() -> Iterator[dict[Choice, list[Config]]]:
    """Collects the choices that are made within it, and between what."""
    found: dict[Choice, list[Config]] = {}
    token = _WATCHED.set(found)
    try:
        yield found
    finally:
        _WATCHED.reset(token)


@contextmanager
def trying(choice: Choice, config: Config) -> Iterator[None]:
    """Within it one choice is made for this configuration."""
    token = _TRIED.set((choice, config))
    try:
        yield
    finally:
        _TRIED.reset(token)


def settled() -> bool:
    """Whether choices are neither watched nor tried."""
    return _WATCHED.get() is None and _TRIED.get() is None


def check(folder: Path, device: Device) -> None:
    """Raises ValueError where the file of a GPU, in this folder or in one that is looked into, cannot be read."""
    path = file_of(folder, device)
    if path.exists():
        _read(path)
    has_any(device)


def has_any(device: Device) -> bool:
    """Whether anything was measured for this GPU."""
    return bool(_of_device(device.name, *_named()))


def file_of(folder: Path, device: Device) -> Path:
    """Where the configurations of a GPU lie in a folder."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', device.name).strip('_')}.json"


def own_folder() -> Path | None:
    """Where this user's configurations are written: QFX_TUNED_DIR, else "tuned" in the folder of caches.

    None where there is no such folder (QFX_CACHE_DIR is empty).
    """
    named, base = os.environ.get("QFX_TUNED_DIR", ""), default_folder()
    if named:
        return Path(named)
    return None if base is None else base / "tuned"


def write(folder: Path, device: Device, found: Mapping[Choice, Config]) -> Path:
    """Add configurations to the file of a GPU and return its path; what else it holds stays.

    The file is whole at any time, and several processes may add to it at once. Raises OSError where it cannot be
    written, ValueError where what is there is none.
    """
    path = file_of(folder, device)
    with locked(folder):
        kept = _read(path) if path.exists() else {}
        for (kernel, problem, rows), config in found.items():
            kept.setdefault(kernel, {}).setdefault(problem, {})[rows] = dict(config)
        for problems in kept.values():
            for problem, buckets in problems.items():
                problems[problem] = dict(sorted(buckets.items(), key=lambda item: int(item[0])))
        write_text(path, json.dumps(kept, indent=1, sort_keys=False) + "\n")
    _of_device.cache_clear()
    repeated.forget()
    return path


def _named() -> tuple[str, str]:
    """What says where folders are."""
    return os.environ.get("QFX_TUNED_DIR", ""), os.environ.get("QFX_CACHE_DIR", "-")


@functools.cache
def _tell_other(name: str, kernel: str, constants: str) -> None:
    """A warning, once for each kind, of a configuration that another qfx measured."""
    warn(
        explain(
            f"what was measured of {kernel} on {name} is of other constants than the kernel has: a heuristic is taken",
            found=constants,
            next_step="run `qfx tune` again on this GPU",
        ),
        stacklevel=3,
    )


@functools.cache
def _of_device(name: str, folder: str, _: str) -> dict[str, Any]:
    """The configurations of all folders, the later over the earlier ones."""
    base = default_folder()
    merged: dict[str, Any] = {}
    for place in (SHIPPED, None if base is None else base / "tuned", Path(folder) if folder else None):
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
    """What a file holds. Raises ValueError for other than configurations, which kernels could not be started with."""
    step = "remove the file, and run `qfx tune` again"
    found = read_json(path, step)
    for kernel, problems in found.items():
        if not _is_table(problems):
            told = f"{path} holds no configurations of kernels under {kernel!r}"
            raise ValueError(explain(told, expected='{"PROBLEM": {"ROWS": {"CONSTANT": a number}}}', next_step=step))
    return found


def _is_table(problems: Any) -> bool:
    """Whether it is problem -> bucket -> configuration."""
    if not isinstance(problems, dict) or not all(isinstance(buckets, dict) for buckets in problems.values()):
        return False
    configs = [(rows, config) for buckets in problems.values() for rows, config in buckets.items()]
    return all(
        rows.isdecimal() and isinstance(config, dict) and all(isinstance(value, int) for value in config.values())
        for rows, config in configs
    )
