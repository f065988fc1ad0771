"""Packed bytes hold exactly the codes, in the documented order, in the documented number of bytes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import TYPES, Format
from qfx.numerics import choose_qparams, dequantize, fake_quantize, quantize
from qfx.packing import (
    Packed,
    check_storage,
    pack_bits,
    pack_codes,
    pack_weight,
    pack_zeros,
    unpack_bits,
    unpack_codes,
    unpack_zeros,
)

F = Format.parse
PLAIN = ["f16", "bf16", "f32"]
SCALED = [t for t in TYPES if t not in PLAIN]
NARROW = [t for t in SCALED if Format(t).bits < 8]


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def bitstream(codes: list[int], bits: int) -> list[int]:
    """The layout said in one line: element i holds bits i * bits and up of one long little-endian number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


# ---- bits


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_pack_bits_is_the_little_endian_bitstream(bits: int, values: list[int]) -> None:
    codes = [value % 2**bits for value in values]
    assert pack_bits(torch.tensor(codes), bits).tolist() == bitstream(codes, bits)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 4), st.integers(0, 1000))
def test_unpack_bits_undoes_pack_bits(bits: int, count: int, rows: int, seed: int) -> None:
    codes = random_codes((rows, 2, count), bits, seed)
    data = pack_bits(codes, bits)
    assert data.shape == (rows, 2, math.ceil(count * bits / 8))
    assert data.dtype == torch.uint8
    assert torch.equal(unpack_bits(data, bits, count), codes)


def test_golden_bytes() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5]), 4).tolist() == [0x21, 0x43, 0x05]
    assert pack_bits(torch.tensor([3, 0, 1, 2, 3]), 2).tolist() == [0b10_01_00_11, 0b11]
    assert pack_bits(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert pack_bits(torch.tensor([7, 7, 7]), 3).tolist() == [0xFF, 0x01]
    assert pack_bits(torch.tensor([63, 1]), 6).tolist() == [0b01_111111, 0]


def test_no_bytes_for_no_elements() -> None:
    for bits in range(2, 9):
        assert pack_bits(torch.empty(3, 0, dtype=torch.uint8), bits).shape == (3, 0)
        assert unpack_bits(torch.empty(3, 0, dtype=torch.uint8), bits, 0).shape == (3, 0)


def test_packing_takes_views() -> None:
    codes = random_codes((6, 20), 3).t()
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 6), codes)


def test_unpack_bits_checks_its_caller() -> None:
    with pytest.raises(AssertionError):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 4, 9)
    with pytest.raises(AssertionError):
        pack_bits(torch.zeros(4), 9)


# ---- codes


@pytest.mark.parametrize("kind", [*SCALED, *PLAIN])
@pytest.mark.parametrize("granularity", ["", "/ch", "/g4", "/b2x4"])
@pytest.mark.parametrize("k", [1, 7, 8, 33])
def test_codes_survive(kind: str, granularity: str, k: int) -> None:
    fmt = F(kind if kind in PLAIN else kind + granularity)
    w = torch.randn(2, 5, k)
    params = (None, None) if fmt.is_plain else choose_qparams(w, fmt)
    codes = quantize(w, fmt, *params)
    data = pack_codes(codes, fmt, params[1])
    assert data.shape[:-1] == codes.shape[:-1]
    assert data.shape[-1] * data.element_size() == fmt.row_bytes(k)
    back = unpack_codes(data, fmt, k)
    assert (back.dtype, back.shape) == (fmt.code_dtype, w.shape)
    assert torch.equal(back.float(), codes.float())


def test_signed_codes_are_stored_with_an_offset() -> None:
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert pack_codes(codes, F("i4")).tolist() == [[0xF0, 0x78]]
    assert pack_codes(torch.tensor([[-2, 1, 0, -1]], dtype=torch.int8), F("i2")).tolist() == [[0b01_10_11_00]]


