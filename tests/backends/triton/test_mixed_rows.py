"""gemm_mixed and linear_mixed: one product for the segments of a weight, as the reference computes one for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.device import A100, H100
from qfx.backends.triton.gemm4_config import Problem
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.mixed_rows import ROWS, pack_mixed, reason_against
from qfx.backends.triton.mixed_rows_config import float_candidates
from qfx.backends.triton.timing import relative_error
from qfx.format import Format
from qfx.live.segments import Segment, in_order, pieces, segments, take
from qfx.ops import packed as ops
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import BF16_STEP, DEVICE, INTERPRETED
from tests.backends.triton.linears import linear_mixed

CHANNELS = (("i8/ch", "i4/ch", "i8/ch", "i2/ch"), ("i4/ch", "u4/ch", "u8/ch"), ("u3/ch", "i6/ch"), ("i4/ch",))
GROUPS = (("i8/ch", "i4/g64", "u4/g64"), ("i8/g32", "i4/g32"), ("u4/g128", "i8/ch", "u4/g128/f16"))


class Mixed:
    """A weight of several formats: what the op takes, and what the reference computes of it."""

    def __init__(self, formats: tuple[str, ...], head: int, k: int, *, floats: bool) -> None:
        n = head * len(formats)
        weight = torch.randn(n, k, device=DEVICE)
        self.found: list[Segment] = segments(tuple(map(Format.parse, formats)), (n, k), "w")
        self.parts: list[Packed] = [pack_weight(take(weight, part, 0), part.format) for part in self.found]
        self.formats = ",".join(str(part.format) for part in self.parts)
        stored = [(part.data, part.scale, part.zero, str(part.format)) for part in self.parts]
        self.packed = pack_mixed(stored, pieces(self.found), k, floats=floats)
        self.bias = torch.randn(n, device=DEVICE)

    def run(self, x: Tensor, scale: Tensor | None, zero: Tensor | None, smooth: Tensor | None, fmt: str) -> Tensor:
        given_x = (scale, zero, smooth, fmt)
        return linear_mixed(x, self.packed, self.bias, None, *given_x, self.formats, "")

    def expected(self, x: Tensor, scale: Tensor | None, zero: Tensor | None, smooth: Tensor | None, fmt: str) -> Tensor:
        """In f32."""
        x = x.to(torch.float32)
        parts = [
            ops.linear(x, part.data, part.scale, part.zero, None, scale, zero, smooth, fmt, str(part.format))
            for part in self.parts
        ]
        return in_order(parts, self.found, x.dim() - 1) + self.bias


SHAPES = {
    "m": st.sampled_from([1, 17, 40]) | st.integers(1, 50), "head": st.integers(1, 40), "k": st.integers(1, 500),
    "seed": st.integers(0, 99),
}  # fmt: skip


@settings(max_examples=6, deadline=None)
@given(**SHAPES, formats=st.sampled_from(CHANNELS), x_format=st.sampled_from(["i8/tok", "u8/tok", "i8"]))
def test_channels_are_exact(m: int, head: int, k: int, seed: int, formats: tuple[str, ...], x_format: str) -> None:
    torch.manual_seed(seed)
    weight, x = Mixed(formats, head, k, floats=False), torch.randn(m, k, device=DEVICE)
    scale = torch.tensor(0.03, device=DEVICE) if x_format == "i8" else None
    smooth = torch.rand(k, device=DEVICE) + 0.5 if seed % 2 else None
    found, expected = (run(x, scale, None, smooth, x_format) for run in (weight.run, weight.expected))
    assert torch.equal(found, expected) if INTERPRETED else relative_error(found, expected) < 1e-6


@settings(max_examples=6, deadline=None)
@given(**SHAPES, formats=st.sampled_from(GROUPS), x_format=st.sampled_from(["i8/tok", "u8/tok"]))
def test_groups_err_by_sums_of_floats_alone(
    m: int, head: int, k: int, seed: int, formats: tuple[str, ...], x_format: str
) -> None:
    torch.manual_seed(seed)
    weight, x = Mixed(formats, head, k, floats=False), torch.randn(m, k, device=DEVICE)
    found, expected = (run(x, None, None, None, x_format) for run in (weight.run, weight.expected))
    assert float((found - expected).abs().max()) < 2e-5 * max(float(expected.abs().max()), 1.0)


@settings(max_examples=6, deadline=None)
@given(
    **SHAPES, formats=st.sampled_from(CHANNELS + GROUPS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_float_inputs(m: int, head: int, k: int, seed: int, formats: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    weight, x = Mixed(formats, head, k, floats=True), torch.randn(m, k, device=DEVICE).to(dtype)
    found, expected = (run(x, None, None, None, "") for run in (weight.run, weight.expected))
    assert found.dtype == dtype
    step = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 2 * BF16_STEP}[dtype]
    assert float((found - expected).abs().max()) < step * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("formats", [("u8/ch", "i4/ch", "u2/ch"), ("i8/ch", "u4/g64")])
def test_many_float_rows_are_multiplied_by_torch(formats: tuple[str, ...]) -> None:
    weight = Mixed(formats, 20, 200, floats=True)
    x = torch.randn(1030, 200, device=DEVICE)
    found, expected = (run(x, None, None, None, "") for run in (weight.run, weight.expected))
    assert relative_error(found, expected) < 1e-6
    bias, weight.bias = weight.bias, torch.zeros_like(weight.bias)
    without = linear_mixed(x.half(), weight.packed, None, None, None, None, None, "", weight.formats, "")
    assert relative_error(without, expected - bias) < 2e-3


def test_rows_are_padded_to_tiles_and_put_back() -> None:
    weight = Mixed(("i8/ch", "i4/ch", "i8/ch"), 48, 256, floats=False)
    order, eight, four, two, *_ = weight.packed
    assert [len(part) for part in (order, eight, four, two)] == [2 * ROWS, ROWS, ROWS, 0]
    assert order[:96].tolist() == [*range(48), *range(96, 144)]
    assert set(order[96:128].tolist()) == {144}
    assert (eight.shape[1], four.shape[1]) == (256, 128)


def test_strides_activation_residual_and_no_rows() -> None:
    weight = Mixed(("i8/ch", "u4/ch"), 40, 130, floats=True)
    x = torch.randn(130, 2, 3, device=DEVICE).permute(1, 2, 0)
    residual = torch.randn(2, 3, 80, device=DEVICE)
    found = linear_mixed(x, weight.packed, weight.bias, residual, None, None, None, "", weight.formats, "silu")
    expected = torch.nn.functional.silu(weight.expected(x, None, None, None, "")) + residual
    assert found.shape == (2, 3, 80)
    assert relative_error(found, expected) < 1e-5
    assert weight.run(x[:0], None, None, None, "").shape == (0, 3, 80)
    whole = Mixed(("i8/ch", "u4/ch"), 40, 130, floats=False)
    assert whole.run(x[:0], None, None, None, "i8/tok").shape == (0, 3, 80)


def test_rows_in_a_wrong_order_and_a_wrong_scale_are_seen() -> None:
    weight, x = Mixed(("i8/ch", "i4/ch"), 40, 200, floats=False), torch.randn(4, 200, device=DEVICE)
    expected = weight.expected(x, None, None, None, "i8/tok")
    right = weight.packed
    weight.packed = [right[0].roll(1), *right[1:]]
    assert relative_error(weight.run(x, None, None, None, "i8/tok"), expected) > 0.1
    weight.packed = [*right[:4], right[4] * 1.01, *right[5:]]
    assert relative_error(weight.run(x, None, None, None, "i8/tok"), expected) > 1e-3


def test_one_product_is_launched_for_all_segments() -> None:
    weight = Mixed(("i8/ch", "i4/ch", "i8/ch"), 40, 256, floats=False)
    packed, x = [part.to("meta") for part in weight.packed], torch.empty(512, 256, device="meta")
    with recorded(H100) as launches:
        linear_mixed(x, packed, None, None, None, None, None, "i8/tok", weight.formats, "")
    assert len(launches) == 2  # the first quantizes x
    assert launches[1].kernel.fn.__name__ == "mixed_integer"


def test_refusals() -> None:
    assert reason_against("i8/tok", ["i8/ch", "i4/g64"]) is None
    assert reason_against("", ["i8/ch", "i4/ch"]) is None
    assert reason_against("", ["i4/g32", "i4/g64"]) == "the segments have groups of 32 and 64"
    assert str(reason_against("", ["i8/ch", "nf4/g64"])).endswith("weights are integers")
    weight, x = Mixed(("i8/ch", "i4/ch"), 8, 128, floats=False), torch.randn(2, 128, device=DEVICE)
    with pytest.raises(ValueError, match="the weight is not packed as 'i8/ch,u4/ch' for k=128"):
        linear_mixed(x, weight.packed, None, None, None, None, None, "i8/tok", "i8/ch,u4/ch", "")
    with pytest.raises(ValueError, match="the weight is not packed"):
        linear_mixed(x[:, :64], weight.packed, None, None, None, None, None, "", weight.formats, "")
    with pytest.raises(ValueError, match="there is no kernel: the segments have groups"):
        linear_mixed(x, weight.packed, None, None, None, None, None, "", "i4/g32,i4/g64", "")
    floats = Mixed(("i8/ch", "i4/ch"), 8, 128, floats=True)
    with pytest.raises(ValueError, match="activations are floats"):
        linear_mixed(x.double(), floats.packed, None, None, None, None, None, "", floats.formats, "")


@pytest.mark.parametrize("m", [1, 33, 64, 500])
def test_configurations_of_float_inputs_divide_the_padding(m: int) -> None:
    for group in (0, 128):
        for dtype in (torch.float16, torch.float32):
            found = float_candidates(A100, Problem(4096, 4096, 4, 64, group), m, dtype)
            assert 0 < len(found) <= 20
            assert all(ROWS % config.get("BLOCK_N", 1) == 0 for config in found)
