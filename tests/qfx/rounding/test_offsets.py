"""qfx.rounding.offsets: what gradient descent moves, for every format that has steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.numerics import QParams, choose_qparams
from qfx.packing import pack_weight
from qfx.rounding.offsets import SHARES, Adam, Offsets
from qfx.rounding.scales import rounded, search
from tests.seeded import randn

INTEGERS = [f"{kind}{bits}/g16" for kind in "iu" for bits in range(2, 9)]
FORMATS = [
    *INTEGERS,
    *("i4", "i4/ch", "u4/ch", "u3", "i4/b8x16", "i4/g16/f16", "nf4/g16", "nf4/ch"),
    *("f4e2m1/g16/e4m3", "f4e2m1/g16/e8m0", "f8e4m3/ch", "f8e5m2/ch"),
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_at_the_start_it_is_rounding_to_nearest(fmt: str) -> None:
    w, form = randn(6, 40), Format.parse(fmt)
    found, nearest = Offsets(w, form).packed(), pack_weight(w, form)
    assert torch.equal(found.data, nearest.data)
    assert torch.equal(found.scale.float(), nearest.scale.float())
    assert (found.zero is None) == (nearest.zero is None)


@settings(deadline=None, max_examples=40)
@given(
    fmt=st.sampled_from(FORMATS), seed=st.integers(0, 99), rows=st.integers(1, 9), columns=st.integers(1, 40),
    rate=st.sampled_from([0.01, 0.2, 1.0]),
)  # fmt: skip
def test_what_is_stored_is_the_value_that_was_learned(
    fmt: str, seed: int, rows: int, columns: int, rate: float
) -> None:
    offsets = Offsets(randn(rows, columns, seed=seed), Format.parse(fmt))
    for step in range(3):
        offsets.value()
        offsets.step(randn(rows, columns, seed=seed + step), rate, rate)
    assert torch.equal(offsets.packed().dequantize(), offsets.value())
    assert offsets.value().isfinite().all()
    assert offsets.offset.abs().max() <= 0.5
    assert SHARES[0] <= float(offsets.lower.min()) and float(offsets.upper.max()) <= SHARES[1]


@pytest.mark.parametrize("fmt", ["i4/g16", "u4/g16", "i2/ch", "u2/g16", "nf4/g16", "f4e2m1/g16/e8m0", "f8e4m3/ch"])
def test_each_value_takes_one_of_its_two_neighbours(fmt: str) -> None:
    w, form = randn(8, 32), Format.parse(fmt)
    up, down, still = Offsets(w, form), Offsets(w, form), Offsets(w, form).value()
    for offsets, sign in ((up, -1.0), (down, 1.0)):
        offsets.value()
        offsets.step(torch.full_like(w, sign), 10.0, 0.0)
    found = torch.stack([down.value(), still, up.value()])
    assert bool((found.diff(dim=0) >= 0).all())
    inner = (found[0] < w) & (w < found[2]) & ((w - still).abs() > 1e-3)
    assert inner.float().mean() > 0.5
    if form.is_integer:  # the steps of a table differ, and half a wide one may pass a narrow one
        assert bool(((found[1] == found[0]) | (found[1] == found[2]))[inner].all())


def narrowed(w: Tensor, fmt: str, share: float) -> QParams:
    """The scales of the extremes times `share`; zero points stay."""
    scale, zero = choose_qparams(w, Format.parse(fmt))
    return QParams(scale * share, zero)


@pytest.mark.parametrize("fmt", ["u4/g16", "i4/g16", "nf4/g16"])
def test_a_share_falls_where_its_clipped_values_shall_be_smaller(fmt: str) -> None:
    """Only the greatest value of each group has a slope, and it is at the edge of the range."""
    w = randn(4, 16).abs()
    offsets = Offsets(w, Format.parse(fmt), params=narrowed(w, fmt, 0.8), optimizer="sign")
    before = offsets.value().amax(-1)
    offsets.step((w == w.amax(-1, keepdim=True)).float(), 0.0, 0.1)
    assert bool((offsets.value().amax(-1) < before).all())
    torch.testing.assert_close(offsets.upper, torch.full((4, 1), 0.9))


def test_low_and_high_ends_of_an_affine_format_are_learned_apart() -> None:
    w = randn(1, 32, seed=4)
    offsets = Offsets(w, Format.parse("u3/ch"), params=narrowed(w, "u3/ch", 0.7), optimizer="sign")
    offsets.value()
    offsets.step(-(w == w.min()).float(), 0.0, 0.1)  # the least value shall grow: the lower end comes nearer
    assert offsets.lower.item() == pytest.approx(0.9)
    assert offsets.upper.item() == 1.0


@pytest.mark.parametrize("fmt", ["i4/g16", "i2/ch", "i4"])
def test_scales_of_either_sign_go_the_same_way(fmt: str) -> None:
    """Codes -8..7 with -s are the values -7..8 with s: the weight -W with s goes wherever W with -s goes."""
    w, form = randn(4, 32), Format.parse(fmt)
    scale = choose_qparams(w, form).scale * 0.7
    one, other = Offsets(w, form, params=QParams(-scale, None)), Offsets(-w, form, params=QParams(scale, None))
    for seed in range(3):
        torch.testing.assert_close(one.value(), -other.value())
        slope = randn(4, 32, seed=seed + 5)
        one.step(slope, 0.2, 0.1)
        other.step(-slope, 0.2, 0.1)
    torch.testing.assert_close(one.packed().scale, -other.packed().scale)


def test_scales_start_where_asked() -> None:
    w = randn(4, 32)
    for fmt in ("i4/g16", "u3/g16", "f4e2m1/g16/e4m3"):
        params = search(w, Format.parse(fmt))
        assert torch.equal(Offsets(w, Format.parse(fmt), params=params).value(), rounded(w, Format.parse(fmt), params))


def test_clipped_is_the_share_beyond_the_range() -> None:
    w = torch.tensor([[1.0, -1.0, 0.1, 0.2, 0.0, 0.3, -0.2, 8.0]])
    offsets = Offsets(w, Format.parse("i4/ch"), params=narrowed(w, "i4/ch", 0.5))
    offsets.value()
    assert offsets.clipped == pytest.approx(1 / 8)
    assert float(offsets.packed().scale) == pytest.approx(4 / 7)


def test_adam_is_that_of_torch() -> None:
    p = torch.zeros(5, requires_grad=True)
    theirs, ours, at = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99), eps=0.0), Adam(), torch.zeros(5)
    for step in range(4):
        p.grad = randn(5, seed=step)
        theirs.step()
        ours(at, randn(5, seed=step), 0.1)
    torch.testing.assert_close(at, p.detach())


def test_adam_stands_still_without_gradients() -> None:
    ours, at = Adam(), torch.zeros(3)
    ours(at, torch.zeros(3), 1.0)
    assert torch.equal(at, torch.zeros(3))
    ours(at, torch.tensor([1e-9, 0.0, -2.0]), 1.0)
    torch.testing.assert_close(at.sign(), torch.tensor([-1.0, 0.0, 1.0]))


def test_signs_alone_move_every_value_alike() -> None:
    w = randn(4, 16)
    offsets = Offsets(w, Format.parse("i4/g16"), optimizer="sign")
    offsets.value()
    offsets.step(randn(4, 16, seed=1) * 1e-3, 0.2, 0.0)
    torch.testing.assert_close(offsets.offset.abs(), torch.full((4, 1, 16), 0.2))
