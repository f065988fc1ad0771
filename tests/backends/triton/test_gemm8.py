"""gemm8: the linears of the reference, integers exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import gemm8_config
from qfx.backends.triton.device import A100, H200
from qfx.backends.triton.gemm8 import gemm8, pack_gemm8, reason_against
from qfx.backends.triton.gemm8_config import Problem
from qfx.backends.triton.launch import Config
from qfx.backends.triton.quantize_rows import quantize_dynamic
from qfx.format import Format
from qfx.ops.packed import linear
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import BF16_STEP, DEVICE, INTERPRETED
from tests.backends.triton.linears import linear_w8a8, rounded

X_INT = ["i8/tok", "u8/tok", "i8", "u8", "i8/dyn", "u8/dyn/c90", "u4/tok/c80", "i6/tok"]
W_INT = ["i8/ch", "u8/ch", "i8", "u8", "i4/ch", "u3/ch", "i8/ch/f16"]
X_FLOAT = ["f8e4m3/tok", "f8e4m3", "f8e4m3/dyn", "f8e4m3/g128/dyn", "f8e4m3/g32/dyn"]
W_FLOAT = ["f8e4m3/ch", "f8e4m3", "f8e4m3/b128x128", "f8e4m3/b32x64", "f8e4m3/g64"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2 * BF16_STEP}


class Layer:
    """A random linear layer and what both sides say of it."""

    def __init__(self, n: int, k: int, x_format: str, w_format: str, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.formats, self.k = (x_format, w_format), k
        self.packed: Packed = pack_weight(torch.randn(n, k, device=DEVICE) + 0.2, Format.parse(w_format))
        self.weight = pack_gemm8(self.packed.data, self.packed.scale, self.packed.zero, w_format, k)
        self.bias = torch.randn(n, device=DEVICE)
        fmt = Format.parse(x_format)
        self.scale = None if fmt.dynamic else torch.tensor(0.04, device=DEVICE)
        self.zero = torch.tensor(fmt.qmax // 3, dtype=torch.uint8, device=DEVICE) if fmt.has_zero else None
        self.zero = None if fmt.dynamic else self.zero

    def x(self, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(m, self.k, device=DEVICE) * 2 + 0.3).to(dtype)

    def reference(self, x: Tensor, smooth: Tensor | None = None) -> Tensor:
        p = self.packed
        return linear(x, p.data, p.scale, p.zero, self.bias, self.scale, self.zero, smooth, *self.formats)

    def __call__(
        self, x: Tensor, smooth: Tensor | None = None, residual: Tensor | None = None, act: str = ""
    ) -> Tensor:
        known = (self.scale, self.zero, smooth)
        return linear_w8a8(x, self.weight, self.bias, residual, *known, *self.formats, act)


def error(found: Tensor, expected: Tensor, sums: Tensor | None = None) -> float:
    """Greatest difference over the greatest value, or over the greatest of `sums`."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not found.numel():
        return 0.0
    greatest = (expected if sums is None else sums).double().abs().max()
    return float((found.double() - expected.double()).abs().max() / greatest)


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    x_format=st.sampled_from(X_INT),
    w_format=st.sampled_from(W_INT),
    smoothed=st.booleans(),
)
def test_integers_are_exact(m: int, n: int, k: int, x_format: str, w_format: str, smoothed: bool) -> None:
    layer = Layer(n, k, x_format, w_format, seed=m)
    x = layer.x(m)
    smooth = torch.rand(k, device=DEVICE) + 0.5 if smoothed else None
    assert error(layer(x, smooth), layer.reference(x, smooth)) <= TOLERANCE[torch.float32]


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    x_format=st.sampled_from(X_FLOAT),
    w_format=st.sampled_from(W_FLOAT),
)
def test_e4m3_is_that_of_the_reference(m: int, n: int, k: int, x_format: str, w_format: str) -> None:
    layer = Layer(n, k, x_format, w_format, seed=m)
    x = layer.x(m)
    sums = x.abs() @ layer.packed.dequantize().abs().t()  # of magnitudes: a single sum may all but cancel out
    # on the GPU the tensor core adds 128 products with 14 bits
    assert error(layer(x), layer.reference(x), sums) <= (TOLERANCE[torch.float32] / 4 if INTERPRETED else 5e-4)


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.float16, ("i8/tok", "i8/ch")),
        (torch.bfloat16, ("u8/tok", "u8/ch")),
        (torch.bfloat16, ("f8e4m3/tok", "f8e4m3/ch")),
        (torch.float32, ("f8e4m3/g128/dyn", "f8e4m3/b128x128")),
    ],
)
def test_many_rows_in_every_dtype(dtype: torch.dtype, formats: tuple[str, str]) -> None:
    layer = Layer(65, 77, *formats)
    x = layer.x(300 if dtype == torch.float16 else 80, dtype)
    most = 2e-3 if DEVICE == "cuda" and formats[0].startswith("f8") else 0.0
    assert error(layer(x), layer.reference(x)) <= max(TOLERANCE[dtype], most)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("m", [3, 20])
