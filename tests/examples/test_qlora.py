"""The example trains adapters on the tiny language model, merges them, and its rows say what is left."""

from __future__ import annotations

import pytest

from examples.qat_lm import ASSETS, W3, Data, Settings
from examples.qlora import INSIDE, MERGES, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(lm_head|model.embed_tokens). "),  # the table is tied
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:(?s).*merged weights lose more than half:qfx.QfxWarning"),
]


def test_adapters_recover_a_part_and_data_or_factors_keep_it() -> None:
    """The held-out text trains and judges, different parts of it, so that nothing but itself is read."""
    data = Data(ASSETS / "tiny_lm")
    data._stream, data.held_out = data.held_out[2048:], data.held_out[:2048]
    rows = {row.method: row for row in run(data, [W3], 8, Settings(12, 2e-3, batch=1, checks=2, autocast=False))}
    assert len(rows) == 7 and list(rows)[-4:] == [*MERGES, INSIDE]
    adapters = rows["adapters, rank 8"]
    assert adapters.recovered is not None and adapters.recovered > 0.2
    assert [step for step, _ in adapters.curve] == [6, 12]
    left = [rows[how].recovered for how in MERGES]
    assert left[0] is not None and left[1] is not None
    assert left[1] > left[0], "GPTQ keeps more than the nearest codes"
    assert left[2] == pytest.approx(adapters.recovered, abs=1e-4), "factors keep all of it"
    within = rows[INSIDE]
    assert within.recovered is not None and within.recovered > 0.15
    assert within.score == pytest.approx(within.curve[-1][1], rel=1e-4), "converted as it was trained"
