"""qfx.calibration.observers: ranges against numpy and scipy, merging, what is refused."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.calibration.observers import EMA, MSE, AbsMax, Entropy, MinMax, Observer, Percentile, create
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.recipe import Recipe
from tests.seeded import randn

OBSERVERS: tuple[str, ...] = get_args(Recipe.model_fields["observer"].annotation)
U8 = Format.parse("u8")


def outliers() -> Tensor:
    """Normal values with one channel that is 60 times larger."""
    x = randn(64, 128, seed=3)
    x[:, 5] *= 60
    return x


def fed(observer: Any, *batches: Tensor) -> Any:
    for batch in batches:
        observer.update(batch)
    return observer


def test_the_kinds_are_those_of_recipes() -> None:
    assert [create(kind, U8).__class__.__name__.lower() for kind in OBSERVERS] == list(OBSERVERS)


def test_minmax_and_absmax_per_tensor() -> None:
    a, b = randn(3, 5), randn(3, 5, seed=1) - 0.5
    low, high = fed(MinMax(), a, b).range()
    both = np.stack([a.numpy(), b.numpy()])
    assert (float(low), float(high)) == (both.min(), both.max())
    assert low.shape == () and low.dtype == torch.float32
    low, high = fed(AbsMax(), a, b).range()
    assert -float(low) == float(high) == np.abs(both).max()


@pytest.mark.parametrize("kind", [AbsMax, MinMax, EMA, Percentile, MSE, Entropy])
@pytest.mark.parametrize(("granularity", "axis", "shape"), [("ch", -1, (6,)), ("head", -3, (4, 1, 1))])
def test_rows_are_independent(kind: Any, granularity: str, axis: int, shape: tuple[int, ...]) -> None:
    x = randn(2, 4, 50, 6) * torch.arange(1, 7)
    low, high = fed(kind(granularity), x).range(U8)
    assert low.shape == high.shape == torch.Size(shape)
    for i in range(x.shape[axis]):
        alone = kind(granularity)
        alone.update(x.narrow(axis, i, 1))
        least, greatest = alone.range(U8)
        torch.testing.assert_close(low.flatten()[i], least.flatten()[0], rtol=2e-2, atol=0)
        torch.testing.assert_close(high.flatten()[i], greatest.flatten()[0], rtol=2e-2, atol=0)


def test_scales_have_the_shape_of_the_format() -> None:
    x = randn(2, 4, 7, 6)
    for text in ("u8", "i8", "u8/ch", "i8/head"):
        fmt = Format.parse(text)
        scale, zero = fed(create("minmax", fmt), x).qparams(fmt)
        assert scale.shape == fmt.scale_shape(x.shape, activation=True)
        assert (zero is not None) == fmt.has_zero
        error = (fake_quantize(x, fmt, scale, zero, activation=True) - x).abs()
        assert bool((error <= scale / 2 * 1.001).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_f32_ranges(dtype: torch.dtype) -> None:
    x = (randn(1000) * 3).to(dtype)
    for kind in OBSERVERS:
        low, high = fed(create(kind), x).range()
        expected = fed(create(kind), x.to(torch.float32)).range()
        assert low.dtype == torch.float32 and (low, high) == expected


def test_ema_is_the_weighted_mean_of_batches() -> None:
    batches = [randn(10, seed=seed) for seed in range(5)]
    observer = fed(EMA(decay=0.7), *batches)
    weights = np.array([0.7 ** (4 - i) for i in range(5)])
    expected = np.average([float(b.max()) for b in batches], weights=weights)
    assert float(observer.range()[1]) == pytest.approx(expected, rel=1e-6)
    assert fed(EMA(), batches[0]).range()[1] == batches[0].max()


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_percentile_against_numpy(percentile: float, scale: float) -> None:
    x = randn(20000) * scale
    observer = fed(Percentile(percentile=percentile), *x.split(1700))
    assert observer.histogram is not None
    low, high = observer.range()
    for found, q in ((low, 100 - percentile), (high, percentile)):
        expected = float(np.percentile(x.numpy(), q))
        assert float(found) == pytest.approx(expected, abs=2 * observer.histogram.width + 2e-3 * abs(expected))


def test_percentile_100_is_the_exact_range() -> None:
    x = randn(999)
    assert fed(Percentile(percentile=100), x).range() == (x.min(), x.max())


@pytest.mark.parametrize("text", ["u8", "i8", "u4", "i4", "f8e4m3"])
def test_mse_is_near_the_best_clipping(text: str) -> None:
    fmt, x = Format.parse(text), outliers()
    scale, zero = fed(MSE(), x).qparams(fmt)
    found = float((fake_quantize(x, fmt, scale, zero) - x).square().mean())
    tried = []
    for shrink in np.linspace(0.02, 1, 50):
        clipped = fed(MinMax(), x * shrink).qparams(fmt)
        tried.append(float((fake_quantize(x, fmt, *clipped) - x).square().mean()))
    assert found <= min(tried) * 1.05
    assert found <= tried[-1]


def test_mse_clips_what_minmax_keeps() -> None:
    x = randn(100000)
    x[0] = 40.0
    assert 2.0 < float(fed(MSE(), x).range(U8)[1]) < 39.0
    assert float(fed(MinMax(), x).range(U8)[1]) == 40.0


@pytest.mark.parametrize("kind", ["mse", "entropy", "percentile"])
def test_one_sided_and_constant_data(kind: str) -> None:
    low, high = fed(create(kind), randn(5000).relu()).range(U8)
    assert 0.0 <= float(low) < 1e-5 and float(high) > 1.0
    for value in (0.0, -2.0, 3.0):
        x = torch.full((64,), value)
        scale, zero = fed(create(kind), x).qparams(U8)
        torch.testing.assert_close(fake_quantize(x, U8, scale, zero), x, rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_nan_and_inf_name_the_node_and_the_batch(kind: str) -> None:
    observer = create(kind, name="encoder.fc1 x")
    observer.update(randn(8))
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=r"(?s)batch 1.*encoder\.fc1 x"):
            observer.update(torch.tensor([1.0, bad]))
        with pytest.raises(ValueError, match="batch 7"):
            observer.update(torch.tensor([1.0, bad]), batch=7)
    assert observer.seen == 8


@pytest.mark.parametrize("kind", OBSERVERS)
def test_no_data_is_told_by_name(kind: str) -> None:
    observer = create(kind, name="decoder.fc2 x")
    observer.update(torch.zeros(0, 4))
    assert observer.seen == 0
    with pytest.raises(ValueError, match=r"no data reached 'decoder\.fc2 x'"):
        observer.qparams(U8)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="did you mean 'minmax'"):
        create("min-max")
    with pytest.raises(ValueError, match="granularity 'g32'"):
        create("minmax", Format.parse("i8/g32"))
    with pytest.raises(ValueError, match=r"expected floats, found torch\.int64"):
        MinMax().update(torch.arange(3))
    with pytest.raises(ValueError, match="gives no scale for 'i8/ch'"):
        fed(MinMax(), randn(3)).qparams(Format.parse("i8/ch"))
    with pytest.raises(ValueError, match="had 4 ch rows"):
        fed(MinMax("ch"), randn(2, 4), randn(2, 5))
    with pytest.raises(ValueError, match="no axis -3"):
        fed(MinMax("head"), randn(2, 4))
    with pytest.raises(ValueError, match="cannot merge observers"):
        MinMax().merge(MinMax("ch"))
    with pytest.raises(ValueError, match="above 50"):
        Percentile(percentile=20)
    with pytest.raises(ValueError, match="power of two"):
        Percentile(bins=100)
    with pytest.raises(ValueError, match="below 1"):
        EMA(decay=1.0)


VALUES = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32) | st.just(0.0)
BATCHES = st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=1, max_size=6)


def state(observer: Observer) -> tuple[Any, ...]:
    """What ranges are computed from."""
    histogram = getattr(observer, "histogram", None)
    counts = None if histogram is None else (histogram.counts.tolist(), histogram.exponent)
    return (observer.extremes()[0].tolist(), observer.extremes()[1].tolist(), counts, observer.seen)


@pytest.mark.parametrize("kind", [AbsMax, MinMax, lambda: Percentile(bins=64)])
@settings(max_examples=50, deadline=None)
@given(batches=BATCHES, data=st.data())
def test_order_cuts_and_merges_do_not_matter(kind: Any, batches: list[list[float]], data: st.DataObject) -> None:
    whole = state(fed(kind(), torch.tensor([v for batch in batches for v in batch])))
    shuffled = data.draw(st.permutations(batches))
    assert state(fed(kind(), *map(torch.tensor, shuffled))) == whole
    cut = data.draw(st.integers(0, len(batches)))
    first, second = fed(kind(), *map(torch.tensor, batches[:cut])), fed(kind(), *map(torch.tensor, batches[cut:]))
    assert state(first.merge(second)) == whole


@settings(max_examples=30, deadline=None)
@given(batches=BATCHES, cut=st.integers(0, 6))
def test_a_merged_moving_average_is_that_of_one_pass(batches: list[list[float]], cut: int) -> None:
    tensors = list(map(torch.tensor, batches))
    merged = fed(EMA(), *tensors[:cut]).merge(fed(EMA(), *tensors[cut:]))
    for found, expected in zip(merged.range(), fed(EMA(), *tensors).range(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)


def test_merging_leaves_the_other_observer_alone() -> None:
    other = fed(Percentile(), randn(50) * 100)
    before = state(other)
    fed(Percentile(), randn(50)).merge(other).merge(Percentile())
    Percentile().merge(other).update(randn(50) * 1000)
    assert state(other) == before


def test_memory_does_not_grow_with_the_data() -> None:
    observer = Percentile("ch", bins=64)
    for seed in range(5):
        observer.update(randn(100, 8, seed=seed) * 10**seed)
    assert observer.histogram is not None
    assert observer.histogram.counts.shape == (8, 64)
    assert int(observer.histogram.counts.sum()) == observer.seen == 4000
