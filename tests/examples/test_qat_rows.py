"""Rates, groups, tables and pictures that the examples of training with quantization share."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import qfx
from examples.qat_rows import (
    FLOAT,
    PTQ,
    Row,
    by_method,
    mean_and_spread,
    parameter_groups,
    plot,
    rate_at,
    set_rate,
    shown,
    with_recovered,
)


@pytest.mark.parametrize("last", [0.0, 0.1])
def test_the_rate_rises_and_falls(last: float) -> None:
    rates = [rate_at(step, 40, 1.0, last=last) for step in range(40)]
    assert rates[0] == 0.5 and rates[1] == max(rates) == 1.0
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert last <= rates[-1] < last + 0.02


def test_one_step_has_the_whole_rate() -> None:
    assert rate_at(0, 1, 3.0) == 3.0


def rows() -> list[Row]:
    return [
        Row(FLOAT, "", 10.0),
        Row("a", PTQ, 14.0),
        Row("a", "QAT", 11.0, seed=0, curve=[(0, 14.0), (5, 11.0)]),
        Row("a", "QAT", 12.0, seed=1, curve=[(0, 14.0), (5, 12.0)]),
        Row("b", "QAT", 11.0, seed=0, curve=[(0, 14.0), (5, 11.0)]),
    ]


def test_recovered_is_the_share_of_what_rounding_costs() -> None:
    found = rows()
    with_recovered(found)
    assert [row.recovered for row in found] == [None, None, 0.75, 0.5, None]


def test_each_seed_has_its_own_loss() -> None:
    found = [Row(FLOAT, "", 90.0, 0), Row(FLOAT, "", 80.0, 1), Row("a", PTQ, 80.0, 0), Row("a", PTQ, 60.0, 1)]
    found += [Row("a", "QAT", 85.0, 0), Row("a", "QAT", 75.0, 1)]
    with_recovered(found)
    assert [row.recovered for row in found[-2:]] == [0.5, 0.75]


def test_what_costs_nothing_has_nothing_to_give_back() -> None:
    found = [Row(FLOAT, "", 10.0), Row("a", PTQ, 10.0), Row("a", "QAT", 9.0)]
    with_recovered(found)
    assert found[-1].recovered is None


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([1.25], "1.2"), ([1.0, 3.0], "2.0 ± 1.4"), ([1.0, 1.0, 4.0], "2.0 ± 1.7")]
)
def test_the_mean_and_the_spread(values: list[float], text: str) -> None:
    assert mean_and_spread(values, ".1f") == text


def test_the_table_has_a_line_for_each_way() -> None:
    found = rows()
    with_recovered(found)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(shown(found, "perplexity", "title"))
    text = console.export_text()
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["fp32", "a", "a", "b"]
    assert "11.500 ± 0.707" in text and "62% ± 18%" in text and "0 1" in text


def test_the_ways_of_a_recipe_follow_one_another() -> None:
    found = by_method([*rows(), Row("a", "other", 1.0), Row("b", PTQ, 2.0)])
    assert list(found) == [(FLOAT, ""), ("a", PTQ), ("a", "QAT"), ("a", "other"), ("b", "QAT"), ("b", PTQ)]
    assert [row.seed for row in found["a", "QAT"]] == [0, 1]


def test_weights_and_scales_have_rates_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].requires_grad_(False)
    assert len(parameter_groups(net, 5.0)) == 1, "no scales"
    net[0].requires_grad_(True)
    model = qfx.prepare_qat(net, {"rules": [{"target": "linear", "w": "u4/g8"}]}, [torch.zeros(2, 8)])
    optimizer = torch.optim.SGD(parameter_groups(model, 5.0), lr=1.0)
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    named = {id(p): name for name, p in model.named_parameters()}
    weights, scales = ({named[id(p)].rsplit(".")[-1] for p in group["params"]} for group in optimizer.param_groups)
    assert weights == {"weight", "bias"} and scales == {"log_scale", "zero_shift"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_the_picture_shows_what_the_curves_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of the float model and of PTQ lie where their curves end, else at their scores; bands span the seeds."""
    plt = pytest.importorskip("matplotlib.pyplot")
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    found = [*rows()[1:], Row("a", "PTQ by gptq", 12.5), Row(FLOAT, "", 10.0, curve=[(0, 20.0), (5, 9.5)])]
    plot(tmp_path / "p.png", found, "perplexity")
    assert (tmp_path / "p.png").stat().st_size > 1000
    first, second = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in first.lines}
    assert lines == {PTQ: [14.0, 14.0], "PTQ by gptq": [12.5, 12.5], "QAT": [14.0, 11.5], FLOAT: [9.5, 9.5]}
    assert first.get_title() == "a" and second.get_title() == "b"
    assert first.collections[0].get_datalim(first.transData).bounds[1::2] == pytest.approx((11.0, 3.0))
    monkeypatch.undo()
    plt.close(kept[0])
