"""The search for scales never loses against the extremes, finds signs and zero points, and heeds the importance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.calibration.moments import Moments
from qfx.format import Format
from qfx.numerics import QParams, choose_qparams, dequantize, quantize
from qfx.packing import pack_zeros
from qfx.rounding import scales
from qfx.rounding.scales import Best, explore, refit_scale, refit_zero, rounded, search, shares_of

FORMATS = [
    "i4", "i4/ch", "i4/g16", "i2/g16", "u4/g16", "u2/g16", "i3/ch", "i8/ch", "i4/b8x16", "nf4/g16", "i4/g16/f16",
    "u4/g16/bf16", "f4e2m1/g16/e4m3", "f4e2m1/g32/e8m0", "f8e4m3/ch", "i4/g16/e8m0",
]  # fmt: skip


def weight(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (1 + 4 * (torch.rand(shape, generator=generator) > 0.97))


def error(w: Tensor, fmt: Format, params: tuple[Tensor, Tensor | None], importance: Importance | None = None) -> float:
    d = dequantize(quantize(w, fmt, *params), fmt, *params) - w
    return float((d * d if importance is None else importance.product(d, d)).sum())


@settings(deadline=None, max_examples=40)
@given(
    fmt=st.sampled_from(FORMATS), seed=st.integers(0, 1000), rows=st.integers(1, 9), columns=st.integers(1, 40),
    kind=st.sampled_from(["uniform", "energy", "covariance"]),
)  # fmt: skip
def test_the_search_never_costs_more_than_the_extremes(fmt: str, seed: int, rows: int, columns: int, kind: str) -> None:
    w, f = weight(rows, columns, seed=seed), Format.parse(fmt)
    moments = Moments(block=None if kind == "energy" else 8)
    moments.update(weight(64, columns, seed=seed + 1))
    importance = None if kind == "uniform" else moments.importance()
    found = search(w, f, importance)
    assert found.scale.dtype == f.scale_dtype and found.scale.shape == f.scale_shape(w.shape)
    least = error(w, f, choose_qparams(w, f), importance)
    assert error(w, f, found, importance) <= least * (1 + 1e-4) + 1e-6


@settings(deadline=None, max_examples=60)
@given(
    fmt=st.sampled_from([*FORMATS, "u8/g16", "i8/g16/f16", "u5/ch", "u4"]), seed=st.integers(0, 1000),
    shape=st.sampled_from([(1, 1), (3, 40), (9, 16), (2, 5, 33)]), share=st.floats(0.1, 1.2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_rounded_is_what_the_codes_say(
    fmt: str, seed: int, shape: tuple[int, ...], share: float, dtype: torch.dtype
) -> None:
    """Bit by bit, where values are clipped, too; and the weight stays as it was."""
    f = Format.parse(fmt)
    w = weight(*shape, seed=seed).to(dtype)
    params = choose_qparams(share * w.to(torch.float32), f)
    before = w.clone()
    assert torch.equal(rounded(w, f, params), dequantize(quantize(w, f, *params), f, *params))
    assert torch.equal(w, before)


def test_rounded_takes_no_zero_points_that_are_missing_or_packed() -> None:
    w, f = weight(4, 32), Format.parse("u4/g8")
    params = choose_qparams(w, f)
    assert params.zero is not None
    for zero in (None, pack_zeros(params.zero, f)):
        with pytest.raises(AssertionError, match="zero point"):
            rounded(w, f, params._replace(zero=zero))


def test_rounded_takes_a_weight_that_trains() -> None:
    w, f = weight(4, 32).requires_grad_(), Format.parse("u4/g16")
    params = choose_qparams(w.detach(), f)
    assert torch.equal(rounded(w, f, params), rounded(w.detach(), f, params))


@pytest.mark.parametrize("fmt", ["i4/g16", "i3/g16", "i2/g16", "i4/g16/f16", "i4/ch"])
def test_a_negative_scale_turns_the_longer_side_to_the_extreme(fmt: str) -> None:
    """max / -8 has a step of 1/8 of the greatest value, where a positive scale has 1/7 or clips it."""
    f = Format.parse(fmt)
    codes = torch.arange(f.qmin, f.qmax + 1).to(torch.float32).repeat(16)[:16]
    w = -codes[None] * 0.25  # the greatest magnitude is above zero
    found = search(w, f)
    assert bool((found.scale < 0).all())
    assert torch.equal(rounded(w, f, found), w)
    assert error(w, f, choose_qparams(w, f)) > 0
    assert bool((search(-w, f).scale > 0).all())


@pytest.mark.parametrize("fmt", ["i8/ch", "f8e4m3/ch", "nf4/g16", "i4/g16/e8m0"])
def test_types_without_a_longer_side_keep_positive_scales(fmt: str) -> None:
    found = search(weight(8, 32), Format.parse(fmt))
    assert bool((found.scale.to(torch.float32) > 0).all())


def test_refits_are_least_squares() -> None:
    w, fmt = weight(4, 32).abs() + 1, Format.parse("u4/g16")
    params = choose_qparams(w, fmt)
    codes = quantize(w, fmt, *params)

    def loss(p: tuple[Tensor, Tensor | None]) -> float:
        return float((dequantize(codes, fmt, *p) - w).square().sum())

    fitted = refit_scale(w, fmt, codes, params)
    assert loss(fitted) < loss(params)
    for factor in (0.999, 1.001):
        assert loss((fitted.scale * factor, fitted.zero)) > loss(fitted)
    assert params.zero is not None
    far = params._replace(zero=params.zero + 3)
    near = refit_zero(w, fmt, codes, far)
    assert near.zero is not None and near.zero.dtype == torch.uint8
    assert loss(near) < loss(far) and torch.equal(near.zero, params.zero)


def test_a_zero_point_stays_in_its_range() -> None:
    fmt = Format.parse("u4/ch")
    w = torch.full((2, 8), 5.0)
    for sign in (1, -1):
        found = search(sign * w, fmt)
        assert found.zero is not None and int(found.zero.max()) <= 15
        assert torch.allclose(rounded(sign * w, fmt, found), sign * w, rtol=1e-6)


def test_what_costs_nothing_may_be_wrong() -> None:
    """Channels that are never seen do not hold the scale: the others get all of its steps."""
    w = torch.cat([weight(4, 15, seed=3).clamp(-1, 1), torch.full((4, 1), 1.9)], -1)
    energy = torch.ones(16)
    energy[15] = 0
    fmt = Format.parse("i4/g16")
    blind, seeing = (rounded(w, fmt, search(w, fmt, i)) for i in (None, Importance(energy)))
    assert float((seeing - w)[:, :15].square().sum()) < 0.6 * float((blind - w)[:, :15].square().sum())


def test_best_takes_each_scale_by_itself() -> None:
    w, fmt = torch.tensor([[1.0, -1.0, 4.0, -4.0]]), Format.parse("i8/g2")
    start = choose_qparams(w, fmt)
    best = Best(w, fmt, torch.square, start)
    best.offer(start._replace(scale=start.scale * torch.tensor([[0.1, 1.0]])))
    assert torch.equal(best.params.scale, start.scale)
    worse = Best(w, fmt, torch.square, start._replace(scale=start.scale * 3))
    worse.offer(start)
    assert torch.equal(worse.params.scale, start.scale) and float(worse.least.max()) < 1e-10


def test_zeros_and_bad_values() -> None:
    zeros = torch.zeros(4, 32)
    for fmt in map(Format.parse, FORMATS):
        assert torch.equal(rounded(zeros, fmt, search(zeros, fmt)), zeros)


def plainly(w: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """`search` by its definition: every refit of every group, in memory of its own, of codes that are made."""
    best = explore(w, fmt, torch.square)
    for _ in range({2: 4, 3: 4, 4: 4, 5: 3}.get(fmt.bits, 2)):
        params = best.params
        best.offer(refit_scale(w, fmt, quantize(w, fmt, *params), params))
        for step in (-1, 1) if fmt.has_zero and fmt.bits <= 5 else ():
            assert params.zero is not None
            moved = params._replace(zero=(params.zero.int() + step).clamp(0, fmt.qmax).to(torch.uint8))
            best.offer(refit_scale(w, fmt, quantize(w, fmt, *moved), moved))
    return best.params


@pytest.mark.parametrize("fmt", [*FORMATS, "u3/g32/f16", "u5/ch", "u6/g16", "u8/g16", "nf4/ch", "nf4/g16/dq"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 16), (40, 70), (2, 5, 33)])
@pytest.mark.parametrize("elements", [1 << 18, 100])
def test_the_search_by_rows_and_of_what_changed_is_the_plain_one(
    fmt: str, shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: padded groups, rows searched part by part, and refits of those alone that the last one changed."""
    monkeypatch.setattr(scales, "_ELEMENTS", elements)
    f, w = Format.parse(fmt), weight(*shape, seed=7)
    before = w.clone()
    for made, wanted in zip(search(w, f), plainly(w, f), strict=True):
        if made is None or wanted is None:
            assert made is wanted
            continue
        assert made.dtype == wanted.dtype and made.shape == wanted.shape
        assert made.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))
    assert torch.equal(w, before)


