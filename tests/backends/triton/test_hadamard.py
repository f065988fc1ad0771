"""hadamard: the rotations of qfx::hadamard, and codes of their rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.backends.triton.device import H100
from qfx.backends.triton.hadamard import candidates, hadamard, hadamard_quantize, layout, pack_hadamard, reason_against
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.timing import relative_error
from qfx.format import Format
from qfx.numerics import dequantize, quantize, run_time_qparams
from qfx.rewrites import rotation
from tests.backends.triton.cases import BF16_STEP, DEVICE, meta

DTYPES = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 2 * BF16_STEP}
# one matrix, two with what is inside and outside, a large factor, factors of several kinds, random ones
SIZES = (2, 12, 20, 64, 96, 128, 172, 256, 512, 1536, 2560, 4096)


@settings(max_examples=14, deadline=None)
@given(
    m=st.integers(1, 9), blocks=st.integers(1, 3), size=st.sampled_from(SIZES), seed=st.integers(0, 9),
    dtype=st.sampled_from(list(DTYPES)), inverse=st.booleans(),
)  # fmt: skip
def test_rotates_as_the_reference(m: int, blocks: int, size: int, seed: int, dtype: torch.dtype, inverse: bool) -> None:
    torch.manual_seed(seed)
    x = torch.randn(m, blocks * size, device=DEVICE).to(dtype)
    packed = pack_hadamard(size, seed, inverse=inverse, device=DEVICE)
    found = torch.ops.qfx_triton.hadamard(x, packed, size, inverse)
    assert found.dtype == dtype
    assert relative_error(found, rotation.rotate(x.cpu(), size, seed, inverse=inverse).to(DEVICE)) < DTYPES[dtype]


@pytest.mark.parametrize("size", [688, 1024, 5120, 13824])
def test_sizes_of_real_models(size: int) -> None:
    x = torch.randn(2, size, device=DEVICE)
    found = hadamard(x, pack_hadamard(size, 1, device=DEVICE), size, False)
    assert relative_error(found, rotation.rotate(x.cpu(), size, 1).to(DEVICE)) < 2e-6


def test_another_seed_and_the_wrong_direction_are_seen() -> None:
    x = torch.randn(2, 128, device=DEVICE)
    expected = rotation.rotate(x.cpu(), 128, 1).to(DEVICE)
    assert relative_error(hadamard(x, pack_hadamard(128, 2, device=DEVICE), 128, False), expected) > 0.5
    assert relative_error(hadamard(x, pack_hadamard(128, 1, inverse=True, device=DEVICE), 128, True), expected) > 0.5


def test_rotating_back_gives_the_input_whatever_its_strides() -> None:
    x = torch.randn(3, 512, 4, device=DEVICE).transpose(1, 2)
    there = hadamard(x, pack_hadamard(512, 3, device=DEVICE), 512, False)
    back = hadamard(there, pack_hadamard(512, 3, inverse=True, device=DEVICE), 512, True)
    assert there.shape == x.shape
    assert there.is_contiguous()
    assert relative_error(back, x) < 1e-5
    assert hadamard(x[:0], pack_hadamard(512, 3, device=DEVICE), 512, False).shape == (0, 4, 512)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("quantize_too", [False, True])
def test_heads_are_read_where_they_lie(order: tuple[int, ...], quantize_too: bool) -> None:
    x = torch.randn(2, 3, 64, 64, device=DEVICE)[:, :, :32, :].permute(order)
    x = x[..., :32] if order[-1] == 3 else x
    packed = pack_hadamard(32, 1, device=DEVICE)
    expected = rotation.rotate(x.cpu(), 32, 1).to(DEVICE)
    if quantize_too:
        codes, scale, _ = hadamard_quantize(x, packed, 32, False, "i8/tok")
        assert relative_error(codes * scale, expected) < 0.02
    else:
        assert relative_error(hadamard(x, packed, 32, False), expected) < 2e-6


@pytest.mark.parametrize(
    ("size", "blocks", "fmt"),
    [
        pytest.param(*shape, fmt, marks=pytest.mark.slow if (shape[0], fmt[0]) in ((512, "i"), (1024, "f")) else [])
        for shape in ((128, 3), (512, 1), (96, 2), (1024, 2))
        for fmt in ("i8/tok", "f8e4m3/tok")
    ],
)
def test_codes_are_those_of_the_rounded_result(fmt: str, size: int, blocks: int) -> None:
    x = torch.randn(19, size * blocks, device=DEVICE).to(torch.float16)
    packed = pack_hadamard(size, 4, device=DEVICE)
    codes, scale, _ = torch.ops.qfx_triton.hadamard_quantize(x, packed, size, False, fmt)
    y = hadamard(x, packed, size, False)
    parsed = Format.parse(fmt)
    assert torch.equal(scale, run_time_qparams(y, parsed).scale)
    expected = quantize(y, parsed, scale)
    assert torch.equal(codes.float(), expected.float())
    assert relative_error(dequantize(codes, parsed, scale), y) < (0.02 if fmt == "i8/tok" else 0.04)


def test_rows_of_zeros_have_the_scale_1() -> None:
    x = torch.zeros(2, 512, dtype=torch.float16, device=DEVICE)
    codes, scale, _ = hadamard_quantize(x, pack_hadamard(512, 0, device=DEVICE), 512, False, "i8/tok")
    assert not codes.any()
    assert scale.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", range(2, 600, 7))
def test_every_size_has_a_layout(size: int) -> None:
    shape = layout(size)
    assert shape.a * shape.b == size
    assert shape.a == shape.outer * shape.high
    assert shape.a <= 128


def test_one_launch_gives_codes_where_the_matrix_fits_a_program() -> None:
    for size, launches in ((4096, 1), (11008, 2)):
        shape = layout(size)
        packed = [meta(n, n, dtype=torch.int8) for n in (shape.a, shape.b)] + [meta(size, dtype=torch.int8)]
        with recorded(H100) as found:
            hadamard_quantize(meta(4, size), packed, size, False, "i8/tok")
        assert len(found) == launches


@pytest.mark.parametrize("size", [64, 172, 4096])
def test_the_default_device_of_torch_does_not_matter(size: int) -> None:
    with torch.device("meta"):
        found = pack_hadamard(size, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, pack_hadamard(size, 0), strict=True))


def test_refusals() -> None:
    packed = pack_hadamard(64, 0, device=DEVICE)
    with pytest.raises(ValueError, match="blocks of 64"):
        hadamard(torch.randn(2, 96, device=DEVICE), packed, 64, False)
    with pytest.raises(ValueError, match=r"matrices of pack_hadamard\(128"):
        hadamard(torch.randn(2, 128, device=DEVICE), packed, 128, False)
    with pytest.raises(ValueError, match="float64"):
        hadamard(torch.randn(2, 64, dtype=torch.float64, device=DEVICE), packed, 64, False)
    assert reason_against(torch.float64) == "it rotates f16, bf16 and f32, not float64"
    assert reason_against(torch.bfloat16) is None
    assert 0 < len(candidates(128)) <= 20