def test_epilogue_activates_and_adds(act: str, m: int) -> None:
    layer = Layer(50, 300, "u8/tok", "u8/ch")
    x, residual = layer.x(m), torch.randn(m, 50, device=DEVICE) * 10
    functions = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
    expected = functions[act](layer.reference(x)) + residual
    assert error(layer(x, residual=residual, act=act), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("formats", [("i8/tok", "i8/ch"), ("f8e4m3/g32/dyn", "f8e4m3/b32x64")])
@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize(
    ("split", "persistent", "columns", "halves"), [(1, 0, 32, 1), (1, 1, 32, 2), (1, 1, 128, 2), (3, 0, 32, 2)]
)
def test_every_way_of_dispatch(
    monkeypatch: pytest.MonkeyPatch, formats: tuple[str, str], swap: int, split: int, persistent: int, columns: int,
    halves: int,
) -> None:  # fmt: skip
    config: Config = {
        "BLOCK_M": 32, "BLOCK_N": columns, "BLOCK_K": 32, "HALVES": halves, "GROUP": 2, "SPLIT": split, "SWAP": swap,
        "PERSISTENT": persistent, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    monkeypatch.setattr("qfx.backends.triton.gemm8.configuration", lambda *_: config)
    layer = Layer(150, 100, *formats)
    x = layer.x(40)
    tolerance = TOLERANCE[torch.float32] if INTERPRETED else 2e-3
    assert error(layer(x), layer.reference(x)) <= tolerance


@pytest.mark.parametrize("formats", [("u8/tok", "u8/ch"), ("f8e4m3/tok", "f8e4m3/ch")])
def test_a_configuration_may_leave_the_product_to_the_library(
    monkeypatch: pytest.MonkeyPatch, formats: tuple[str, str]
) -> None:
    monkeypatch.setattr("qfx.backends.triton.gemm8.configuration", lambda *_: {"LIBRARY": 1})
    layer = Layer(96, 70, *formats)
    x = layer.x(40)
    found, expected = layer(x, act="silu"), F.silu(layer.reference(x))
    assert error(found, expected) <= (TOLERANCE[torch.float32] if INTERPRETED else 2e-3)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 300), n=st.integers(1, 300), k=st.integers(1, 700), seed=st.integers(0, 9), data=st.data())
def test_larger_shapes(m: int, n: int, k: int, seed: int, data: st.DataObject) -> None:
    x_formats, w_formats = data.draw(st.sampled_from([(X_INT, W_INT), (X_FLOAT, W_FLOAT)]))
    layer = Layer(n, k, data.draw(st.sampled_from(x_formats)), data.draw(st.sampled_from(w_formats)), seed=seed)
    x = layer.x(m)
    assert error(layer(x), layer.reference(x)) <= (TOLERANCE[torch.float32] if INTERPRETED else 2e-3)


def test_a_wrong_scale_zero_or_sum_is_noticed() -> None:
    layer = Layer(50, 100, "u8/tok", "u8/ch")
    x = layer.x(20)
    expected = layer.reference(x)
    for i in (1, 2, 3):
        right = layer.weight[i]
        layer.weight[i] = right + (right * 0.05 + 1).to(right.dtype) * (torch.arange(50, device=DEVICE) % 5 == 0)
        assert error(layer(x), expected) > 1e-3
        layer.weight[i] = right
    assert error(layer(x), expected) <= TOLERANCE[torch.float32]