def test_refits_go_on_where_the_last_one_helped_alone() -> None:
    """Rows that are taken out are put back where they were, and their costs with them."""
    f, w = Format.parse("u3/ch"), weight(6, 16, seed=3)
    start = choose_qparams(w, f)
    best = Best(w, f, torch.square, start._replace(scale=start.scale * 3))
    rows = torch.tensor([4, 1])
    some = best.only(rows)
    assert torch.equal(some.full, w[rows]) and torch.equal(some.least, best.least[rows])
    assert start.zero is not None
    better = some.offer(QParams(start.scale[rows], start.zero[rows]))
    assert better.shape == (2, 1) and better.any()
    kept, least = best.params.scale.clone(), best.least.clone()
    best.take(rows, some)
    assert torch.equal(best.params.scale[rows], some.params.scale) and torch.equal(best.least[rows], some.least)
    others = [0, 2, 3, 5]
    assert torch.equal(best.params.scale[others], kept[others]) and torch.equal(best.least[others], least[others])
    free = Best(w, f, torch.square, start, torch.zeros(6, 1))
    assert not free.offer(best.params).any()  # negative control: nothing costs less than nothing


def test_an_empty_weight_has_scales_of_its_shape() -> None:
    found = search(torch.zeros(0, 32), Format.parse("u4/g16"))
    assert found.scale.shape == (0, 2) and found.zero is not None and found.zero.shape == (0, 2)


