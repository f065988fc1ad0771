"""The benchmark of QAT against torchao: what it refuses, its best rates, and that its rows come from training."""

from __future__ import annotations

import math

import pytest
import typer

from examples.benchmarks import qat_peers
from examples.qat_lm import ASSETS, Data, Settings
from examples.qat_rows import FLOAT, PTQ, Row


def test_the_best_rate_is_that_of_the_mean_over_seeds() -> None:
    rows = [Row(FLOAT, "", 9.0), Row("a", PTQ, 8.0), Row("b", PTQ, 12.0)]
    for name, rate, seed, score in (
        ("a", "rate 1", 0, 10.0), ("a", "rate 1", 1, 14.0), ("a", "rate 2", 0, 11.0), ("a", "rate 2", 1, 11.5),
        ("b", "rate 1", 0, 10.5),
    ):  # fmt: skip
        rows.append(Row(name, rate, score, seed))
    assert qat_peers.best(rows) == [
        "a: 11.250 ± 0.354 at its best, rate 2",
        "b: 10.500 at its best, rate 1",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"method": ["qfx"]}, "qfx is none of qfx learned"), ({"text": "train"}, "train is none of eval")],
)
def test_bad_options_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        qat_peers.main(**given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(lm_head|model.embed_tokens). ")  # the table is tied
@pytest.mark.parametrize("method", qat_peers.METHODS)
def test_a_row_is_trained_and_converted(method: str) -> None:
    if method == "torchao":
        pytest.importorskip("torchao")
    data = Data(ASSETS / "tiny_lm")
    data._stream, data.held_out = data.held_out[2048:], data.held_out[:512]
    row = qat_peers.run(data, method, Settings(1, 1e-4, batch=1, checks=1, distill=1.0, autocast=False), lambda _: None)
    assert row.recipe == method and row.curve[0][0] == 1 and row.seconds is not None
    assert math.isclose(row.score, row.curve[0][1], rel_tol=5e-3), "converted it gives what it gave in training"
    assert row.score < 1.2 * data.judge(data.model())
