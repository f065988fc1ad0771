"""The example trains what it says, on the tiny language model, and its table adds up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from typer import BadParameter

import qfx
from examples import qat_lm
from examples.qat_lm import Data, Settings, begun, planned, rounded, trained
from examples.qat_rows import FLOAT, Row, with_recovered

FOLDER = qat_lm.ASSETS / "tiny_lm"
pytestmark = pytest.mark.filterwarnings("ignore:(lm_head|model.embed_tokens). ")  # the table is tied


@pytest.fixture(scope="module")
def data() -> Data:
    """The held-out text trains and judges, different parts of it, so that nothing but itself is read."""
    found = Data(FOLDER)
    found._stream, found.held_out = found.held_out[2048:], found.held_out[:2048]
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ["other"]}, "'other' is none of learned, observed"),
        ({"start": "rtn"}, "'rtn' is none of gptq, learned, nearest"),
        ({"text": "train"}, "'train' is none of eval, validation"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"recipe": None, "plan_bits": None, "start": "gptq", "scales": None, "text": "eval"}
    with pytest.raises(BadParameter, match=message):
        qat_lm.main(threads=torch.get_num_threads(), **{**defaults, **options})


@pytest.mark.slow
def test_the_texts_that_judge_are_apart() -> None:
    eval_ids, validation = (Data(FOLDER, text=text).held_out for text in ("eval", "validation"))
    pieces = {tuple(piece) for piece in eval_ids.unfold(0, 24, 1).tolist()}
    same = sum(tuple(piece) in pieces for piece in validation.unfold(0, 24, 1).tolist())
    assert len(validation) > 8192 and same < 0.005 * len(validation)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_a_few_distilled_steps_recover_a_part(data: Data, scales: Any) -> None:
    torch.manual_seed(0)
    reference = data.judge(data.model())
    settings = Settings(steps=6, rate=5e-4, batch=1, distill=1.0, checks=2, autocast=False)
    said: list[str] = []
    rows = [
        Row(FLOAT, "", reference),
        rounded(data, begun(data, "w2a16", "nearest")),
        trained(data, begun(data, "w2a16", "nearest"), settings, scales, said.append),
    ]
    with_recovered(rows)
    print(scales, f"PTQ {rows[1].score:.2f}, QAT {rows[2].score:.2f}, fp32 {reference:.2f}")
    assert rows[2].recovered is not None and rows[2].recovered > 0.2
    steps, perplexities = zip(*rows[2].curve, strict=True)
    assert steps == (0, 3, 6) and math.isclose(perplexities[0], rows[1].score, rel_tol=1e-5)
    assert math.isclose(perplexities[-1], rows[2].score, rel_tol=1e-4), "converted is what was trained"
    assert len(said) == 2 and json.dumps(said)


@pytest.mark.slow
def test_training_begins_where_gptq_ends(data: Data) -> None:
    """Its start has the formats of the recipe, and costs less than rounding to nearest."""
    model, nearest = (
        qfx.prepare_qat(data.model(), begun(data, "w2a16", "gptq")),
        rounded(data, begun(data, "w2a16", "nearest")).score,
    )
    first = data.judge(model)
    assert first < 0.95 * nearest
    asked = {row.asked for row in qfx.report(qfx.convert(model)) if row.op == "linear"}
    assert asked == {row.asked for row in qfx.report(qfx.quantize(data.model(), "w2a16")) if row.op == "linear"}
    assert math.isclose(data.judge(model), first, rel_tol=1e-4)


@pytest.mark.slow
def test_a_plan_for_heads_is_trained(data: Data) -> None:
    plan = planned(data, 3.0, refine=0)
    model = qfx.prepare_qat(data.model(), begun(data, plan, "gptq"))
    assert math.isclose(data.judge(model), rounded(data, plan).score, rel_tol=1e-4)
    assert len({str(plan.formats(fqn)["w"]) for fqn in plan.annotations}) > 1, "nothing was planned"
    row = trained(data, plan, Settings(steps=2, rate=2e-4, batch=1, distill=1.0, checks=1), "learned", print)
    assert (row.recipe, row.method) == ("planned, 3 bits", "QAT, learned scales, distilled by logits alone")
    assert row.score < row.curve[0][1]


@pytest.mark.parametrize(
    ("distill", "hidden", "said"),
    [(0.0, 4.0, "plain loss"), (1.0, 4.0, "distilled"), (0.5, 0.0, "distilled 0.5 by logits alone")],
)
def test_rows_say_their_loss(distill: float, hidden: float, said: str) -> None:
    assert qat_lm.loss_of(Settings(distill=distill, hidden=hidden)) == said


def test_the_recipes_with_rates_of_their_own() -> None:
    assert qfx.Recipe.parse(qat_lm.W3).name == "w3a16"
    assert all(name in qfx.presets() for name in qat_lm.RATES if name != "w3a16")
