from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from qfx.analysis.predictors import EVERY, compare, fit, spearman
from qfx.analysis.units import Unit


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=12))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = ([float(x) for x in side] for side in zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic), abs=1e-9)


def test_too_few_values_have_no_rank() -> None:
    assert math.isnan(spearman([1, 2], [1, 2]))


def test_the_error_is_what_is_left_behind_one_ratio() -> None:
    assert fit([1, 2, 4], [3, 6, 12]) == pytest.approx((3, 1))
    ratio, error = fit([1, 1], [1, 4])
    assert ratio == pytest.approx(2) and error == pytest.approx(math.exp(math.sqrt(2) * math.log(2)))
    assert fit([0, 1, 1], [1, 2, math.inf]) == pytest.approx((2, 1)), "pairs without a logarithm are left out"
    assert all(math.isnan(x) for x in fit([], []))


def test_rows_by_kind_and_bits() -> None:
    units = [Unit(f"{kind}{i}", f"{kind}{i}", kind, "", (4, 4)) for kind in ("q", "linear") for i in range(3)]
    scores = {u.name: {"u4/g32": i + 1.0, "i8/ch": 0.1} for i, u in enumerate(units)}
    measured = {u.name: {"u4/g32": 2.0 * (i + 1), "u2/g32": 1.0} for i, u in enumerate(units)} | {"gone": {"i8/ch": 1}}
    rows = compare("m", scores, measured, units)
    assert [(r.kind, r.bits, r.count) for r in rows] == [("q", 4, 3), ("linear", 4, 3), (EVERY, 4, 6)]
    assert all(r.method == "m" and r.rank == pytest.approx(1) and r.ratio == pytest.approx(2) for r in rows)
    backwards = {name: {"u4/g32": -row["u4/g32"]} for name, row in scores.items()}
    assert [r.rank for r in compare("m", backwards, measured, units)] == pytest.approx([-1, -1, -1])
