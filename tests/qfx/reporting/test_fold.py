"""qfx.reporting.fold: names with ranges, and that a range names nothing that is not there."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from qfx.reporting.fold import Folded, fold
from qfx.reporting.rows import Row


def folded(*nodes: str) -> list[str]:
    return [one.name for one in fold([Row(node, "linear") for node in nodes], lambda row: row.op)]


def named(name: str) -> set[str]:
    """The nodes that a name with ranges stands for."""
    parts = []
    for part in name.split("."):
        spans = [span.split("-") for span in part.split(",")] if re.fullmatch(r"[0-9,-]+", part) else []
        parts.append([str(i) for a in spans for i in range(int(a[0]), int(a[-1]) + 1)] or [part])
    return {".".join(chosen) for chosen in itertools.product(*parts)}


def test_layers() -> None:
    assert folded("h.0.q", "h.0.k", "h.1.q", "h.1.k", "h.2.q", "h.2.k") == ["h.0-2.q", "h.0-2.k"]
    assert folded("h.0.q", "h.2.q", "h.3.q", "h.7.q") == ["h.0,2-3,7.q"]
    assert folded("h.10.q", "h.9.q") == ["h.9-10.q"], "numbers, not texts"
    assert folded("h.3.q") == ["h.3.q"] and folded() == []


def test_numbers_inside_a_word_are_names() -> None:
    assert folded("fc1", "fc2", "conv_1", "conv_2") == ["fc1", "fc2", "conv_1", "conv_2"]


def test_layers_of_experts_where_all_are_there() -> None:
    nodes = [f"h.{i}.experts.{j}.w1" for i in range(2) for j in range(3)]
    assert folded(*nodes) == ["h.0-1.experts.0-2.w1"]
    less = ["h.0.experts.0-2.w1", "h.1.experts.0-1.w1"]
    assert folded(*nodes[:-1]) == less, "one range for both would name one that is not there"
    assert folded("h.0.w", "h.1.w", "h.1.w") == ["h.0.w", "h.1.w", "h.1.w"], "a range would name one of them"


def test_what_is_not_the_same_stays_apart() -> None:
    rows = [Row("h.0.q", "linear", kernel="a"), Row("h.1.q", "linear", kernel="b"), Row("h.2.q", "linear", kernel="a")]
    assert [one.name for one in fold(rows, lambda row: row.kernel)] == ["h.0,2.q", "h.1.q"]


def test_sums_and_extremes() -> None:
    rows = (Row("h.0.q", "linear", bytes_after=3, sqnr_db=9.0), Row("h.1.q", "linear", bytes_after=4, sqnr_db=5.0))
    one = Folded("h.0-1.q", rows)
    assert (one.nbytes, one.sqnr_db) == (7, 5.0)
    assert Folded("a", (Row("a", "linear"),)).sqnr_db is None


part = st.sampled_from(["a", "b", "0", "1", "2", "4", "10"])


@given(st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), unique=True, max_size=12))
def test_names_stand_for_the_nodes_and_no_others(nodes: list[str]) -> None:
    found = fold([Row(node, "linear") for node in nodes], lambda row: row.op)
    assert sorted(row.node for one in found for row in one.rows) == sorted(nodes)
    for one in found:
        assert named(one.name) == {row.node for row in one.rows}
