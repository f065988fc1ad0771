"""Whole weights first; cuts by heads where data kept apart agree."""

from __future__ import annotations

from typing import Any

import pytest
from rich.progress import Progress

from qfx.allocation import assign
from qfx.allocation.search import Job, search
from qfx.rounding.method_options import AllocationOptions
from tests.qfx.allocation.test_split import SIZE, UNEVEN, UNITS, Fake, loss, problems, weights

EVEN = weights()


class Told(Fake):
    """A Fake with what a Measure tells."""

    what = "sum"

    @property
    def evaluations(self) -> int:
        return len(self.seen)


def run(true: dict[str, float], apart: dict[str, float] | None, predicted: dict[str, float], **options: Any) -> Any:
    heads, layers = problems(predicted)
    measure, judge = Told(true), None if apart is None else Told(apart)
    job = Job(measure, judge, UNITS, heads, layers)
    found = search(job, SIZE, AllocationOptions(avg_bits=4, **options), Progress(disable=True))
    return found, measure, judge


def cut(found: Any) -> bool:
    return any(len({found.assignment[f"{fqn}.q{h}"] for h in range(4)}) > 1 for fqn in "ab")


def test_heads_are_cut_where_data_kept_apart_agree() -> None:
    found, measure, judge = run(UNEVEN, UNEVEN, UNEVEN)
    assert cut(found)
    assert found.told["judged"] == {
        "on": "data kept apart", "layers": judge.kld(judge.seen[0]), "better": "heads",
        "heads": pytest.approx(judge.kld(found.assignment)), "whole": dict.fromkeys(("a", "b", "up"), "u3/g32/f16"),
    }  # fmt: skip
    assert found.told["measured"] == measure.kld(found.assignment) < found.told["measured_before"]
    assert found.told["predicted"] == pytest.approx(loss(UNEVEN, found.assignment))


def test_what_suits_the_data_alone_is_not_taken() -> None:
    """The data say that heads differ, other data say that they do not: whole weights, as without heads."""
    found, _, judge = run(UNEVEN, EVEN, UNEVEN)
    assert not cut(found)
    assert found.told["judged"]["better"] == "layers"
    assert found.told["judged"]["heads"] > found.told["judged"]["layers"]
    assert len(judge.seen) > 1


def test_without_data_apart_a_gain_has_to_be_large() -> None:
    found, _, _ = run(UNEVEN, None, UNEVEN)
    assert cut(found) and found.told["judged"]["on"] == "the same data"
    nearly = {name: value * (1 + 0.03 * (name[-1] == "0")) for name, value in weights().items()}
    assert not cut(run(nearly, None, UNEVEN)[0])


def test_cutting_costs_half_as_many_measurements_again() -> None:
    found, measure, judge = run(UNEVEN, UNEVEN, UNEVEN, refine=20)
    assert len(measure.seen) <= 20 + 10 + 8
    assert len(judge.seen) <= 4
    assert found.told["evaluations"] <= len(measure.seen)


def test_without_refinement_what_is_predicted_decides() -> None:
    found, measure, judge = run(EVEN, EVEN, UNEVEN, refine=0)
    assert cut(found)
    assert "judged" not in found.told and found.told["measured_before"] is None
    assert (len(measure.seen), judge.seen) == (1, []), "what is told at the end"
    assert not cut(run(EVEN, EVEN, EVEN, refine=0)[0])


def test_bytes_are_kept() -> None:
    for true in (EVEN, UNEVEN):
        for refine in (0, 8, 60):
            found, _, _ = run(true, true, UNEVEN, refine=refine)
            assert assign.nbytes(UNITS, found.assignment) <= SIZE
