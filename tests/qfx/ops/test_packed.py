"""The ops against plain arithmetic: exact in integers, right in every combination."""

from __future__ import annotations

import gc
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qfx.ops.packed
from qfx.format import Format
from qfx.numerics import choose_qparams, dequantize, fake_quantize, quantize, run_time_qparams
from qfx.packing import Packed, pack_weight, unpack_codes

F = Format.parse
WEIGHTS = ["i8", "i8/ch", "u8/ch", "i4/g8", "u4/g8/f16", "i3/ch", "u2/ch", "nf4/g8", "f8e4m3/ch", "f4e2m1/g8/e8m0"]
WEIGHTS += ["f4e2m1/g16/e4m3", "f8e5m2/b4x8", "i5/b4x8", "bf16", "f32"]
DYNAMIC = [
    "i8/tok",
    "u8/tok",
    "i8/dyn",
    "u8/dyn",
    "i4/tok",
    "i4/tok/c90",
    "u4/tok/c85",
    "i8/dyn/c60",
    "f8e4m3/tok",
    "f8e5m2/dyn",
    "i8/g8/dyn",
    "i8/ch/dyn",
    "f16",
]


def linear(x: Tensor, packed: Packed, x_format: str = "", **kwargs: Tensor) -> Tensor:
    optional = [kwargs.pop(name, None) for name in ("bias", "x_scale", "x_zero", "smooth")]
    assert not kwargs
    y: Tensor = torch.ops.qfx.linear(x, packed.data, packed.scale, packed.zero, *optional, x_format, str(packed.format))
    return y


def weight(text: str, n: int = 6, k: int = 20, seed: int = 0) -> Packed:
    return pack_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), F(text))


def integer_sums(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.int64) @ b.to(torch.int64).t()


# ---- linear, weight-only and general


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only(text: str, dtype: torch.dtype) -> None:
    packed, x, bias = weight(text), torch.randn(2, 3, 20).to(dtype), torch.randn(6).to(dtype)
    y = linear(x, packed, bias=bias)
    expected = torch.nn.functional.linear(x.float(), packed.dequantize(), bias.float())
    assert (y.dtype, y.shape) == (dtype, (2, 3, 6))
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_is_unpacked_in_parts(text: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = weight(text, 30), torch.randn(2, 3, 20)
    given = {"bias": torch.randn(30)} if bias else {}
    wanted = linear(x, packed, "", **given)
    sizes: list[int] = []

    def counted(data: Tensor, fmt: Format, last_dim: int) -> Tensor:
        sizes.append(len(data))
        return unpack_codes(data, fmt, last_dim)

    monkeypatch.setattr("qfx.ops.packed.unpack_codes", counted)
    monkeypatch.setattr(qfx.ops.packed, "_LARGE", 560)
    found = linear(x, packed, "", **given)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    split = packed.format.by_row and not packed.format.is_plain
    assert sizes == ([7, 7, 7, 7, 2] if split else [30])


@pytest.mark.parametrize("w_format", WEIGHTS)
@pytest.mark.parametrize("x_format", DYNAMIC)
def test_dynamic_activations(w_format: str, x_format: str) -> None:
    packed, x, bias = weight(w_format), torch.randn(4, 20), torch.randn(6)
    y = linear(x, packed, x_format, bias=bias)
    expected = fake_quantize(x, F(x_format), activation=True) @ packed.dequantize().t() + bias
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("x_format", ["i8", "u8", "i4", "u4", "f8e4m3", "i8/ch", "i8/g8"])
@pytest.mark.parametrize("w_format", ["i8/ch", "u8/ch", "i4/g8", "nf4/g8"])
def test_static_activations(w_format: str, x_format: str) -> None:
    packed, x, fmt = weight(w_format), torch.randn(7, 20), F(x_format)
    scale, zero = choose_qparams(x, fmt, activation=True)
    given_zero = {} if zero is None else {"x_zero": zero}
    y = linear(x * 1.5, packed, x_format, x_scale=scale, **given_zero)  # some values saturate
    expected = fake_quantize(x * 1.5, fmt, scale, zero) @ packed.dequantize().t()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (5, 20), (2, 3, 20), (0, 20), (2, 0, 20)])
@pytest.mark.parametrize("x_format", ["", "i8/tok", "u8/dyn", "i8", "f8e4m3/tok", "i8/dyn"])
def test_leading_dimensions(shape: tuple[int, ...], x_format: str) -> None:
    packed, x = weight("i8/ch"), torch.randn(shape)
    static = {"x_scale": torch.tensor(0.02)} if x_format == "i8" else {}
    y = linear(x, packed, x_format, bias=torch.ones(6), **static)
    assert y.shape == (*shape[:-1], 6)
    if x_format in ("", "i8/tok", "i8"):
        rows = [linear(row, packed, x_format, bias=torch.ones(6), **static) for row in x.reshape(-1, 20)]
        torch.testing.assert_close(y.reshape(-1, 6), torch.stack(rows) if rows else torch.empty(0, 6))