def test_eight_bits_are_stored_as_they_are() -> None:
    codes = torch.tensor([[-127, 0, 127]], dtype=torch.int8)
    assert torch.equal(pack_codes(codes, F("i8/g2")), codes)
    codes = torch.tensor([[448.0, -1.0]]).to(torch.float8_e4m3fn)
    assert pack_codes(codes, F("f8e4m3")).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("granularity", ["/g8", "/b2x8"])
def test_padding_decodes_to_zero(kind: str, granularity: str) -> None:
    fmt = F(kind + granularity)
    w = torch.randn(5, 11) + 1.0
    packed = pack_weight(w, fmt)
    padded = unpack_bits(packed.data, fmt.bits, 16)
    if fmt.is_integer and fmt.symmetric:
        padded = padded.to(torch.int8) - 2 ** (fmt.bits - 1)
    values = dequantize(padded.to(fmt.code_dtype), fmt, *packed.params())
    assert (values[:, 11:] == 0).all()
    assert torch.equal(values[:, :11], packed.dequantize())


# ---- Packed


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("granularity", ["", "/ch", "/g4", "/g32", "/b2x4"])
def test_packed_weight_is_the_fake_quantized_weight(kind: str, granularity: str) -> None:
    w = torch.randn(3, 6, 21)
    for scale_type in ["", "/f16", "/e8m0", *([] if kind[0] == "u" else ["/e4m3"])]:
        fmt = F(kind + granularity + scale_type)
        packed = pack_weight(w, fmt)
        assert packed.shape == (3, 6, 21)
        assert packed.scale.dtype == fmt.scale_dtype
        assert torch.equal(packed.dequantize(), fake_quantize(w, fmt))
        assert packed.nbytes == fmt.nbytes(w.shape)


@settings(deadline=None)
@given(
    st.sampled_from([*SCALED, *PLAIN]),
    st.sampled_from(["", "/ch", "/g3", "/g16", "/b3x5"]),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
)
def test_nbytes_are_true_bytes(kind: str, granularity: str, shape: list[int]) -> None:
    fmt = F(kind if kind in PLAIN else kind + granularity)
    assert pack_weight(torch.randn(shape), fmt).nbytes == fmt.nbytes(shape)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_weights(kind: str) -> None:
    w = torch.randn(4, 6)
    packed = pack_weight(w, F(kind))
    assert packed.data.dtype == F(kind).code_dtype
    assert (packed.scale.item(), packed.zero) == (1.0, None)
    assert torch.equal(packed.dequantize(), w.to(packed.data.dtype).float())


def test_tensors_and_rebuild() -> None:
    w = torch.randn(4, 32)
    assert set(pack_weight(w, F("i4/g8")).tensors()) == {"data", "scale"}
    for text in ("u4/g8", "f4e2m1/g16/e4m3"):
        packed = pack_weight(w, F(text))
        named = packed.tensors()
        assert set(named) == {"data", "scale", "zero"}
        again = Packed(named["data"], named["scale"], named["zero"], F(text), (4, 32))
        assert torch.equal(again.dequantize(), packed.dequantize())


def test_dequantize_dtype() -> None:
    packed = pack_weight(torch.randn(4, 8), F("i4/g4"))
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(packed.dequantize(torch.float16), packed.dequantize().half())
    assert packed.codes().dtype == torch.int8


def test_from_codes_takes_rounding_from_elsewhere() -> None:
    fmt = F("u3/g4")
    codes = random_codes((5, 10), 3)
    scale, zero = torch.rand(5, 3) + 0.1, random_codes((5, 3), 3, seed=1)
    packed = Packed.from_codes(codes, fmt, scale, zero)
    assert torch.equal(packed.codes(), codes)
    spread_scale = scale.repeat_interleave(4, -1)[:, :10]
    spread_zero = zero.repeat_interleave(4, -1)[:, :10]
    expected = (codes.float() - spread_zero.float()) * spread_scale
    assert torch.equal(packed.dequantize(), expected)


