"""grouped_gemm: the reference's results for codes of rows of any experts; integers per channel bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.device import A100, H100
from qfx.backends.triton.experts_gemm import grouped_gemm, pack_grouped, reason_against
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.quantize_rows import quantize_dynamic
from qfx.format import Format
from qfx.ops import floats as float_ops
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import DEVICE, meta
from tests.backends.triton.test_experts import ends, weight

EXACT = (("i8/tok", "i8/ch"), ("u8/tok", "u8/ch"), ("u8/dyn", "i4/ch"), ("i8/tok", "u3/ch"), ("i8/dyn", "i8"))
PAIRS = (
    *EXACT,
    *(("u8/tok", "u4/g32"), ("i8/tok", "i4/g64"), ("i4/tok", "u4/g128"), ("u8/tok", "u8/g32"), ("i8/dyn", "u2/g32")),
    *(("f8e4m3/tok", "f8e4m3/ch"), ("f8e4m3/dyn", "f8e4m3"), ("f8e4m3/g128/dyn", "f8e4m3/b128x128")),
    *(("f8e4m3/tok", "f8e4m3/g64"), ("f8e4m3/g32/dyn", "f8e4m3/ch")),
)


def run(x: Tensor, packed: Packed, offs: Tensor, x_format: str) -> Tensor:
    k = x.shape[1]
    w, text = pack_grouped(packed.data, packed.scale, packed.zero, str(packed.format), k)
    dtype = {torch.float16: "f16", torch.float32: "f32"}[x.dtype]
    found = torch.ops.qfx_triton.grouped_gemm(*quantize_dynamic(x, None, x_format), w, offs, x_format, text, k, dtype)
    assert isinstance(found, Tensor)
    return found


def error(x: Tensor, packed: Packed, offs: Tensor, x_format: str) -> float:
    """The greatest difference to the reference, against the sum of |x w| + |y|."""
    args = (packed.data, packed.scale, packed.zero, offs, x_format, str(packed.format))
    due = float_ops.grouped_linear_quant(x, *args)
    got = run(x, packed, offs, x_format)
    assert got.dtype == x.dtype and got.shape == due.shape
    last = int(offs[-1])
    assert got[last:].eq(0).all(), "rows after the last end"
    if not last:
        return 0.0
    size = float_ops.grouped_linear(x.float().abs(), packed.dequantize().abs(), offs)[:last] + due[:last].float().abs()
    return float(((got.float() - due.float())[:last].abs() / size.clamp(min=1e-30)).max())


@pytest.mark.parametrize(("x_format", "w_format"), PAIRS)
def test_every_pair(x_format: str, w_format: str) -> None:
    torch.manual_seed(1)
    packed = weight(3, 7, 300, w_format)
    for counts, rest in (([0, 2, 1], 0), ([5, 0, 70], 2)):
        x = torch.randn(sum(counts) + rest, 300, device=DEVICE) + 0.2
        assert error(x, packed, ends(counts), x_format) <= (0 if (x_format, w_format) in EXACT else 2.0**-19)


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.just(0) | st.integers(0, 6) | st.integers(0, 60), min_size=1, max_size=5),
    rest=st.just(0) | st.integers(1, 5), n=st.integers(1, 40), k=st.integers(1, 300), pair=st.sampled_from(PAIRS),
    half=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_shape(
    counts: list[int], rest: int, n: int, k: int, pair: tuple[str, str], half: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = weight(len(counts), n, k, pair[1])
    x = torch.randn(sum(counts) + rest, k, device=DEVICE) + 0.2
    x = x.half() if half else x
    assert error(x, packed, ends(counts), pair[0]) <= (2.0**-10 if half else 2.0**-18)


def test_rows_after_the_last_end_are_zero_whatever_they_hold() -> None:
    for x_format, w_format in (("u8/tok", "u8/ch"), ("u8/tok", "u4/g32"), ("f8e4m3/tok", "f8e4m3/ch")):
        packed, x = weight(2, 9, 64, w_format), torch.randn(40, 64, device=DEVICE)
        x[36:] = 1e30
        for counts in ([1, 0], [20, 16]):
            found = run(x, packed, ends(counts), x_format)
            assert found[: sum(counts)].isfinite().all() and found[sum(counts) :].eq(0).all()


def test_a_wrong_expert_or_scale_shows() -> None:
    torch.manual_seed(0)
    x, offs = torch.randn(9, 64, device=DEVICE), ends([3, 3, 3])
    for x_format, w_format in (("u8/tok", "u4/g32"), ("f8e4m3/tok", "f8e4m3/ch")):
        packed = weight(3, 8, 64, w_format)
        due = run(x, packed, offs, x_format)
        assert (run(x, packed, ends([2, 4, 3]), x_format) - due)[2].abs().min() > 1e-3
        scale = packed.scale.clone()
        scale[1, 5] *= 2
        other = Packed(packed.data, scale, packed.zero, packed.format, packed.shape)
        off = (run(x, other, offs, x_format) - due).abs() > 1e-3
        assert off[3:6, 5].all() and int(off.sum()) == 3


@pytest.mark.parametrize("t", [1, 4, 400])
@pytest.mark.parametrize(("x_format", "w_format"), [("u8/tok", "i8/ch"), ("f8e4m3/tok", "f8e4m3/ch")])
def test_the_host_reads_no_value(x_format: str, w_format: str, t: int) -> None:
    fmt, floats = Format.parse(w_format), "f8" in w_format
    codes = meta(4, 8, 64, dtype=fmt.code_dtype)
    w, text = pack_grouped(codes, meta(4, 8, 1, dtype=torch.float32), None, w_format, 64)
    x = meta(t, 64, dtype=fmt.code_dtype), meta(t, 1, dtype=torch.float32)
    zero = None if floats else meta(t, 1, dtype=torch.uint8)
    for device in (A100, H100):
        with recorded(device) as launches:
            grouped_gemm(*x, zero, w, meta(4, dtype=torch.int32), x_format, text, 64, "f16")
        assert len(launches) == 1


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_weight(torch.randn(2, 9, 64, device=DEVICE), Format.parse("i4/g32"))
    w, text = pack_grouped(packed.data, packed.scale, packed.zero, "i4/g32", 64)
    codes, scale, _ = quantize_dynamic(torch.randn(3, 64, device=DEVICE), None, "i8/tok")
    offs = ends([1, 2])
    with pytest.raises(ValueError, match="codes do not fit the weight"):
        grouped_gemm(codes.float(), scale, None, w, offs, "i8/tok", text, 64, "f32")
    with pytest.raises(ValueError, match=r"(?s)where the rows of each expert end.*integers \[2\]"):
        grouped_gemm(codes, scale, None, w, ends([1, 1, 1]), "i8/tok", text, 64, "f32")
    with pytest.raises(ValueError, match="scales or zero points do not fit"):
        grouped_gemm(codes, scale[:2], None, w, offs, "i8/tok", text, 64, "f32")
    with pytest.raises(ValueError, match="not packed as"):
        grouped_gemm(codes, scale, None, w[:2], offs, "i8/tok", text, 64, "f32")
    with pytest.raises(ValueError, match="found at run time"):
        grouped_gemm(codes, scale, None, w, offs, "i8", text, 64, "f32")
    assert "whole multiples of 32" in str(reason_against("i8/tok", "u4/g16"))
    assert "both f8e4m3" in str(reason_against("i8/tok", "f8e4m3/ch"))
    assert reason_against("i8/tok", "i4/g96") is None
    empty = quantize_dynamic(torch.randn(0, 64, device=DEVICE), None, "i8/tok")
    assert grouped_gemm(*empty[:2], None, w, ends([0, 0]), "i8/tok", text, 64, "f32").shape == (0, 9)
