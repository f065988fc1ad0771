"""grouped_floats: the products of qfx::grouped_linear for any rows of each expert, layout and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.device import H100
from qfx.backends.triton.experts_float import candidates, grouped_floats
from qfx.backends.triton.launch import recorded
from qfx.ops import floats as float_ops
from tests.backends.triton.cases import DEVICE, meta
from tests.backends.triton.test_experts import ends

STEP = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6.5}  # of the sum of |x w| + |y|


def error(x: Tensor, w: Tensor, offs: Tensor) -> float:
    due = float_ops.grouped_linear(x.float(), w.float(), offs)
    got = torch.ops.qfx_triton.grouped_floats(x, w, offs)
    assert got.dtype == x.dtype and got.shape == due.shape
    last = int(offs[-1])
    assert got[last:].eq(0).all(), "rows after the last end"
    if not last:
        return 0.0
    size = (float_ops.grouped_linear(x.float().abs(), w.float().abs(), offs) + due.abs())[:last]
    return float(((got.float() - due)[:last].abs() / size.clamp(min=1e-30)).max())


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.just(0) | st.integers(0, 6) | st.integers(0, 60), min_size=1, max_size=5),
    rest=st.just(0) | st.integers(1, 5), n=st.integers(1, 80), k=st.integers(1, 150), turned=st.booleans(),
    dtype=st.sampled_from(list(STEP)), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_shape(counts: list[int], rest: int, n: int, k: int, turned: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(sum(counts) + rest, k + 3, device=DEVICE).to(dtype)[:, 3:]
    w = torch.randn(len(counts), k, n).mT if turned else torch.randn(len(counts), n, k)
    assert error(x, w.to(DEVICE, dtype), ends(counts)) < STEP[dtype]


def test_nothing_leaks_from_beyond_the_input_or_the_last_end() -> None:
    wide = torch.full((40, 128), float("nan"), device=DEVICE)
    wide[:35, :100] = 1.0
    w = torch.full((2, 9, 128), float("nan"), device=DEVICE)
    w[..., :100] = 1.0
    for counts in ([1, 0], [17, 18]):
        found = grouped_floats(wide[: sum(counts) + 5, :100], w[..., :100], ends(counts))
        assert found[: sum(counts)].eq(100).all() and found[sum(counts) :].eq(0).all()


@pytest.mark.parametrize("t", [1, 4, 400])
def test_the_host_reads_no_value(t: int) -> None:
    with recorded(H100) as launches:
        grouped_floats(meta(t, 64), meta(4, 8, 64), meta(4, dtype=torch.int32))
    assert len(launches) == 1
    assert 1 < len(candidates(t, 4, torch.float16)) <= 20


def test_what_does_not_fit_is_refused() -> None:
    x, w, offs = torch.randn(3, 8, device=DEVICE), torch.randn(2, 5, 8, device=DEVICE), ends([1, 2])
    with pytest.raises(ValueError, match="x is no matrix of floats"):
        grouped_floats(x.double(), w.double(), offs)
    with pytest.raises(ValueError, match="the weight does not fit"):
        grouped_floats(x, w.half(), offs)
    with pytest.raises(ValueError, match="where the rows of each expert end"):
        grouped_floats(x, w, offs[:1])
    assert grouped_floats(x[:0], w, ends([0, 0])).shape == (0, 5)
