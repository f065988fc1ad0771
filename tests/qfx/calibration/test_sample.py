"""qfx.calibration.sample: whole rows, uniformly, told apart by halves of the data."""

from __future__ import annotations

import pytest
import torch

from qfx.calibration.sample import Sample
from tests.qfx.calibration.test_observers import fed


def test_a_sample_keeps_whole_rows_uniformly() -> None:
    rows = torch.arange(4000.0).unsqueeze(1).expand(4000, 3).contiguous()
    sample = fed(Sample(rows=400), *rows.reshape(40, 4, 25, 3))
    kept = sample.sample()
    assert kept.shape == (400, 3) and kept.dtype == torch.float32
    assert bool((kept == kept[:, :1]).all()) and len(kept[:, 0].unique()) == 400
    assert abs(float(kept.mean()) - 2000) < 4 * 4000 / 12**0.5 / 400**0.5
    assert sample.absmax().tolist() == [3999.0] * 3
    again = fed(Sample(rows=400), *rows.reshape(40, 4, 25, 3))
    assert torch.equal(kept, again.sample())
    both = fed(Sample(rows=10, seed=1), rows[:100]).merge(fed(Sample(rows=10, seed=2), rows[100:]))
    assert both.sample().shape == (10, 3) and both.seen == 12000
    with pytest.raises(ValueError, match="at least one row"):
        Sample(rows=0)


def test_the_halves_of_a_sample_know_each_others_extremes() -> None:
    first, second = torch.full((5, 2), 1.0), torch.full((5, 2), 3.0)
    sample = fed(Sample(), *[torch.cat([first * i, second * i]) for i in (1, 2)])
    for rows, low, high in (folds := sample.folds()):
        assert rows.shape == (10, 2)
        assert sorted(set(rows.flatten().tolist())) != [float(low[0]), float(high[0])]
    assert [high[0].item() for _, _, high in folds] == [6.0, 2.0]
    merged = fed(Sample(), torch.cat([first, second])).merge(fed(Sample(), torch.cat([first, second]) * 2))
    assert [(low.tolist(), high.tolist()) for _, low, high in merged.folds()] == [
        (low.tolist(), high.tolist()) for _, low, high in folds
    ]
    assert len(fed(Sample(), torch.ones(1, 2)).folds()) == 1