def test_codes_of_a_producer_need_no_padding_and_may_be_views() -> None:
    layer = Layer(40, 72, "i8/tok", "i8/ch")
    x = layer.x(6).reshape(2, 3, 72)
    codes, scale, _ = quantize_dynamic(x, None, "i8/tok")
    narrow = codes[..., :72]  # rows 80 apart
    for given_codes in (codes, narrow, narrow.contiguous()):
        y = gemm8(given_codes, scale, None, layer.weight, layer.bias, None, *layer.formats, "", "f32")
        assert y.shape == (2, 3, 40) and error(y, layer.reference(x)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("x_format", "w_format", "k", "message"),
    [
        ("", "i8/ch", 64, "not quantized"),
        ("i8/tok", "i8/g32", 64, "for the tensor or per channel"),
        ("i8/tok", "f8e4m3/ch", 64, "both are integers, or both f8e4m3"),
        ("f8e4m3/tok", "f8e5m2/ch", 64, "both are integers, or both f8e4m3"),
        ("f8e4m3/tok", "f8e4m3/b16x16", 64, "powers of two from 32 on"),
        ("f8e4m3/tok", "f8e4m3/g16/e4m3", 64, "no kernel of 8 bits"),
        ("u8/tok", "u8/ch", 40000, "pass 32 bits"),
        ("nf4/g64", "i8/ch", 64, "neither integers nor f8e4m3"),
    ],
)
def test_reasons(x_format: str, w_format: str, k: int, message: str) -> None:
    assert message in str(reason_against(x_format, w_format, k))


def test_all_formats_of_these_tests_have_kernels() -> None:
    for xs, ws in ((X_INT, W_INT), (X_FLOAT, W_FLOAT)):
        assert not [(x, w) for x in xs for w in ws if reason_against(x, w, 8192)]


def test_tensors_that_do_not_fit_are_refused() -> None:
    layer = Layer(40, 64, "i8/tok", "i8/ch")
    codes, scale, _ = quantize_dynamic(layer.x(6), None, "i8/tok")
    call = (layer.weight, None, None, *layer.formats, "", "f16")
    with pytest.raises(ValueError, match="codes do not fit"):
        gemm8(codes[:, :40], scale, None, *call)
    with pytest.raises(ValueError, match="scales or zero points do not fit"):
        gemm8(codes, scale[:2], None, *call)
    with pytest.raises(ValueError, match="is not packed as"):
        gemm8(codes, scale, None, layer.weight[:2], *call[1:])
    with pytest.raises(ValueError, match="the bias does not fit"):
        gemm8(codes, scale, None, layer.weight, torch.zeros(3, device=DEVICE), *call[2:])
    with pytest.raises(ValueError, match="the residual does not fit"):
        gemm8(codes, scale, None, layer.weight, None, torch.zeros(6, 3, device=DEVICE), *call[3:])
    with pytest.raises(ValueError, match="unknown activation"):
        gemm8(codes, scale, None, *call[:-2], "relu", "f16")


@pytest.mark.parametrize("formats", [("u8/tok", "u8/ch"), ("f8e4m3/g128/dyn", "f8e4m3/b128x128")])
def test_fakes_have_the_shapes_of_the_real_ones(formats: tuple[str, str]) -> None:
    layer = Layer(40, 70, *formats)
    codes = rounded(layer.x(6).reshape(2, 3, 70), None, None, None, formats[0])
    arguments = (*codes, layer.weight, layer.bias, None, *formats, "silu", "f32")
    torch.library.opcheck(torch.ops.qfx_triton.gemm8.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("device", [A100, H200])
@pytest.mark.parametrize("problem", [Problem(4096, 4096), Problem(11008, 4096, True), Problem(777, 1008, True, 128)])
def test_configurations_fit_the_device(device: object, problem: Problem) -> None:
    assert isinstance(device, type(H200))
    for m in (1, 16, 17, 64, 65, 300, 4096):
        found = gemm8_config.candidates(device, problem, m)
        assert 2 <= len(found) <= 20 and found[0] == gemm8_config.heuristic(device, problem, m)
        own = [c for c in found if "LIBRARY" not in c and "DESCRIPTORS" not in c]
        assert all(c["SPLIT"] == 1 or not c["PERSISTENT"] for c in own)
        assert all(c["SWAP"] or c["BLOCK_M"] >= 64 for c in own)
        least = 64 if problem.is_float and device.has_fp8 else 32  # e4m3 stays e4m3 from 64 on
        assert all(c["BLOCK_N"] >= least for c in own)
