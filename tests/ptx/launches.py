"""Launches of kernels carried out here: what `launch.recorded` lists is compiled and run at once, on CPU tensors."""

from __future__ import annotations

import struct
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from qfx.backends.triton import ahead, device, launch
from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Launch
from tests.ptx.copies import Map
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import Program, parse

_MOST_LANES = 8192  # at once
# The compiler of Triton 3.6 leaves out the fence between cp.async and wgmma, in whatever kernel.
_COPIES_FENCED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
_PROGRAMS: dict[Any, tuple[Program, int, list[Any]]] = {}


class Carried(list[Launch]):
    """A list of launches that runs what is appended."""

    def __init__(self, on: Device) -> None:
        super().__init__()
        self.on = on

    def append(self, launched: Launch) -> None:
        """Run it; the list stays empty, so that memory can be given back."""
        carry_out(launched, self.on)


def carry_out_all(capability: str) -> None:
    """From now on launches of this process run here. capability: "80" or "90"."""
    device.interpreting = lambda: True  # so that CPU tensors are taken
    on = {"80": device.A100, "90": device.H100}[capability]
    launch._RECORDING.set(launch._Recording(on, Carried(on)))


def compiled(launched: Launch, on: Device) -> tuple[Program, int, list[Any]]:
    """The program, its bytes of shared memory and what is known of its tensor descriptors."""
    source = ahead.source_of(launched)
    key = (on.capability, source.hash(), *sorted(launched.options.items()))
    if key not in _PROGRAMS:
        target = GPUTarget("cuda", on.capability[0] * 10 + on.capability[1], 32)
        built = triton.compile(source, target=target, options={**launched.options, "enable_fp_fusion": True})
        maps = getattr(built.metadata, "tensordesc_meta", None) or []
        _PROGRAMS[key] = parse(built.asm["ptx"]), built.metadata.shared, list(maps)
    return _PROGRAMS[key]


def carry_out(launched: Launch, on: Device) -> None:
    """Compile the launch and run all of its programs."""
    program, shared, maps = compiled(launched, on)
    given = [v for name, v in zip(*_arguments(launched), strict=True) if not name]
    tensors = [v.base if isinstance(v, TensorDescriptor) else v for v in given]
    memory = Global([t for t in tensors if isinstance(t, Tensor)])
    descriptors: dict[int, Map] = {}
    values: list[int | float] = []
    metas = iter(maps)
    for value in given:
        if isinstance(value, TensorDescriptor):
            key = (1 << 20) + 128 * len(descriptors)
            descriptors[key] = _map(value, next(metas), memory)
            values += [key, *value.shape, *value.strides]
        else:
            values.append(memory.address(value) if isinstance(value, Tensor) else value)
    params = _params(program, values)
    grid: Any = (*launched.grid, 1, 1)[:3]
    count = grid[0] * grid[1] * grid[2]
    at_once = max(1, _MOST_LANES // program.threads)
    for first in range(0, count, at_once):
        programs = range(first, min(first + at_once, count))
        fenced = _COPIES_FENCED
        Machine(program, grid, programs, params, memory, shared, descriptors, copies_fenced=fenced).run()
    memory.give_back()


def _arguments(launched: Launch) -> tuple[list[bool], list[Any]]:
    """Of each parameter: whether it is a constant of the code, and its value."""
    constants = ahead.source_of(launched).constants
    known = {name if isinstance(name, str) else launched.kernel.arg_names[name[0]] for name in constants}
    names = launched.kernel.arg_names
    return [name in known for name in names], [launched.arguments.get(name) for name in names]


def _params(program: Program, values: list[int | float]) -> dict[str, bytes]:
    """The bytes of the kernel's parameters; the last two are memory that no kernel of ours asks for."""
    held: dict[str, bytes] = {}
    values = [*values, 0, 0]
    assert len(values) == len(program.params), (program.params, values)
    for (name, size), value in zip(program.params, values, strict=True):
        if isinstance(value, float):
            held[name] = struct.pack("<f", value)
        else:
            held[name] = int(value).to_bytes(8, "little", signed=value < 0)[: min(size, 8)]
    return held


def _map(descriptor: TensorDescriptor, meta: Any, memory: Global) -> Map:
    base = descriptor.base
    box = tuple(meta["block_size"])
    return Map(
        memory.address(base), base.element_size(), tuple(descriptor.shape), descriptor.strides[0] * base.element_size(),
        (box[0], box[1]), meta["swizzle"],
    )  # fmt: skip
