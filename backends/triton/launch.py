"""Launching a kernel: on the GPU, in Triton's interpreter, or into a list from which it is compiled ahead of time.

Every kernel of this backend is started by `launch`, so that a list of launches, taken while the ops run on tensors
without data (device "meta"), holds exactly the variants that the dispatch would choose on that device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from qfx.backends.triton import device, repeated
from qfx.backends.triton.device import Device

Config = Mapping[str, int]  # constexprs of a kernel, with num_warps and num_stages
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "debug", "sanitize_overflow")  # of the compiler


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be started. options: those of _OPTIONS.

    arguments: by name, tensors without data, or descriptors of such.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass
class _Recording:
    device: Device
    launches: list[Launch]


_RECORDING: ContextVar[_Recording | None] = ContextVar("qfx_triton_recording", default=None)


@contextmanager
def recorded(on: Device) -> Iterator[list[Launch]]:
    """Within it nothing runs: launches of ops called with meta tensors go to the list, as they would be on `on`."""
    recording = _Recording(on, [])
    token = _RECORDING.set(recording)
    try:
        yield recording.launches
    finally:
        _RECORDING.reset(token)


def device_of(x: Tensor) -> Device:
    """The device for which a launch with `x` is chosen."""
    recording = _RECORDING.get()
    return device.of(x) if recording is None else recording.device


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, config: Config | None = None, **constants: Any) -> None:
    """Start `kernel` with positional arguments, then constexprs by name; those of `config` are added.

    Where Inductor's setting `triton.enable_pdl` is on, kernels that can be are launched before the one before them has
    ended. Nothing is started for an empty grid. Raises UnsupportedError for tensors on a device that has no kernels.
    """
    settings = {**constants, **(config or {})}
    if 0 in grid:
        return
    recording = _RECORDING.get()
    first = next(a for a in arguments if isinstance(a, Tensor))
    if "EARLY" in kernel.arg_names:
        settings["EARLY"] = early() and device_of(first).early
        if settings["EARLY"]:
            settings["launch_pdl"] = True
    if recording is not None:
        options: dict[str, int] = {key: settings.pop(key) for key in _OPTIONS if key in settings}
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        recording.launches.append(Launch(kernel, tuple(grid), {**named, **settings}, options))
        return
    with repeated.starting() as notes:
        if notes is not None and any(isinstance(value, Tensor) for value in settings.values()):
            notes.complete = False  # given by name they are constants, for which others do not stand in
        if device.of(first).interpreted:
            run = functools.partial(kernel[tuple(grid)], **settings)
            run(*arguments)
            if notes is not None:
                notes.start(run, arguments, exact=True)
            return
        place = (*grid, 1, 1)[:3]
        with torch.cuda.device(first.device):
            compiled = kernel[place](*arguments, **settings, enable_fp_fusion=True)  # said: Triton's default may change
        if notes is None:
            return
        if not hasattr(type(compiled), "__getitem__"):  # by a hook of Triton's nothing was started, or not yet compiled
            notes.complete = False
            return
        rest = [settings.get(p.name, p.default) for p in kernel.params[len(arguments) :]]
        notes.start(compiled[place], arguments, rest)


def is_recorded() -> bool:
    """Whether nothing runs, and launches go to a list."""
    return _RECORDING.get() is not None


def early() -> bool:
    """Whether kernels are launched before the one before them has ended, where they can be."""
    return bool(inductor.triton.enable_pdl)


def each_once(configs: Sequence[Config]) -> list[Config]:
    """Those in their order, without repeats."""
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def dot_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what floats of `dtype` are multiplied: themselves on a GPU, f32 in the interpreter, which has no bf16."""
    if dtype == torch.bfloat16 and _RECORDING.get() is None and device.interpreting():
        return torch.float32
    return dtype
