"""The float32 model itself."""

from __future__ import annotations

import torch

from examples.benchmarks.peers.rounding import RoundingJob, judged, linears
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: none."""
    model = job.module()
    return judged(job, model, sum(m.weight.nbytes for m in linears(model).values()), torch.__version__, 0.0)
