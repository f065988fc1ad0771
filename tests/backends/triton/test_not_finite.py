"""NaN and infinity stay visible: the greatest of values passes over NaN on a GPU, and integer codes cannot hold it.

So the scale of a row that holds NaN has to be NaN, as the reference has it; other rows stay as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.backends.triton import act_quantize as _act  # noqa: F401  (each registers its op)
from qfx.backends.triton import cache_append as _append  # noqa: F401
from qfx.backends.triton import hadamard
from qfx.backends.triton import norm_quantize as _norm  # noqa: F401
from qfx.backends.triton import quantized_attention as _attention  # noqa: F401
from qfx.format import Format
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from qfx.numerics import run_time_qparams
from tests.backends.triton.cases import DEVICE

OPS, REFERENCE = torch.ops.qfx_triton, torch.ops.qfx
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, which interprets


def rows(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(DEVICE, dtype)


def negative_nan() -> Tensor:
    """As x86 makes it: as an integer it is below all numbers."""
    return torch.tensor(-4194304, dtype=torch.int32, device=DEVICE).view(torch.float32)


@pytest.mark.parametrize("text", ["i8/tok", "u8/tok", "i4/tok", "f8e4m3/tok", "i8/dyn", "u8/dyn", "f8e4m3/g32/dyn"])
@pytest.mark.parametrize(("k", "at"), [(40, 39), (40, 0), (300, 250), (300, 10), (640, 500)])
@pytest.mark.parametrize("sign", [False, True])
def test_a_row_that_holds_nan_has_the_scale_nan(text: str, k: int, at: int, sign: bool) -> None:
    x, fmt = rows(3, k), Format.parse(text)
    plain = OPS.quantize_dynamic(x, None, text)[1]
    assert plain.isfinite().all()
    x[1, at] = negative_nan() if sign else NAN
    found, expected = OPS.quantize_dynamic(x, None, text)[1], run_time_qparams(x, fmt).scale
    assert torch.equal(found.isnan(), expected.isnan().reshape(found.shape))
    assert found.isnan().any()
    assert torch.equal(found[~found.isnan()], plain[~found.isnan()])


@pytest.mark.parametrize("text", ["i8/tok", "u8/tok"])
def test_rows_that_no_program_holds(text: str) -> None:
    x = rows(2, 16400, torch.float16)
    x[0, 12000] = NAN
    assert OPS.quantize_dynamic(x, None, text)[1].isnan().flatten().tolist() == [True, False]
    ones = torch.ones_like(x[0])
    found = OPS.norm_quantize(x, None, ones, None, 1e-6, False, None, None, None, text, False, False)[1]
    assert found.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("text", ["i8/tok", "u8/tok"])
@pytest.mark.parametrize("k", [40, 300])
def test_producers_that_quantize(text: str, k: int) -> None:
    x, other = rows(3, k), rows(3, k)
    other[2, k - 1] = NAN
    none = (None, None, None)
    gated = OPS.act_quantize(x, other, "silu", *none, text, False)[1]
    summed = OPS.norm_quantize(x, other, None, None, 1e-6, True, *none, text, False, False)[1]
    for scale in (gated, summed):
        assert scale.isnan().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize(("k", "size"), [(64, 64), (128, 64), (640, 640)])
@pytest.mark.parametrize("text", ["i8/tok", "f8e4m3/tok"])
def test_a_rotation_that_quantizes(k: int, size: int, text: str) -> None:
    x = rows(3, k)
    x[1, 5] = NAN
    packed = hadamard.pack_hadamard(size, 0, device=DEVICE)
    scale = OPS.hadamard_quantize(x, packed, size, False, text)[1]
    assert scale.isnan().flatten().tolist() == [False, True, False]


def attended(op: Any, q: Tensor, k: Tensor, v: Tensor, formats: tuple[str, ...]) -> Tensor:
    none: list[list[float]] = [[]] * 6
    y: Tensor = op.quantized_attention(q, k, v, None, None, *none, 0.2, True, 0.0, *formats)
    return y


FORMATS = [("i8/tok", "i8/tok", "", ""), ("u8/tok", "i8/tok", "i8/tok", ""), ("", "i8/tok", "", "u8/tok"),
           ("i8/tok", "i8/tok", "", "f8e4m3"), ("f8e4m3/tok", "f8e4m3/tok", "", "")]  # fmt: skip


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_attention_gives_nan_where_the_reference_does(formats: tuple[str, ...], which: str) -> None:
    q, k, v = given = [rows(16, 32).reshape(1, 2, 8, 32) * scale for scale in (1, 0.5, 2)]
    assert attended(OPS, q, k, v, formats).isfinite().all()
    given["qkv".index(which)][0, 0, 3, 2] = NAN
    found, expected = (attended(op, q, k, v, formats).isnan().any(-1) for op in (OPS, REFERENCE))
    assert expected.any() and not expected.all()
    assert torch.equal(found, expected)


def test_weights_of_a_static_format_do_not_hide_nan() -> None:
    q, k, v = (rows(16, 32).reshape(1, 2, 8, 32) for _ in range(3))
    q[0, 1, 6, 0] = NAN
    found = attended(OPS, q, k, v, ("i8/tok", "i8/tok", "", "u8")).isnan().any(-1)
    assert found.nonzero().tolist() == [[0, 1, 6]]


CACHES: list[Any] = ["i4", "i3", {"k": "u4/g32/bf16", "v": "u4/tok"}, {"k": "i4/g32/e8m0", "v": "u4/tok"},
                     {"k": "i8/tok/bf16", "v": "i8/tok"}, {"k": "i8/tok/f16", "v": "f8e4m3/tok"}]  # fmt: skip


@pytest.mark.parametrize("kv", CACHES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_cache_reads_nan_where_the_reference_does(kv: Any, bad: float) -> None:
    fmt = cache_formats(kv, 1)[0]
    count = fmt.residual + 2 * max(fmt.step, 16)
    k, v = (rows(2 * (count + 1), 32).reshape(1, 2, count + 1, 32) * scale for scale in (1, 2))
    spec = spec_of(fmt, k[:, :, :0], v[:, :, :0], 512)
    k[0, 1, 5, 3], v[0, 1, 9, 4] = bad, bad

    def stored(ops: Any) -> list[Tensor]:
        memory, at = allocate(fmt, k[:, :, :0], v[:, :, :0], 512), torch.tensor(0, device=DEVICE)
        ops.cache_append(memory, k[:, :, :count], v[:, :, :count], at, spec)
        ops.cache_append(memory, k[:, :, count:], v[:, :, count:], at + count, spec)
        return [t.float() for t in REFERENCE.cache_read(memory, at + count + 1, spec)]

    for found, expected in zip(stored(OPS), stored(REFERENCE), strict=True):
        assert bad == INF or expected.isnan().any()  # the scale of i8/tok/f16 saturates
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found[found.isfinite()], expected[expected.isfinite()])
