"""Compilation ahead of time: launches that were recorded (see `launch`) to PTX and their use of the chip.

Needs no GPU; Triton's own assembler is in its wheel. Not in a process in which Triton interprets.

All variants of the tests (tests/backends/triton/aot_*.py) were compiled with Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0, each
other than the installed one from a folder of its own (pip install --no-deps --target FOLDER triton==VERSION):

    PYTHONPATH=FOLDER TRITON_DEFAULT_FP_FUSION=1 python -m tests.backends.triton.compile_cases FAMILY

3.7.1 and 3.9.0 spill nothing; 3.6.0 spills 8 bytes a thread in a few variants, 3.8.0 in one. 3.6.0 writes no
fence.proxy.async between cp.async and the wgmma that reads what it brought, which the later ones do. What is compiled
is what a launch on that device would compile: the tests ask Triton's own front end (compile_cases --front-end).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Launch

_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5", torch.bool: "*u1",
}  # fmt: skip
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_OUTSIDE_INT32 = 2**31


@dataclass(frozen=True)
class Compiled:
    """One variant. registers: of a thread. shared: bytes of a program. spilled: bytes of a thread in memory.

    cubin: the machine code.
    """

    kernel: str
    ptx: str
    cubin: bytes
    registers: int
    shared: int
    spilled: int


def compile_launch(launched: Launch, device: Device) -> Compiled:
    """Compile one recorded launch for the capability of `device`."""
    return compile_source(source_of(launched), launched, device)


def source_of(launched: Launch) -> ASTSource:
    """The kernel with its types and constants: what, with the options and the device, makes the code.

    Triton makes a variant for an integer that is 1 and for one that 16 divides, where a kernel does not forbid it.
    """
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(launched.kernel.params):
        value = launched.arguments.get(parameter.name)
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = _type_of(value)
            free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            place = value.data_ptr() if isinstance(value, Tensor) else value  # that of a meta tensor begins at 0
            if isinstance(place, int) and place % 16 == 0 and not free:
                aligned[i,] = [["tt.divisibility", 16]]
    return ASTSource(launched.kernel, signature, constants, aligned)


def compile_source(source: ASTSource, launched: Launch, device: Device) -> Compiled:
    """Compile what `source_of(launched)` gave."""
    target = GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)
    built = triton.compile(source, target=target, options={**launched.options, "enable_fp_fusion": True})
    usage = _usage(built.asm["cubin"])
    spilled = usage["stack"] + usage["local"]
    code = built.asm["ptx"], built.asm["cubin"]
    return Compiled(launched.kernel.fn.__name__, *code, usage["registers"], built.metadata.shared, spilled)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32" if abs(value) < _OUTSIDE_INT32 else "i64"


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes, as cuobjdump tells them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(said)
    assert found is not None, (said, sys.version)
    return {key: int(value) for key, value in found.groupdict().items()}
