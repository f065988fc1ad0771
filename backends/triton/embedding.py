"""Rows of a quantized table.

qfx_triton::embedding(Tensor ids, Tensor[] w, str w_format, int dim, str dtype) -> Tensor

The table stays as `qfx::embedding` has it: the kernel reads rows of the stored bitstream, only those that are asked.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton.decode_asm import TABLES
from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.embedding import embedding as kernel
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define
from qfx.errors import explain
from qfx.format import Format
from qfx.nested import dynamic_map
from qfx.packing import check_storage

DTYPES = ("f16", "bf16", "f32")
_BLOCK = 1024
_KINDS = {"nf4": "lut", "f4e2m1": "lut", "f8e4m3": "e4m3", "f8e5m2": "e5m2"}


def reason_against(w_format: str, device: Device) -> str | None:  # noqa: ARG001
    """Why tables in this format are not taken on `device`, or None."""
    fmt = Format.parse(w_format)
    if fmt.dynamic or fmt.granularity in ("tok", "head"):
        return f"tables have no scales found at run time or per head, as '{fmt}' says"
    return None


def pack_embedding(w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, dim: int) -> list[Tensor]:
    """The tensors of a table [V, dim] for `embedding`: those that it has, then what the kernel looks values up in.

    w_scale and w_zero are as in `qfx::embedding`. Raises ValueError for codes that do not fit the format.
    """
    fmt = Format.parse(w_format)
    check_storage(w, fmt, dim)
    found = [w.contiguous(), w_scale.contiguous()]
    if w_zero is not None:
        found.append(w_zero.contiguous())
    if fmt.type in TABLES:
        found.append(torch.tensor(TABLES[fmt.type], dtype=torch.float32, device=w.device))
    if fmt.nested:
        found.append(dynamic_map().to(w.device))
    return found


def embedding(ids: Tensor, w: list[Tensor], w_format: str, dim: int, dtype: str) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of a table [V, dim]: [.., dim] in `dtype`, one of DTYPES.

    The values of `qfx::embedding`, bit for bit before the cast. An id that is no row gives a row of NaN, since nothing
    here waits for the device to find out. Raises ValueError for other types of ids or results.
    """
    fmt = Format.parse(w_format)
    _check(ids, w, fmt, dtype)
    codes, scale, *rest = (_raw(t) for t in w)
    above = rest.pop(0) if fmt.has_zero or fmt.has_global_scale else None
    table = rest.pop(0) if fmt.type in TABLES else None
    mapped = rest.pop(0) if fmt.nested else None
    out = torch.empty((*ids.shape, dim), dtype=Format.parse(dtype).code_dtype, device=ids.device)
    flat = ids.reshape(-1).contiguous()
    dense = fmt.has_zero and above is not None and above.shape != scale.shape
    rows, columns = fmt.block or (0 if fmt.is_plain or fmt.granularity == "" else 1, fmt.group or 0)
    signed = fmt.is_integer and fmt.symmetric
    kind = "plain" if fmt.is_plain else "signed" if signed and fmt.bits == 8 else _KINDS.get(fmt.type, "int")
    launch(
        kernel, (flat.numel(), triton.cdiv(dim, _BLOCK)), flat, codes, scale, above if fmt.has_zero else None, above,
        table, mapped, out, codes.shape[0], dim, codes.stride(0), scale.shape[-1] if scale.dim() else 1,
        above.shape[-1] if fmt.has_zero and above is not None and above.dim() else 1,
        BITS=fmt.bits, KIND=kind, SCALE="" if fmt.scale_dtype.itemsize > 1 else fmt.scale_type, ROWS=rows,
        COLUMNS=columns, OFFSET=1 << (fmt.bits - 1) if signed else 0, ZERO_BITS=fmt.bits if dense else 8,
        ASM=not device_of(ids).interpreted, BLOCK=_BLOCK, config={"num_warps": 4, "num_stages": 1},
    )  # fmt: skip
    return out


def _raw(tensor: Tensor) -> Tensor:
    """8-bit floats and signed codes as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _check(ids: Tensor, w: list[Tensor], fmt: Format, dtype: str) -> None:
    due = 2 + (fmt.has_zero or fmt.has_global_scale) + (fmt.type in TABLES) + fmt.nested
    for good, what, expected, found in (
        (ids.dtype in (torch.int32, torch.int64), "ids", "int32 or int64", ids.dtype),
        (dtype in DTYPES, "the type of the result", ", ".join(DTYPES), dtype),
        (len(w) == due, "the table", f"the {due} tensors of pack_embedding for '{fmt}'", f"{len(w)} tensors"),
    ):
        if not good:
            raise ValueError(explain(f"qfx_triton::embedding: {what} does not fit", expected=expected, found=found))
    if w[0].device != ids.device:
        raise ValueError(
            explain(
                "qfx_triton::embedding: ids and table lie on different devices",
                found=f"{ids.device} and {w[0].device}",
                next_step="move both to one GPU",
            )
        )


def _fake(ids: Tensor, w: list[Tensor], w_format: str, dim: int, dtype: str) -> Tensor:
    return ids.new_empty((*ids.shape, dim), dtype=Format.parse(dtype).code_dtype)


_LIBRARY = define(
    "embedding(Tensor ids, Tensor[] w, str w_format, int dim, str dtype) -> Tensor", embedding, _fake
) or globals().get("_LIBRARY")
