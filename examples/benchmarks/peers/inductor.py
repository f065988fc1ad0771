"""torch.compile's own backend with frozen weights."""

from __future__ import annotations

import torch
from torch._inductor import config as inductor_config

from examples.benchmarks.peers.encoding import EncoderJob, built, bytes_of
from examples.benchmarks.peers.worker import Built


def build(job: EncoderJob, option: str) -> Built:
    """option: the dtype."""
    freeze()
    model = job.module().to(getattr(torch, option))
    compiled = torch.compile(model)
    return built(job, lambda inputs: compiled(**inputs).last_hidden_state, bytes_of(model), torch.__version__)


def freeze() -> None:
    """Weights become constants. Dynamo reads this setting too, so it must be the process's, not the call's."""
    inductor_config.freezing = True
