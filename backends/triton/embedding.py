"""Rows of a quantized table.

qfx_triton::embedding(ids, w, w_scale, w_zero?, w_format, dim, dtype) -> Tensor

The table stays as `qfx::embedding` has it: the kernel reads rows of the stored bitstream, only those that are asked.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from qfx.backends.triton.decode_asm import TABLES
from qfx.backends.triton.kernels.embedding import embedding as kernel
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.row_codes import FLOATS
from qfx.errors import explain
from qfx.format import Format
from qfx.packing import check_storage
from qfx.rounding.nested import dynamic_map

_BLOCK = 1024
_KINDS = {"nf4": "lut", "f4e2m1": "lut", "f8e4m3": "e4m3", "f8e5m2": "e5m2"}


def reason_against(w_format: str) -> str | None:
    """Why tables in this format are not taken, or None."""
    fmt = Format.parse(w_format)
    if fmt.dynamic or fmt.granularity in ("tok", "head"):
        return f"tables have no scales found at run time or per head, as '{fmt}' says"
    return None


def embedding(
    ids: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, dim: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of a packed table [V, dim]: [.., dim] in `dtype`, f16, bf16 or f32.

    The values of `qfx::embedding`, bit for bit before the cast. An id that is no row gives a row of NaN, since nothing
    here waits for the device to find out. Raises ValueError for other types of ids or results, and for a table that
    does not fit its format.
    """
    fmt = Format.parse(w_format)
    _check(ids, w, w_zero, fmt, dim, dtype)
    codes, scale, above = (None if t is None else _raw(t) for t in (w, w_scale, w_zero))
    assert codes is not None and scale is not None
    out = torch.empty((*ids.shape, dim), dtype=dtype, device=ids.device)
    flat = ids.reshape(-1).contiguous()
    dense = fmt.has_zero and above is not None and above.shape != scale.shape
    rows, columns = fmt.block or (0 if fmt.is_plain or fmt.granularity == "" else 1, fmt.group or 0)
    signed = fmt.is_integer and fmt.symmetric
    kind = "plain" if fmt.is_plain else "signed" if signed and fmt.bits == 8 else _KINDS.get(fmt.type, "int")
    launch(
        kernel, (flat.numel(), triton.cdiv(dim, _BLOCK)), flat, codes, scale, above if fmt.has_zero else None, above,
        _values(fmt.type, ids.device) if fmt.type in TABLES else None,
        _values("dq", ids.device) if fmt.nested else None,
        out, codes.shape[0], dim, codes.stride(0), scale.shape[-1] if scale.dim() else 1,
        above.shape[-1] if fmt.has_zero and above is not None and above.dim() else 1,
        BITS=fmt.bits, KIND=kind, SCALE="" if fmt.scale_dtype.itemsize > 1 else fmt.scale_type, ROWS=rows,
        COLUMNS=columns, OFFSET=1 << (fmt.bits - 1) if signed else 0, ZERO_BITS=fmt.bits if dense else 8,
        ASM=not device_of(ids).interpreted, BLOCK=_BLOCK, config={"num_warps": 4, "num_stages": 1},
    )  # fmt: skip
    return out


def prepare(w_format: str, where: torch.device) -> None:
    """Bring what rows of this format look up to the device, once: neither a CUDA graph nor its memory may hold it."""
    fmt = Format.parse(w_format)
    for name in (fmt.type if fmt.type in TABLES else "", "dq" if fmt.nested else ""):
        if name:
            _values(name, where)


@functools.cache
def _values(name: str, device: torch.device) -> Tensor:
    """What codes are looked up in, on a device: values of a type, or the 256 of nested scales. f32.

    Copied there at the first call, which a CUDA graph must not record: see `prepare`.
    """
    values = dynamic_map() if name == "dq" else torch.tensor(TABLES[name], dtype=torch.float32)
    return values.to(device)


def _raw(tensor: Tensor) -> Tensor:
    """8-bit floats and signed codes as bytes, rows side by side."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _check(ids: Tensor, w: Tensor, w_zero: Tensor | None, fmt: Format, dim: int, dtype: torch.dtype) -> None:
    check_storage(w, fmt, dim)
    names = ", ".join(map(str, FLOATS))
    for good, what, expected, found in (
        (ids.dtype in (torch.int32, torch.int64), "the type of the ids", "int32 or int64", ids.dtype),
        (dtype in FLOATS, "the type of the result", names, dtype),
        (w_zero is not None or not (fmt.has_zero or fmt.has_global_scale), "the table", f"w_zero for '{fmt}'", None),
        (w.device == ids.device, "the device of the table", ids.device, w.device),
    ):
        if not good:
            raise ValueError(explain(f"qfx_triton::embedding: {what} does not fit", expected=expected, found=found))


def _fake(
    ids: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, dim: int, dtype: torch.dtype
) -> Tensor:
    return ids.new_empty((*ids.shape, dim), dtype=dtype)


define(
    "embedding(Tensor ids, Tensor w, Tensor w_scale, Tensor? w_zero, str w_format, int dim, ScalarType dtype) "
    "-> Tensor",
    embedding,
    _fake,
)
