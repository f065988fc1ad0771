"""The example trains what it says, on the tiny language model, and its table adds up."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import qat_lm
from examples.qat_lm import Data, Row, Settings, rate_at, rounded, shown, trained, with_recovered

FOLDER = qat_lm.ASSETS / "tiny_lm"


def test_the_rate_rises_and_falls() -> None:
    settings = Settings(steps=40, rate=1.0)
    rates = [rate_at(step, settings) for step in range(40)]
    assert rates[0] == 0.5 and rates[1] == max(rates) == 1.0
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert 0.1 <= rates[-1] < 0.12


def test_recovered_is_the_share_of_what_rounding_costs() -> None:
    rows = [Row("fp32", "", 10.0), Row("a", "PTQ", 14.0), Row("a", "QAT", 11.0), Row("b", "QAT", 11.0)]
    with_recovered(rows, 10.0)
    assert [row.recovered for row in rows] == [None, None, 0.75, None]
    assert shown(rows, "t").row_count == 4


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Row("a", "PTQ", 14.0), Row("a", "QAT", 11.0, curve=[(0, 14.0), (5, 11.0)])]
    qat_lm.plot(tmp_path / "p.png", rows, 10.0)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def data() -> Data:
    """The held-out text trains and judges, different parts of it, so that nothing but itself is read."""
    found = Data(FOLDER)
    found._stream, found.held_out = found.held_out[2048:], found.held_out[:2048]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(lm_head|model.embed_tokens). ")  # the table is tied
@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_a_few_distilled_steps_recover_a_part(data: Data, scales: Any) -> None:
    torch.manual_seed(0)
    reference = data.judge(data.model())
    settings = Settings(steps=6, rate=5e-4, batch=1, distill=1.0, checks=2)
    said: list[str] = []
    rows = [rounded(data, "w2a16"), trained(data, "w2a16", settings, scales, said.append)]
    with_recovered(rows, reference)
    print(scales, f"PTQ {rows[0].perplexity:.2f}, QAT {rows[1].perplexity:.2f}, fp32 {reference:.2f}")
    assert rows[1].recovered is not None and rows[1].recovered > 0.2
    steps, perplexities = zip(*rows[1].curve, strict=True)
    assert steps == (0, 3, 6) and math.isclose(perplexities[0], rows[0].perplexity, rel_tol=1e-5)
    assert math.isclose(perplexities[-1], rows[1].perplexity, rel_tol=1e-4), "converted is what was trained"
    assert len(said) == 2 and json.dumps(said)