def brute(w: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The least squared error of groups [G, N] under any scale of a fine grid and any zero point, [G]."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    top = (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1
    bottom = 0 if not symmetric else -top if bits == 8 else -top - 1
    extent = torch.maximum(-low, high) / top if symmetric else (high - low) / top
    least = torch.full_like(low, torch.inf)
    for zero in (0,) if symmetric else range(top + 1):
        for factor in torch.linspace(0.25, 1.15, 181).tolist():
            for sign in (1, -1) if symmetric else (1,):
                scale = (extent * factor * sign)[:, None]
                values = ((w / scale).round() + zero).clamp(bottom, top) - zero
                fitted = (values * w).sum(1, keepdim=True) / values.square().sum(1, keepdim=True).clamp(min=1e-30)
                least = torch.minimum(least, (values * fitted - w).square().sum(1))
    return least


@pytest.mark.parametrize(
    ("fmt", "above"),
    [("i2", 0.01), ("u2", 0.01), ("i3", 0.01), ("u3", 0.01), ("i4", 0.01), ("u4", 0.02), ("i6", 0.02), ("i8", 0.05)],
)
def test_the_search_is_near_the_best_of_all_scales(fmt: str, above: float) -> None:
    """Against a grid of some hundred scales and all zero points, for values like a bell and with long tails."""
    f, w = Format.parse(f"{fmt}/g64"), weight(64, 64, seed=3)
    least = float(brute(w, f.bits, f.symmetric).sum())
    assert error(w, f, search(w, f)) <= (1 + above) * least


@pytest.mark.parametrize("fmt", [*(f"i{b}/g64" for b in range(2, 9)), "u8/ch", "nf4/g64", "f8e4m3/ch", "f8e5m2/ch"])
def test_shares_begin_with_the_extremes_and_span_more_for_fewer_bits(fmt: str) -> None:
    f = Format.parse(fmt)
    tried = shares_of(f)
    assert tried[0] == 1.0 and all(0.25 < share < 1.15 for share in tried)
    if f.is_integer and f.bits > 2:
        assert min(shares_of(Format.parse(f"i{f.bits - 1}"))) <= min(tried)


BELL = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("fmt", "most"),
    [("u8/g32", 0.78), ("i8/g32", 0.81), ("u8/g64", 0.86), ("i8/g64", 0.88), ("u6/g32", 0.85), ("u5/g32", 0.91)],
)
def test_of_many_bits_the_best_of_wider_steps_is_nearer(fmt: str, most: float) -> None:
    """Shares of at most the extremes, as many, find less: what is gained comes of other roundings, not of clipping."""
    f = Format.parse(fmt)
    nearest = error(BELL, f, choose_qparams(BELL, f))
    assert error(BELL, f, search(BELL, f)) < most * nearest
    below = [1 - 0.07 * step / 20 for step in range(21)]
    assert error(BELL, f, explore(BELL, f, torch.square, below).params) > 1.02 * error(BELL, f, search(BELL, f))


def test_zero_points_of_eight_bits_are_those_of_the_range() -> None:
    """Another one gives the same codes, moved: steps of zero points are left out, and nothing is lost by it."""
    f, w = Format.parse("u8/g32"), BELL[:16]
    found = search(w, f)
    assert found.zero is not None
    for step in (-1, 1):
        moved = found._replace(zero=(found.zero.to(torch.int16) + step).clamp(0, 255).to(torch.uint8))
        refitted = refit_scale(w, f, quantize(w, f, *moved), moved)
        assert error(w, f, refitted) > 0.998 * error(w, f, found)
