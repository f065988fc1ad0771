"""Recipes beside each other on one model."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.measuring import matrix
from qfx.measuring.compare import Accuracy, Latency
from qfx.measuring.matrix import Matrix, Row, alone, bytes_of, compare_recipes, error_of, pareto

pytestmark = pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them:qfx.errors.QfxWarning")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x).relu())
        return found


@pytest.fixture(scope="module")
def found() -> Matrix:
    torch.manual_seed(0)
    model = _Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(4, 128) for _ in range(6)]

    def largest(run: Any, calls: Any) -> float:
        return float(max(run(*args, **kwargs).abs().max() for args, kwargs in calls))

    told: list[str] = []
    recipes = ["w8a8", "w8a8-static", "w2a16", "heads-of-none"]
    made = compare_recipes(model, recipes, data[:2], data=data[2:], repeats=1, metric=largest, told=told.append)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert told[0] == "quantize by w8a8" and "accuracy of w2a16" in told
    return made


def test_rows(found: Matrix) -> None:
    assert [row.recipe for row in found.rows] == ["float", "w8a8", "w8a8-static", "w2a16", "heads-of-none"]
    assert (found.shape, found.batches, found.metric) == ((4, 128), 2, "largest")
    base, eight, static, two, none = found.rows
    assert base.nbytes == 4 * (128 * 64 + 64 + 64 * 16) and base.bits == 32 and base.compression == 0.5
    assert base.accuracy is not None and base.accuracy.sqnr_db == math.inf
    for row in (eight, static, two):
        assert row.latency is not None and row.latency.warm > 0 and row.seconds is not None and row.metric is not None
        assert row.accuracy is not None and row.accuracy.kld is None and row.nbytes is not None
    sizes = [row.nbytes or 0 for row in (two, eight, base)]
    bits = [row.bits or 0 for row in (two, eight, base)]
    assert 0 < sizes[0] < sizes[1] < sizes[2] and 0 < bits[0] < bits[1] < 16
    assert eight.compression == pytest.approx(16 / bits[1])
    assert error_of(eight) < 0.03 < error_of(two)
    assert none.failed.startswith("unknown preset 'heads-of-none'") and none.nbytes is None


def test_bytes_are_those_of_the_packed_model(found: Matrix) -> None:
    torch.manual_seed(0)
    packed = qfx.quantize(_Net(), "w8a8", [torch.randn(4, 128)])
    assert bytes_of(packed) == found.rows[1].nbytes
    tied = _Net()
    tied.extra = tied.up
    assert bytes_of(tied) == bytes_of(_Net())


def test_json(found: Matrix, tmp_path: Path) -> None:
    found.save(tmp_path / "m.json")
    read = json.loads((tmp_path / "m.json").read_text())
    assert read["rows"][0]["accuracy"]["sqnr_db"] is None, "JSON has no infinity"
    assert read["rows"][1]["latency"]["warm"] == found.rows[1].latency.warm  # type: ignore[union-attr]
    assert read["rows"][4]["failed"]


def test_a_recipe_that_needs_data_without_data_is_a_row() -> None:
    rows = compare_recipes(_Net(), ["w8a8-static", "w8a8"], [torch.randn(4, 128)], repeats=1).rows
    assert rows[1].failed == "recipe 'w8a8-static' needs calibration data" and not rows[2].failed


@pytest.mark.parametrize(
    ("recipes", "options", "message"),
    [
        ([], {}, "expected recipes, each once, found none"),
        (["w8a8", "w8a8"], {}, "expected recipes, each once, found w8a8, w8a8"),
        (["w8a8"], {"baseline": "fast"}, "runs 'eager' or by 'inductor', found 'fast'"),
        (["w8a8"], {"repeats": 0}, "repeats must be 1 or more"),
    ],
)
def test_bad_input(recipes: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_recipes(_Net(), recipes, [torch.randn(4, 128)], **options)


def _row(name: str, nbytes: int, kld: float, failed: str = "") -> Row:
    near = Accuracy("logits", 20.0, 0.9, kld, 3.0, 3.1, 0.9)
    return Row(name, nbytes, 2.0, 8.0, 1.0, Latency(1.0, 0.1), None, near, None, failed)


def test_what_no_other_beats() -> None:
    rows = (
        _row("float", 100, 0.0), _row("a", 50, 0.01), _row("b", 40, 0.5), _row("c", 60, 0.02), _row("d", 40, 0.4),
        Row("e", failed="no"),
    )  # fmt: skip
    assert pareto(Matrix(rows, (1,), 1, "eager")) == ["d", "a"]


def test_error_without_logits_is_noise_over_signal() -> None:
    assert error_of(Row("x", accuracy=Accuracy("output", 20.0, 0.9))) == pytest.approx(0.1)


def test_a_budget_is_for_recipes_that_plan_bits_alone() -> None:
    given = [torch.randn(4, 128) for _ in range(2)]
    rows = compare_recipes(_Net(), ["heads", "w8a8"], given[:1], data=given, budget={"avg_bits": 1.0}, repeats=1).rows
    assert rows[1].recipe == "heads avg_bits=1.0" and rows[1].failed == "the budget avg_bits=1 is too small"
    assert rows[2].recipe == "w8a8" and not rows[2].failed


@pytest.mark.parametrize(("own", "compiled"), [(True, 10), (False, 8)])
def test_the_ninth_model_of_a_class_is_compiled_too(own: bool, compiled: int) -> None:
    class Twice(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            return x * self.number

    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    for number in range(2, 12):
        model = Twice(number)
        run = torch.compile(alone(model) if own else model, backend=backend)
        assert torch.equal(run(torch.ones(3)), torch.full((3,), float(number)))
    assert len(graphs) == compiled


def test_one_recipe_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what the compiler keeps: the packed weights of the one before are gone when the next is made."""
    made: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def quantize(*args: Any, **kwargs: Any) -> nn.Module:
        alive.append(sum(ref() is not None for ref in made))
        found = qfx.quantize(*args, **kwargs)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(matrix, "quantize", quantize)
    rows = compare_recipes(_Net(), ["w8a8", "w4a16", "w2a16"], [torch.randn(4, 128)], repeats=1).rows
    assert alive == [0, 0, 0] and not any(row.failed for row in rows)


def test_speed_is_of_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is half as fast while the second recipe is timed changes its seconds, not its speed."""
    slow = iter([1.0, 2.0, 4.0])

    def latency(models: Any, call: Any, *, repeats: int) -> dict[str, Latency]:
        by = next(slow)
        return {name: Latency(0.0, by * (1.0 if name == "float" else 0.5)) for name in models}

    monkeypatch.setattr("qfx.measuring.compare.latency", latency)
    rows = compare_recipes(_Net(), ["w8a8", "w4a16", "w2a16"], [torch.randn(4, 128)], repeats=1).rows
    assert [row.latency.warm for row in rows if row.latency] == [2.0, 0.5, 1.0, 2.0]
    assert [row.speed for row in rows] == [1.0, 2.0, 2.0, 2.0]


def test_the_float_model_is_timed_alone_where_no_recipe_runs() -> None:
    (base, none) = compare_recipes(_Net(), ["w8a8-static"], [torch.randn(4, 128)], repeats=1).rows
    assert base.latency is not None and base.latency.warm > 0 and base.speed == 1
    assert none.failed and none.speed is None
