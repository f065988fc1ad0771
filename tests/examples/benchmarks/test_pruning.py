"""The pruning experiment: what is left out is left out, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from examples.benchmarks import pruning
from examples.benchmarks.allocation import Bench
from examples.benchmarks.pruning import LOW, LOWER, Heads, sparse, thresholded
from qfx.capture import capture_export
from qfx.pipeline import prepare


@pytest.mark.parametrize("mask", ["none", "causal", "keep", "add"])
def test_without_a_threshold_it_is_attention(mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    keep = torch.ones(5, 5, dtype=torch.bool).tril(1)
    given = {"keep": keep, "add": torch.zeros(5, 5).masked_fill(~keep, -torch.inf)}.get(mask)
    for scale in (None, 0.5):
        wanted = sdpa(q, k, v, attn_mask=given, is_causal=mask == "causal", scale=scale, enable_gqa=True)
        for scaled in (False, True):
            told: list[float] = []
            found = sparse(q, k, v, given, mask == "causal", scale, 0.0, scaled, told)
            assert torch.allclose(found, wanted, atol=1e-6) and told == [0.0]


def test_small_probabilities_are_left_out() -> None:
    q, k = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0], [5.0, 0.0]]]])  # probabilities 0.0067 and 0.9933
    v = torch.tensor([[[[1000.0], [1.0]]]])
    told: list[float] = []
    kept = float(sparse(q, k, v, None, False, 1.0, 0.01, False, told))
    scaled = float(sparse(q, k, v, None, False, 1.0, 0.01, True, told))
    assert kept == pytest.approx(0.9933, abs=1e-4) and scaled == pytest.approx(1.0) and told == [0.5, 0.5]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(calibration=2, evaluation=2)


@pytest.mark.slow
@torch.no_grad()
def test_graphs_with_a_threshold(bench: Bench) -> None:
    captured = capture_export(bench.model, (), bench.data[0])
    prepare(captured.gm)
    flat = captured.flatten((), bench.data[0])
    wanted = captured.gm(*flat)[0]
    told: list[float] = []
    assert torch.allclose(thresholded(captured.gm, 0.0, told, scaled=False)(*flat)[0], wanted, atol=1e-3)
    assert told == [0.0] * bench.weights.layers
    assert not torch.allclose(thresholded(captured.gm, 0.1, told, scaled=False)(*flat)[0], wanted, atol=0.1)
    assert torch.equal(captured.gm(*flat)[0], wanted)


@pytest.mark.slow
@torch.no_grad()
def test_heads(bench: Bench) -> None:
    heads = Heads(bench)
    assert len(heads.units) == 36 and all([u.kind for u in own] == ["q", "o"] for own in heads.units.values())
    one = next(iter(heads.units))
    o = next(unit for unit in heads.units[one] if unit.kind == "o")
    weight = heads.model({}, [one]).get_submodule(o.fqn).weight
    assert not weight[:, o.start : o.stop].any() and weight[:, o.stop :].all()
    low, lower = heads.formats(), heads.formats([one])
    assert {name for name in low if low[name] != lower[name]} == {unit.name for unit in heads.units[one]}
    assert set(lower.values()) == {LOW, LOWER}
    assert heads.nbytes(low, [one]) == heads.nbytes(low) - sum(u.nbytes(LOW) for u in heads.units[one])
    rounded = heads.model(low)
    assert bench.measure.kld(low) == pytest.approx(heads._calibrated(rounded), rel=1e-3)


@pytest.mark.slow
def test_the_experiment_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    pruning.main(evaluation=2, seed=0, quick=True, json_file=numbers)
    found = json.loads(numbers.read_text(encoding="utf-8"))
    none, some = found["values"]
    assert none["zeros"] == 0 and none["float"] < 1e-5 < none["low"] and 0.5 < some["zeros"] < 1
    low, pruned_float, pruned, drawn, bits = found["heads"]
    assert low["kld"] == pytest.approx(none["low"], rel=1e-3)
    assert (
        0 < pruned_float["kld"] < pruned["kld"] < drawn["kld"]
    )  # heads drawn at random cost more: the ranking means something
    assert low["kld"] < bits["kld"] < pruned["kld"] and pruned["bytes"] < bits["bytes"] < low["bytes"]
    assert "query heads left out" in capsys.readouterr().out