def test_from_codes_refuses_a_scale_that_does_not_fit() -> None:
    codes = torch.zeros(5, 10, dtype=torch.int8)
    with pytest.raises(ValueError, match="the scale does not fit codes of shape") as caught:
        Packed.from_codes(codes, F("i4/g4"), torch.ones(5, 2))
    assert "expected: shape [5, 3]" in str(caught.value)
    assert "found: shape [5, 2]" in str(caught.value)


def test_packed_is_frozen_and_compares_by_identity() -> None:
    packed = pack_weight(torch.randn(2, 4), F("i8/ch"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.zero = None  # type: ignore[misc]
    assert packed == packed  # noqa: PLR0124
    assert packed != pack_weight(torch.randn(2, 4), F("i8/ch"))


def test_parameters_need_no_detach() -> None:
    packed = pack_weight(torch.nn.Parameter(torch.randn(4, 8)), F("i4/g4"))
    assert not any(tensor.requires_grad for tensor in packed.tensors().values())


def test_experts_are_packed_one_by_one() -> None:
    w = torch.randn(3, 5, 12)
    whole = pack_weight(w, F("u4/g8"))
    for i in range(3):
        one = pack_weight(w[i], F("u4/g8"))
        assert whole.zero is not None and one.zero is not None
        assert torch.equal(whole.data[i], one.data)
        assert torch.equal(whole.scale[i], one.scale)
        assert torch.equal(whole.zero[i], one.zero)


# ---- zero points


@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 3), st.integers(0, 1000))
def test_zero_points_take_their_own_bits(bits: int, groups: int, rows: int, seed: int) -> None:
    fmt, zero = F(f"u{bits}/g4"), random_codes((2, rows, groups), bits, seed)
    scale = torch.ones(2, rows, groups)
    stored = pack_zeros(zero, fmt)
    assert stored is not None and stored.dtype == torch.uint8
    assert stored.shape == (2, rows, math.ceil(groups * bits / 8))
    found = unpack_zeros(stored, fmt, scale)
    assert found is not None and torch.equal(found, zero)


def test_golden_zero_points() -> None:
    zero = torch.tensor([[1, 2, 3, 0, 3]], dtype=torch.uint8)
    stored = pack_zeros(zero, F("u2/g8"))
    assert stored is not None and stored.tolist() == [[0b00_11_10_01, 0b11]]


@given(st.integers(2, 8), st.integers(1, 9))
def test_a_byte_for_each_is_read_too(bits: int, groups: int) -> None:
    """As earlier versions stored them, also where the dense form is as wide."""
    fmt, zero = F(f"u{bits}/g4"), random_codes((3, groups), bits)
    assert unpack_zeros(zero, fmt, torch.ones(3, groups)) is zero


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("u4/ch", torch.tensor([[3], [15]], dtype=torch.uint8)),
        ("u4", torch.tensor(7, dtype=torch.uint8)),
        ("u8/g4", torch.full((2, 5), 200, dtype=torch.uint8)),
        ("u7/g4", torch.full((2, 3), 100, dtype=torch.uint8)),  # 21 bits need three bytes all the same
        ("i4/g16/e4m3", torch.tensor(0.5)),
        ("nf4/g64/dq", torch.rand(3)),
        ("i4/g4", None),
    ],
)
def test_what_saves_no_byte_stays(text: str, held: Tensor | None) -> None:
    assert pack_zeros(held, F(text)) is held
    scale = torch.ones(2, 5) if held is None or held.is_floating_point() else torch.ones(held.shape)
    assert unpack_zeros(held, F(text), scale) is held


@pytest.mark.parametrize("stored", [torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 3), torch.zeros(2, 3).byte()])
def test_zero_points_that_do_not_fit_are_refused(stored: Tensor) -> None:
    with pytest.raises(ValueError, match="zero points do not fit format 'u4/g8'") as caught:
        unpack_zeros(stored, F("u4/g8"), torch.ones(3, 6))
    assert "expected: uint8, rows of 3 bytes for scales of shape [3, 6]" in str(caught.value)


