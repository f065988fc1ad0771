"""The benchmark of allocation: what is measured is what is stored, and what the rows say is told."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")

from examples.benchmarks import allocation
from examples.benchmarks import allocation_baselines as baselines
from examples.benchmarks.allocation import BY_GAIN, BY_LOSS, LAYERS, PLANNED
from qfx.format import Format
from qfx.measuring import measure


def row(peer: str, kld: float, bits: float = 3.0, size: int = 1000) -> dict[str, Any]:
    return {"peer": peer, "kld": kld, "bits": bits, "size_bytes": size, "perplexity": 30.0, "top1": 0.8}


def found(
    planned: float = 0.5, layers: float = 0.6, random_: float = 0.9, inverted: float = 1.5, predicted: float = 1.6
) -> list[dict[str, Any]]:
    others = [row("uniform", 1.0), row("by layer type", 0.8), row("random 0", random_), row("random 1", random_ + 0.1)]
    return [*others, row(BY_GAIN, inverted), row(BY_LOSS, predicted), row(LAYERS, layers), row(PLANNED, planned)]


def test_goals_that_hold() -> None:
    told = allocation.verdicts("3", found())
    assert [line.partition(":")[0] for line in told] == ["holds"] * 5
    assert "0.625 of the KLD of the best baseline (by layer type)" in told[0]
    assert "heads have 0.833" in told[1] and "0.500 of uniform's KLD" in told[2]
    assert "random 0.95000 (spread 0.07071), inverted, measured gain 1.50000" in told[3]
    assert "inverted, predicted loss 1.60000" in told[4]


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({"planned": 0.85, "layers": 0.86}, [0, 2]),  # by layer type is better, and uniform is too near
        ({"layers": 0.4}, [1]),
        ({"planned": 0.7, "layers": 0.71, "random_": 0.65}, [0, 3, 4]),  # random is better
        ({"inverted": 0.7}, [3]),
        ({"predicted": 0.9}, [4]),
    ],
)
def test_goals_that_are_missed_are_told(figures: dict[str, float], missed: list[int]) -> None:
    told = allocation.verdicts("3", found(**figures))
    assert [i for i, line in enumerate(told) if line.startswith("MISSED")] == missed, told


def test_budgets_without_a_goal_or_a_uniform_format() -> None:
    assert len(allocation.verdicts("5", found())) == 4
    rows = [each for each in found() if each["peer"] != "uniform"]
    assert len(allocation.verdicts("3", rows)) == 4


def test_the_plot_is_written(tmp_path: Path) -> None:
    allocation.plot(tmp_path / "kld.png", {"3": found(), "4": found(0.1, 0.2)})
    assert (tmp_path / "kld.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_mix_is_made_of() -> None:
    low, high = Format.parse("u3/g64/f16"), Format.parse("u5/g64/f16")
    assert allocation.said({"a": low, "b": (low, high, low, low), "c": low}) == "u3/g64:5 u5/g64:1"


def test_more_windows_than_there_are() -> None:
    with pytest.raises(ValueError, match="the text has [0-9]+ windows of 512 tokens, asked for 1000 and 2 others"):
        allocation.Bench(calibration=1000, evaluation=2)


@pytest.fixture(scope="module")
def bench() -> allocation.Bench:
    return allocation.Bench(calibration=2, evaluation=2)


def mixed(bench: allocation.Bench) -> baselines.Assignment:
    generator = random.Random(0)
    formats = [baselines.affine(bits, 32) for bits in (3, 4, 5)]
    return {name: generator.choice(formats) for name in bench.weights.units}


@pytest.mark.slow
def test_what_is_measured_is_what_is_stored(bench: allocation.Bench) -> None:
    """Bytes by segments are those of the report; the divergence of `Measure` is that of the quantized model."""
    mix = mixed(bench)
    formats = bench.weights.formats(mix)
    plan = bench.plan_of(formats)
    figures = bench.figures(plan)
    assert figures["size_bytes"] == bench.weights.nbytes(mix)
    assert figures["bits"] == pytest.approx(8 * figures["size_bytes"] / bench.weights.elements)
    live = bench._calibration_kld(plan)
    assert bench.measure.kld(mix) == pytest.approx(live, rel=1e-3)
    assert allocation.assignment_of(bench.weights, plan) == mix
    assert figures["kld"] > 0 and 0 < figures["top1"] < 1


@pytest.mark.slow
def test_budgets_as_text(bench: allocation.Bench) -> None:
    assert bench.budget("4") == bench.weights.elements // 2
    fmt = Format.parse("u4/g64/f16")
    assert bench.budget("u4/g64/f16") == bench.weights.nbytes(bench.weights.whole(lambda _: fmt))
    with pytest.raises(ValueError, match="bad format 'much'"):
        bench.budget("much")


@pytest.mark.slow
def test_rows_of_one_budget(bench: allocation.Bench) -> None:
    """With the mix of some seed in place of a plan, every way is there, within the budget."""
    mix = mixed(bench)
    made = bench.plan_of(bench.weights.formats(mix))
    rows = allocation.rows(bench, "4.9", seeds=2, plan=lambda *_: made)
    assert [r["peer"] for r in rows] == [
        "random 0", "random 1", BY_GAIN, BY_LOSS, "uniform", "uniform, filled up", "by layer type",
        "Q4_K_M-style mix", "outlier channels apart", LAYERS, PLANNED,
    ]  # fmt: skip
    assert all(r["size_bytes"] <= bench.budget("4.9") and r["kld"] > 0 for r in rows)
    assert rows[4]["ratio"] == 1.0
    assert rows[-1]["kld"] == rows[-2]["kld"]
    assert len({r["size_bytes"] for r in [*rows[:4], *rows[-2:]]}) == 1
    with pytest.raises(AssertionError, match=f"{LAYERS} takes [0-9]+ bytes of"):
        allocation.rows(bench, "3", seeds=1, plan=lambda *_: made)


@pytest.mark.slow
def test_float_logits_are_those_of_the_model(bench: allocation.Bench) -> None:
    assert bench.float.shape[:2] == (2, 512)
    assert torch.equal(bench.logits(bench.model), bench.float)
    assert measure.perplexity(bench.float, bench.evaluation) < 100
