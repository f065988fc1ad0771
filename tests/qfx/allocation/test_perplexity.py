from __future__ import annotations

import math

import pytest
import torch

from qfx import Format
from qfx.allocation.perplexity import Perplexity
from qfx.analysis.measured import Measure
from qfx.measuring import measure
from tests.qfx.analysis.models import causal, ids, of_zoo, prepared

U2 = Format.parse("u2/g16")


def test_the_rise_is_that_of_perplexity() -> None:
    gm, flat, found = prepared()
    own = Measure(gm, flat, outputs=found.outputs)
    perplexity = Perplexity(own)
    assert perplexity.rise({}) == pytest.approx(0, abs=1e-9)
    assignment = {unit.name: U2 for unit in own.units}
    both = torch.cat([batch["input_ids"] for batch in causal()[1]])
    before, after = (measure.perplexity(torch.cat(list(own.outputs(a))), both) for a in ({}, assignment))
    assert perplexity.rise(assignment) == pytest.approx(100 * (after / before - 1), rel=1e-5)
    assert abs(perplexity.rise(assignment)) > 1


@pytest.mark.parametrize("text", [slice(0, 6), slice(3, 9)], ids=["right", "left"])
def test_positions_that_are_masked_do_not_count(text: slice) -> None:
    model, _ = causal()
    from tests.qfx.analysis.models import captured

    mask = torch.zeros(2, 9, dtype=torch.int64)
    mask[:, text] = 1
    batch = {"input_ids": ids(), "attention_mask": mask, "use_cache": False}
    gm, flat, found = captured(model, [batch])
    perplexity = Perplexity(Measure(gm, flat, outputs=found.outputs))
    (logits,) = perplexity.measure.outputs({})
    wanted = measure.nll(logits[:, text], ids()[:, text]).mean()
    assert perplexity.reference == pytest.approx(float(wanted), rel=1e-6)
    assert perplexity.reference != pytest.approx(float(measure.nll(logits, ids()).mean()), rel=1e-6)


def test_other_models_are_refused() -> None:
    gm, flat, found = of_zoo("bert")
    with pytest.raises(ValueError, match="max_loss is a rise of perplexity, which this model does not have"):
        Perplexity(Measure(gm, flat, outputs=found.outputs))


def test_without_positions_it_is_not_a_number() -> None:
    gm, flat, found = prepared()
    perplexity = Perplexity(Measure(gm, flat, outputs=found.outputs))
    perplexity.masks = [torch.zeros_like(i) for i in perplexity.ids]
    assert math.isnan(perplexity._nll(perplexity.measure.outputs({})))