def test_strided_input() -> None:
    packed, x = weight("i8/ch"), torch.randn(20, 5).t()
    assert torch.equal(linear(x, packed, "i8/tok"), linear(x.contiguous(), packed, "i8/tok"))


# ---- linear, exact integers


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["i8/tok", "u8/tok", "i8/dyn", "u8/dyn", "i4/tok", "u3/tok", "i4/tok/c70", "u4/tok/c90", "i8/dyn/c50"]
    ),
    st.sampled_from(["i8/ch", "u8/ch", "i8", "u8", "i4/ch", "u4/ch", "i7", "u7/ch", "i2/ch"]),
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(1, 70),
)
def test_integers_accumulate_exactly(x_format: str, w_format: str, m: int, n: int, k: int) -> None:
    packed, x, xf = weight(w_format, n, k, seed=k), torch.randn(m, k), F(x_format)
    sx, zx = run_time_qparams(x, xf)
    qx, qw, zw = quantize(x, xf, sx, zx).long(), packed.codes().long(), packed.params().zero
    acc = integer_sums(qx - (0 if zx is None else zx.long()), qw - (0 if zw is None else zw.long()))
    expected = acc.float() * sx * packed.scale.reshape(1, -1)
    assert torch.equal(linear(x, packed, x_format), expected)


def test_long_sums_are_exact() -> None:
    """f32 would round these sums; all codes are extreme."""
    k = 20_001
    packed = Packed.from_codes(torch.full((2, k), 127, dtype=torch.int8), F("i8"), torch.ones(()))
    x = torch.full((1, k), 127.0)
    x[0, 0] = 126.0
    y = linear(x.double(), packed, "i8", x_scale=torch.ones(()))
    assert y.tolist() == [[float(torch.tensor(127 * 127 * k - 127).float())] * 2]
    sums = qfx.ops.packed._accumulate(x.to(torch.int8), None, F("i8"), packed.data, None, F("i8"))
    assert sums.tolist() == [[127 * 127 * k - 127] * 2]


@pytest.mark.parametrize("k", [33_000, 33_100, 70_001])
def test_sums_beyond_int32_are_exact(k: int) -> None:
    """255 * 255 * K leaves int32 at K = 33026."""
    codes, zero = torch.full((1, k), 255, dtype=torch.uint8), torch.zeros((), dtype=torch.uint8)
    sums = qfx.ops.packed._accumulate(codes, zero, F("u8"), codes, zero, F("u8"))
    assert sums.tolist() == [[255 * 255 * k]]


def test_zero_points_of_every_value() -> None:
    codes = torch.tensor([[0, 255, 128, 3]], dtype=torch.uint8)
    for zx, zw in itertools.product([0, 1, 127, 128, 255], repeat=2):
        a, b = torch.tensor(zx, dtype=torch.uint8), torch.tensor([[zw]], dtype=torch.uint8)
        sums = qfx.ops.packed._accumulate(codes, a, F("u8"), codes, b, F("u8/ch"))
        assert torch.equal(sums.long(), integer_sums(codes.long() - zx, codes.long() - zw))


def test_int_matmul_shapes() -> None:
    for m, n, k in [(0, 3, 5), (1, 1, 1), (5, 4, 1), (3, 4, 2), (17, 8, 16), (3, 5, 7), (33, 2, 1)]:
        a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        b = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        y = qfx.ops.packed.int_matmul(a, b)
        assert y.dtype == torch.int32
        assert torch.equal(y.long(), integer_sums(a, b))


def test_golden() -> None:
    packed = Packed.from_codes(
        torch.tensor([[1, -2, 3], [0, 127, -127]], dtype=torch.int8), F("i8/ch"), torch.tensor([[0.5], [2.0]])
    )
    x = torch.tensor([[127.0, 63.5, -1.0], [0.0, 0.0, 0.0]])
    y = linear(x, packed, "i8/tok", bias=torch.tensor([1.0, -1.0]))
    # codes 127, 64 (63.5 goes to even), -1; the zero row has scale 1 and gives the bias
    assert y.tolist() == [[(127 - 128 - 3) * 0.5 + 1, (64 * 127 + 127) * 2.0 - 1], [1.0, -1.0]]


def test_not_a_number_shows_in_its_row_only() -> None:
    x = torch.randn(3, 20)
    x[1, 4] = torch.nan
    y = linear(x, weight("i8/ch"), "i8/tok")
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


# ---- smoothing


@pytest.mark.parametrize("w_format", ["i8/ch", "i4/g8"])
@pytest.mark.parametrize("x_format", ["", "i8/tok", "u8/tok", "i8/dyn", "f8e4m3/tok", "bf16", "i8/g8/dyn"])
def test_smooth_divides_the_input(w_format: str, x_format: str) -> None:
    packed, x, smooth = weight(w_format), torch.randn(4, 20), torch.rand(20) + 0.5
    assert torch.equal(linear(x, packed, x_format, smooth=smooth), linear(x / smooth, packed, x_format))


