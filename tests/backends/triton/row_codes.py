"""What the tests of ops whose result goes straight to codes share: tensors, and what the reference makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.backends.triton.quantize_rows import quantize_dynamic, quantize_static
from qfx.format import Format
from tests.backends.triton.cases import DEVICE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMATS = ("i8/tok", "u8/tok", "f8e4m3/tok", "i4/tok", "u4/tok/c90", "i8", "u8", "f8e4m3")
STEP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}


def drawn(m: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x and residual [m, k], weight, bias and smooth [k]."""
    torch.manual_seed(seed)
    x, residual = (torch.randn(m, k, device=DEVICE).mul(3).add(1).to(dtype) for _ in range(2))
    weight, bias, smooth = (torch.rand(k, device=DEVICE).add(0.5).to(dtype) for _ in range(3))
    return x, residual, weight, bias, smooth


def static_of(y: Tensor, fmt: Format) -> tuple[Tensor | None, Tensor | None]:
    """A scale that lets some values saturate, and a zero point, of a format whose scale is fixed."""
    if fmt.dynamic:
        return None, None
    scale = (y.float().abs().max() / fmt.qmax * 0.7).clamp(min=1e-3) if y.numel() else torch.ones((), device=y.device)
    return scale, torch.tensor(9, dtype=torch.uint8, device=y.device) if fmt.has_zero else None


def expected_codes(y: Tensor, text: str, smooth: Tensor | None, static: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The operand that is made of y by the op that does nothing else."""
    if Format.parse(text).dynamic:
        return list(quantize_dynamic(y, smooth, text))
    scale, zero = static
    assert scale is not None
    return [quantize_static(y, smooth, scale, zero, text)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """The same codes, scales and zero points, bit for bit."""
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and torch.equal(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)
    )
