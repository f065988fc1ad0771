"""What kernels need to know of the device that they run on, and whether they can run on it at all."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.errors import UnsupportedError, explain

LEAST = (8, 0)  # compute capability


@dataclass(frozen=True)
class Device:
    """One GPU. capability: (major, minor). processors: streaming multiprocessors. shared: bytes a program may have.

    interpreted: no GPU at all, Triton's interpreter runs the kernels in numpy.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    interpreted: bool = False

    @property
    def has_fp8(self) -> bool:
        """Whether 8-bit floats exist in its instructions."""
        return self.capability >= (8, 9)

    @property
    def from_shared(self) -> bool:
        """Whether its tensor cores read operands from shared memory, which leaves registers for large tiles.

        The GPUs of 12.x that follow do not: they have the instructions of 8.x, and its shared memory.
        """
        return (9, 0) <= self.capability < (12, 0)

    @property
    def from_registers(self) -> bool:
        """Whether they do so for one operand alone, the other one being in registers: wgmma, which 9.x has."""
        return self.capability[0] == 9

    @property
    def early(self) -> bool:
        """Whether a kernel may be launched before the one before it has ended, and wait for it on the device."""
        return self.capability >= (9, 0) and not self.interpreted

    @property
    def by_hand(self) -> bool:
        """Whether kernels have to do without them: no instructions, or an interpreter that rounds wrongly."""
        return self.interpreted or not self.has_fp8


A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
H200 = Device("NVIDIA H200", (9, 0), 132, 232448)
INTERPRETER = Device("interpreter", (9, 0), 2, 232448, interpreted=True)  # few programs: they run one by one


def interpreting() -> bool:
    """Whether kernels of this process run in Triton's interpreter (TRITON_INTERPRET=1 at the first import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton.knobs

    return bool(triton.knobs.runtime.interpret)


def of(x: Tensor) -> Device:
    """The device of a tensor. Raises UnsupportedError where kernels cannot run on it."""
    return _of_gpu(x.device.index) if x.is_cuda else find(x.device)


@functools.cache
def _of_gpu(index: int) -> Device:
    """Asked once a process, since every launch asks."""
    return find(torch.device("cuda", index))


def find(device: torch.device) -> Device:
    """The facts of a torch device. Raises UnsupportedError where kernels cannot run on it."""
    if reason := reason_against(device):
        raise UnsupportedError(
            explain(
                f"Triton kernels cannot run on the device '{device}': {reason}",
                expected=f"an NVIDIA GPU of compute capability {LEAST[0]}.{LEAST[1]} or later",
                next_step="move model and inputs to such a GPU, or leave the option 'backend' out",
            )
        )
    if device.type != "cuda":
        return INTERPRETER
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


def reason_against(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None:
            return "it is no NVIDIA GPU"
        return None if capability >= LEAST else f"its compute capability is {capability[0]}.{capability[1]}"
    if device.type in ("cpu", "meta") and interpreting():
        return None
    return "it is no GPU" if device.type == "cpu" else "it is no NVIDIA GPU"


@functools.cache
def _properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared = int(getattr(found, "shared_memory_per_block_optin", 101376))
    return Device(found.name, (found.major, found.minor), found.multi_processor_count, shared)