@pytest.mark.parametrize("x_format", ["i8", "u8", "f8e4m3"])
def test_static_smooth_is_one_division(x_format: str) -> None:
    packed, x, smooth, fmt = weight("i8/ch"), torch.randn(4, 20), torch.rand(20) + 0.5, F(x_format)
    scale, zero = choose_qparams(x / smooth, fmt)
    args = {"x_scale": scale, "smooth": smooth, **({} if zero is None else {"x_zero": zero})}
    codes = quantize(x, Format(fmt.type), scale * smooth, zero)
    expected = dequantize(codes, fmt, scale, zero) @ packed.dequantize().t()
    torch.testing.assert_close(linear(x, packed, x_format, **args), expected, rtol=1e-5, atol=2e-5)


def test_smoothing_is_undone_by_the_weight() -> None:
    w, x, smooth = torch.randn(6, 20), torch.randn(4, 20), torch.rand(20) + 0.5
    y = linear(x, pack_weight(w * smooth, F("f32")), smooth=smooth)
    torch.testing.assert_close(y, x @ w.t())


# ---- embedding and dequantize


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("ids", [[3], [[0, 5], [5, 2]], [], 4])
def test_embedding(text: str, ids: Any) -> None:
    packed, index = weight(text), torch.tensor(ids, dtype=torch.int64)
    for dtype, index_dtype in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
        y = torch.ops.qfx.embedding(index.to(index_dtype), packed.data, packed.scale, packed.zero, text, 20, dtype)
        assert y.dtype == dtype
        assert torch.equal(y, packed.dequantize(dtype)[index])


@pytest.mark.parametrize("bad", [6, -1])
def test_embedding_refuses_ids_out_of_range(bad: int) -> None:
    packed = weight("i4/g8")
    with pytest.raises((IndexError, RuntimeError), match=r"(?i)index out of range|out of bounds"):
        torch.ops.qfx.embedding(torch.tensor([bad]), packed.data, packed.scale, None, "i4/g8", 20, torch.float32)


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("lead", [(6,), (2, 6), (2, 3, 6), ()])
def test_dequantize(text: str, lead: tuple[int, ...]) -> None:
    if lead == () and F(text).block:
        return
    packed = pack_weight(torch.randn(*lead, 20), F(text))
    for dtype in (torch.float32, torch.float16):
        w = torch.ops.qfx.dequantize(packed.data, packed.scale, packed.zero, text, 20, dtype)
        assert torch.equal(w, packed.dequantize(dtype))
        assert w.is_contiguous()
        assert w.data_ptr() != packed.data.data_ptr()


# ---- refusals


def test_wrong_last_dimension_is_refused() -> None:
    packed = weight("i4/g8")
    with pytest.raises(ValueError, match="packed data does not fit format 'i4/g8'"):
        linear(torch.randn(2, 40), packed)
    with pytest.raises(ValueError, match=r"expected: torch\.uint8, rows of 20 for 40 elements"):
        torch.ops.qfx.dequantize(packed.data, packed.scale, None, "i4/g8", 40, torch.float32)


def test_unknown_format_is_refused() -> None:
    packed = weight("i8/ch")
    with pytest.raises(ValueError, match="did you mean 'i8/tok'"):
        torch.ops.qfx.linear(torch.randn(2, 20), packed.data, packed.scale, *[None] * 5, "int8/token", "i8/ch")


@pytest.mark.parametrize(("x_format", "kwargs", "what"), [("i8", {}, "scale"), ("u8", {"x_scale": 1.0}, "zero point")])
def test_static_format_needs_its_parameters(x_format: str, kwargs: dict[str, float], what: str) -> None:
    tensors = {name: torch.tensor(value) for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=f"static input format '{x_format}' has no {what}") as caught:
        linear(torch.randn(2, 20), weight("i8/ch"), x_format, **tensors)
    assert f"use '{x_format}/tok'" in str(caught.value)


# ---- registration


def test_a_second_copy_registers_nothing() -> None:
    spec = importlib.util.spec_from_file_location("second_copy_of_ops", qfx.ops.packed.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    del copy
    gc.collect()
    assert linear(torch.randn(3, 20), weight("i8/ch")).shape == (3, 6)


def test_reloading_keeps_the_ops() -> None:
    importlib.reload(qfx.ops.packed)
    gc.collect()
    assert linear(torch.randn(3, 20), weight("i8/ch")).shape == (3, 6)


def test_schemas() -> None:
    assert str(torch.ops.qfx.linear.default._schema) == (
        "qfx::linear(Tensor x, Tensor w, Tensor w_scale, Tensor? w_zero, Tensor? bias, Tensor? x_scale, "
        "Tensor? x_zero, Tensor? smooth, str x_format, str w_format) -> Tensor"
    )
    assert str(torch.ops.qfx.embedding.default._schema) == (
        "qfx::embedding(Tensor ids, Tensor w, Tensor w_scale, Tensor? w_zero, str w_format, int dim, "
        "ScalarType dtype) -> Tensor"
    )
    assert str(torch.ops.qfx.dequantize.default._schema) == (
        "qfx::dequantize(Tensor w, Tensor w_scale, Tensor? w_zero, str w_format, int last_dim, "
        "ScalarType dtype) -> Tensor"
    )
