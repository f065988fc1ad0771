"""gemm4: the reference's results, exactly where a channel has one scale."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import lower
from qfx.backends.triton.device import A100, H100, Device
from qfx.backends.triton.gemm4 import gemm4, pack_w4a8, reason_against
from qfx.backends.triton.gemm4_config import Problem, candidates, heuristic, shared
from qfx.backends.triton.quantize_rows import quantize_dynamic
from qfx.backends.triton.timing import relative_error
from qfx.format import Format
from qfx.ops import packed as ops
from qfx.packing import Packed, pack_weight
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import BF16_STEP, DEVICE, INTERPRETED
from tests.backends.triton.linears import linear_w4a8
from tests.graphs import capture

WHOLE = ("i4/ch", "u4/ch", "i2/ch", "u3/ch", "i5/ch", "u8/ch", "i4")
GROUPS = ("i4/g128", "u4/g128/f16", "u4/g64", "i4/g32", "i3/g256", "u2/g64", "i8/g64", "u8/g32", "u4/g96", "i4/b32x64",
          "i4/g128/e8m0", "i4/g64/e4m3", "i4/g64/dq")  # fmt: skip
INPUTS = ("i8/tok", "u8/tok", "i8", "u8", "i4/tok", "i8/dyn", "u4/tok/c90")
F32 = 1e-6  # sums of groups in f32


def inputs(
    m: int, n: int, k: int, w_format: str, x_format: str, seed: int
) -> tuple[Tensor, Packed, list[Tensor | None]]:
    """x, the weight, and what stands between them in the op: bias, x_scale, x_zero, smooth."""
    torch.manual_seed(seed)
    x, w = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    scale = zero = None
    fmt = Format.parse(x_format)
    if not fmt.dynamic:
        scale = torch.tensor(0.03, device=DEVICE)
        zero = torch.tensor(130, dtype=torch.uint8, device=DEVICE) if fmt.has_zero else None
    smooth = torch.rand(k, device=DEVICE) + 0.5 if seed % 2 else None
    return x, pack_weight(w, Format.parse(w_format)), [torch.randn(n, device=DEVICE), scale, zero, smooth]


def both(x: Tensor, packed: Packed, ends: list[Tensor | None], x_format: str) -> tuple[Tensor, Tensor]:
    """What the op and the reference give."""
    bias, scale, zero, smooth = ends
    w_format = str(packed.format)
    weight = pack_w4a8(packed.data, packed.scale, packed.zero, w_format, x.shape[-1])
    found = linear_w4a8(x, weight, bias, None, scale, zero, smooth, x_format, w_format, "")
    given_w = (packed.data, packed.scale, packed.zero)
    return found, ops.linear(x, *given_w, bias, scale, zero, smooth, x_format, w_format)


SHAPES = {"m": st.sampled_from([1, 2, 17, 40]) | st.integers(1, 70), "n": st.integers(1, 70), "k": st.integers(1, 600)}


@settings(max_examples=15, deadline=None)
@given(**SHAPES, w=st.sampled_from(WHOLE), x=st.sampled_from(INPUTS), seed=st.integers(0, 99))
def test_channels_are_exact(m: int, n: int, k: int, w: str, x: str, seed: int) -> None:
    found, expected = both(*inputs(m, n, k, w, x, seed), x)
    assert torch.equal(found, expected) if INTERPRETED else relative_error(found, expected) < F32


@settings(max_examples=15, deadline=None)
@given(**SHAPES, w=st.sampled_from(GROUPS), x=st.sampled_from(INPUTS), seed=st.integers(0, 99))
def test_groups_err_by_sums_of_floats_alone(m: int, n: int, k: int, w: str, x: str, seed: int) -> None:
    found, expected = both(*inputs(m, n, k, w, x, seed), x)
    assert float((found - expected).abs().max()) < F32 * 20 * max(float(expected.abs().max()), 1.0)
    assert relative_error(found, expected) < 5 * F32


@pytest.mark.slow
@pytest.mark.parametrize("m", [129, 300])
@pytest.mark.parametrize("w", ["u4/ch", "u4/g128", "i2/g32"])
def test_many_rows(m: int, w: str) -> None:
    found, expected = both(*inputs(m, 65, 700, w, "u8/tok", 1), "u8/tok")
    assert relative_error(found, expected) < F32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("w", ["u4/ch", "u4/g64"])
def test_other_dtypes_and_strides(dtype: torch.dtype, w: str) -> None:
    x, packed, ends = inputs(6, 33, 130, w, "i8/tok", 2)
    x = x.to(dtype).t().contiguous().t().reshape(2, 3, 130)
    found, expected = both(x, packed, ends, "i8/tok")
    assert found.dtype == dtype
    assert found.shape == (2, 3, 33)
    assert relative_error(found, expected) < (2 * BF16_STEP if dtype == torch.bfloat16 else 1e-5)


def test_a_wrong_scale_zero_point_or_code_is_seen() -> None:
    x, packed, ends = inputs(5, 20, 256, "u4/g64", "i8/tok", 3)
    weight = pack_w4a8(packed.data, packed.scale, packed.zero, "u4/g64", 256)
    expected = both(x, packed, ends, "i8/tok")[1]
    for i in (0, 1, 3):
        wrong = [part.clone() for part in weight]
        wrong[i].reshape(-1)[:40] = wrong[i].reshape(-1)[:40] * 2 + 1
        bias, scale, zero, smooth = ends
        found = linear_w4a8(x, wrong, bias, None, scale, zero, smooth, "i8/tok", "u4/g64", "")
        assert relative_error(found, expected) > 1e-3


def test_activation_and_residual() -> None:
    x, packed, (bias, *_) = inputs(5, 20, 256, "u4/g64", "i8/tok", 4)
    weight = pack_w4a8(packed.data, packed.scale, packed.zero, "u4/g64", 256)
    residual = torch.randn(5, 20, device=DEVICE)
    found = linear_w4a8(x, weight, bias, residual, None, None, None, "i8/tok", "u4/g64", "silu")
    plain = ops.linear(x, packed.data, packed.scale, packed.zero, bias, None, None, None, "i8/tok", "u4/g64")
    assert relative_error(found, torch.nn.functional.silu(plain) + residual) < 5 * F32


def test_codes_of_a_producer_with_any_row_width_and_no_rows() -> None:
    x, packed, _ = inputs(3, 20, 200, "i4/g64", "i8/tok", 6)
    weight = pack_w4a8(packed.data, packed.scale, packed.zero, "i4/g64", 200)
    codes, scale, _ = quantize_dynamic(x, None, "i8/tok")
    run = partial(gemm4, x_format="i8/tok", w_format="i4/g64", k=200, activation="", dtype="f32")
    expected = run(codes, scale, None, weight, None, None)
    assert torch.equal(run(codes[:, :200].contiguous(), scale, None, weight, None, None), expected)
    assert run(codes[:0], scale[:0], None, weight, None, None).shape == (0, 20)


def test_weights_of_4_bits_take_half_a_byte() -> None:
    packed = pack_weight(torch.randn(8, 512), Format.parse("i4/ch"))
    data = pack_w4a8(packed.data, packed.scale, packed.zero, "i4/ch", 512)[0]
    assert data.shape == (8, 256)
    assert data.dtype == torch.uint8


def test_refusals() -> None:
    assert reason_against("i8/tok", "i4/g128") is None
    reasons = {
        ("", "i4/ch"): "the activation is not quantized",
        ("i8/tok", "nf4/g64"): "'i8/tok' and 'nf4/g64': activations are integers",
        ("f8e4m3/tok", "i4/ch"): "'f8e4m3/tok' and 'i4/ch': activations are integers",
        ("i8/tok", "i4/g48"): "'i4/g48': groups are whole multiples of 32 columns",
    }
    for (x_format, w_format), reason in reasons.items():
        assert str(reason_against(x_format, w_format)).startswith(reason)
    assert "pass 32 bits" in str(reason_against("i8/tok", "i4/ch", 1 << 17))
    assert reason_against("i8/tok", "i4/g128", 1 << 17) is None
    assert reason_against("u8/tok", "u8/ch", 33025) is None
    assert "pass 32 bits" in str(reason_against("u8/tok", "u8/ch", 33026))
    assert reason_against("u8/tok", "u4/ch", 100_000) is None
    x, packed, _ = inputs(3, 20, 256, "i4/g64", "i8/tok", 0)
    weight = pack_w4a8(packed.data, packed.scale, packed.zero, "i4/g64", 256)
    run = partial(linear_w4a8, bias=None, residual=None, x_scale=None, x_zero=None, smooth=None, activation="")
    with pytest.raises(ValueError, match="the weight is not packed as 'i8/g64' for k=256"):
        run(x, weight, x_format="i8/tok", w_format="i8/g64")
    with pytest.raises(ValueError, match="unknown activation"):
        linear_w4a8(x, weight, None, None, None, None, None, "i8/tok", "i4/g64", "tanh")
    with pytest.raises(ValueError, match="the bias does not fit"):
        linear_w4a8(x, weight, x[0], None, None, None, None, "i8/tok", "i4/g64", "")
    with pytest.raises(ValueError, match="there is no kernel: 'i4/g48'"):
        run(x, weight, x_format="i8/tok", w_format="i4/g48")


@pytest.mark.parametrize("device", [A100, H100])
@pytest.mark.parametrize("m", [1, 33, 64, 500, 4096])
def test_configurations_fit_the_device(device: Device, m: int) -> None:
    for n, k in ((4096, 4096), (11008, 4096), (4096, 14336), (33, 100)):
        for bits, group, affine in ((4, 0, False), (4, 128, True), (4, 32, True), (2, 64, False), (8, 64, True)):
            problem = Problem(n, k, bits, min(group or 128, 128), group, affine)
            found = candidates(device, problem, m)
            assert 0 < len(found) <= 20
            assert found[0] == heuristic(device, problem, m)
            assert all(shared(problem, config) <= device.shared for config in found)


@pytest.mark.parametrize(
    ("w", "kernel"),
    [("i4/g32", "gemm4"), ("u4/ch", "gemm4"), ("i8/g32", "gemm4"), ("i8/ch", "gemm8"), ("i6/ch", "gemm8")],
)
def test_which_weights_are_lowered_to_it(w: str, kernel: str) -> None:
    x = torch.randn(3, 40, device=DEVICE)
    gm = capture(torch.nn.Linear(40, 24, device=DEVICE), x)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse({"rules": [{"target": "linear", "w": w, "x": "i8/tok"}]}))
    lowered = lower(gm)
    assert lowered.kernels["linear"] == f"{kernel} i8/tok x {w} (Triton)"
    with torch.no_grad():
        assert relative_error(lowered(x)[0], gm(x)[0]) < 5 * F32


def test_sums_that_32_bits_do_not_hold_are_left_to_products_of_floats() -> None:
    """Codes of 0 to 255 times such codes, all of them the greatest: the sum over 40,000 was negative."""
    x, layer = torch.ones(1, 40000, device=DEVICE), torch.nn.Linear(40000, 2, bias=False, device=DEVICE)
    torch.nn.init.ones_(layer.weight)
    gm = capture(layer, x)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse({"rules": [{"target": "linear", "w": "u8/ch", "x": "u8/tok"}]}))
    lowered = lower(gm)
    assert "rounded to u8/tok (torch)" in lowered.kernels["linear"]
    assert any("sums over 40000 products" in note.reason for note in lowered.notes)
    with torch.no_grad():
        assert relative_error(lowered(x)[0], gm(x)[0]) < 5 * F32
