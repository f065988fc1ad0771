"""Tensor descriptors: matrices whose tiles the memory unit of compute capability 9.0 copies to shared memory by itself.

Made on the host for every launch and passed by value, so that a CUDA graph holds them and no allocator has to be set,
as descriptors made on the device want (`triton.set_allocator` is state of the whole process).
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qfx.backends.triton.device import Device

LEAST = (9, 0)  # compute capability
_ALIGNMENT = 16  # bytes of the first element and of the distance of rows


def has_descriptors(device: Device) -> bool:
    """Whether kernels may take them; the interpreter has them, too."""
    return device.capability >= LEAST


def reason_against(matrix: Tensor) -> str | None:
    """Why no descriptor can stand for a matrix, or None."""
    assert matrix.ndim == 2, matrix.shape
    if not matrix.numel():
        return "it has no elements"
    if matrix.stride(1) != 1:
        return "elements of a row do not lie side by side"
    if matrix.stride(0) * matrix.element_size() % _ALIGNMENT:
        return f"rows do not begin at multiples of {_ALIGNMENT} bytes"
    return f"it does not begin at a multiple of {_ALIGNMENT} bytes" if matrix.data_ptr() % _ALIGNMENT else None


def described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix in blocks [rows, columns]. What is read beyond its edges is zero."""
    assert reason_against(matrix) is None, reason_against(matrix)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
