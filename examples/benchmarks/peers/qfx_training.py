"""qfx: training with fake quantization, or of the float model."""

from __future__ import annotations

from typing import Any, cast

import qfx
from examples.benchmarks.peers.training import INT8_INT4, TrainJob, built
from examples.benchmarks.peers.worker import Built
from qfx.backends.qat import Scales


def build(job: TrainJob, option: str) -> Built:
    """option: "compiled" or "eager", then recipe and scales ("compiled w4a8 learned"); without a recipe: float."""
    mode, *rest = option.split(" ")
    model = job.module()
    if rest:
        recipe, scales = rest
        asked: Any = INT8_INT4 if recipe == INT8_INT4["name"] else recipe
        model = qfx.prepare_qat(model, asked, scales=cast(Scales, scales))
    return built(job, model, compiled=mode == "compiled", version=qfx.__version__)
