"""Charts: the front holds whom nobody beats, bars add up, axes are those of the values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install qfx[pictures]")

from qfx.pictures import charts
from qfx.pictures.charts import Pair, Point, Size

POINTS = st.lists(st.builds(Point, st.just(""), st.integers(1, 9), st.sampled_from([0.1, 0.2, 0.3])), max_size=12)


@given(POINTS)
def test_the_front_beats_or_equals_every_point(points: list[Point]) -> None:
    front = charts.front(points)
    for point in points:
        assert any(best.bytes <= point.bytes and best.loss <= point.loss for best in front)
    for point in front:
        assert not any(o.bytes <= point.bytes and o.loss < point.loss for o in points)


def test_points_of_one_group_are_one_line() -> None:
    points = [Point("a", 2_000_000, 0.1, "x"), Point("b", 1_000_000, 0.4, "x"), Point("c", 1_000_000, 0.2, "y")]
    axis = charts.pareto(points, what="loss", title="t").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["Pareto front", "x", "y"]
    assert axis.get_yscale() == "log" and axis.get_ylabel() == "loss"
    (x,) = (line for line in axis.lines if line.get_label() == "x")
    assert list(x.get_xdata()) == [1, 2] and list(x.get_ydata()) == [0.4, 0.1]
    assert sorted(text.get_text() for text in axis.texts) == ["a", "c"], "those of the front are named"


def test_bars_are_the_bytes_of_each_layer() -> None:
    parts = [Size("l.0", "q", 1000, 500), Size("l.0", "linear", 3000, 1000), Size("", "embedding", 1000, 1000)]
    axis = charts.sizes(parts, title="t").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["l.0", "beside the layers"]
    assert [text.get_text().strip() for text in axis.texts] == ["2 kB, 3.00 bits", "1 kB, 8.00 bits"]
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axis.containers}
    assert bars == {"in 16 bits": [8.0, 2.0], "q": [0.5, 0.0], "linear": [1.0, 0.0], "embedding": [0.0, 1.0]}


def test_pairs_that_cannot_be_drawn_on_a_logarithm_are_left_out() -> None:
    pairs = [Pair("q", 3, 1e-3, 2e-3), Pair("q", 4, 0.0, 1e-4), Pair("linear", 4, 1e-2, 1e-2)]
    axis = charts.predicted(pairs, what="loss", title="t").axes[0]
    assert sum(len(found.get_offsets()) for found in axis.collections) == 2
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["3 bits", "4 bits", "q", "linear"]
    assert axis.get_xscale() == axis.get_yscale() == "log"


def test_every_kind_has_a_sign_of_its_own() -> None:
    assert len(set(charts.COLOURS.values())) == len(charts.COLOURS) == len(set(charts._SIGNS.values()))