@pytest.mark.parametrize("text", ["u2/g8", "u3/g4/f16", "u4/b2x8", "u5/g4", "u6/ch", "u7/g4", "u4", "u8/g8"])
@pytest.mark.parametrize("shape", [(5, 40), (2, 5, 33)])
def test_a_weight_comes_back_over_packed_zero_points(text: str, shape: tuple[int, ...]) -> None:
    w, fmt = torch.randn(shape) + 0.5, F(text)
    packed = pack_weight(w, fmt)
    scale, zero = choose_qparams(w, fmt)
    assert zero is not None and packed.zero is not None and torch.equal(packed.params()[1], zero)  # type: ignore[arg-type]
    assert torch.equal(packed.dequantize(), fake_quantize(w, fmt, scale, zero))
    assert packed.nbytes == fmt.nbytes(shape)


def test_packed_zero_points_are_no_numbers() -> None:
    """Negative control: one byte a row would broadcast over the groups of it."""
    packed = pack_weight(torch.randn(5, 16) + 1, F("u2/g8"))
    assert packed.zero is not None and packed.zero.shape == (5, 1)
    with pytest.raises(AssertionError, match="zero points of"):
        dequantize(packed.codes(), packed.format, packed.scale, packed.zero)


# ---- refusals


@pytest.mark.parametrize("text", ["i8/tok", "i8/dyn", "i4/g32/dyn", "i8/head"])
def test_weights_refuse_formats_of_activations(text: str) -> None:
    with pytest.raises(ValueError, match=f"format '{text}' cannot store the weight 'fc.weight'") as caught:
        pack_weight(torch.randn(2, 4, 8), F(text), name="fc.weight")
    assert "next step: write" in str(caught.value)


@pytest.mark.parametrize("text", ["i8/ch", "i4/g4", "f4e2m1/g16/e4m3", "bf16", "f32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_refused(text: str, bad: float) -> None:
    w = torch.randn(3, 16)
    w[0, 0] = bad
    with pytest.raises(ValueError, match=r"cannot quantize 'fc\.weight'"):
        pack_weight(w, F(text), name="fc.weight")


@pytest.mark.parametrize(
    ("text", "data", "last_dim"),
    [
        ("i4/g4", torch.zeros(3, 4, dtype=torch.uint8), 9),
        ("i4/g4", torch.zeros(3, 4, dtype=torch.int8), 8),
        ("i8/ch", torch.zeros(3, 4, dtype=torch.uint8), 4),
        ("i8/ch", torch.zeros(3, 4, dtype=torch.int8), 5),
        ("f32", torch.zeros(3, 4, dtype=torch.float16), 4),
    ],
)
def test_data_that_does_not_fit_is_refused(text: str, data: Tensor, last_dim: int) -> None:
    with pytest.raises(ValueError, match=f"packed data does not fit format '{text}'"):
        unpack_codes(data, F(text), last_dim)


def test_the_refusal_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected: torch\.uint8, rows of 6 for 9 elements"):
        check_storage(torch.zeros(3, 4, dtype=torch.uint8), F("i4/g4"), 9)


@pytest.mark.parametrize("text", ["i8/ch", "u4/g8", "u3/g16", "nf4/g8", "f4e2m1/g32/e8m0", "f8e4m3/ch", "f16"])
@pytest.mark.parametrize("shape", [(9, 20), (3, 9, 20)], ids=str)
def test_rows_of_a_packed_weight(text: str, shape: tuple[int, ...]) -> None:
    packed = pack_weight(torch.randn(*shape), Format.parse(text))
    for rows in (slice(2, 5), slice(None, None, 4), slice(7, 40)):
        part = packed.part(rows)
        assert part.shape == (*shape[:-2], len(range(9)[rows]), 20)
        assert torch.equal(part.dequantize(), packed.dequantize()[..., rows, :])
    assert packed.part(slice(2, 5)).data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()


@pytest.mark.parametrize("text", ["i8", "i4/b4x8", "f4e2m1/g16/e4m3"])
def test_rows_that_share_their_scales_are_not_taken_apart(text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        pack_weight(torch.randn(8, 16), Format.parse(text)).part(slice(0, 4))
