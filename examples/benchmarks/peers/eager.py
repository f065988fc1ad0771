"""PyTorch eager, as the model is: what every accuracy is measured against."""

from __future__ import annotations

import torch

from examples.benchmarks.peers.encoding import EncoderJob, built, bytes_of
from examples.benchmarks.peers.worker import Built


def build(job: EncoderJob, option: str) -> Built:
    """option: the dtype."""
    model = job.module().to(getattr(torch, option))
    return built(job, lambda inputs: model(**inputs).last_hidden_state, bytes_of(model), torch.__version__)
