"""PyTorch eager with transformers' own cache: what every accuracy is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from examples.benchmarks.peers.decoding import DecoderJob, built
from examples.benchmarks.peers.encoding import bytes_of
from examples.benchmarks.peers.worker import Built


class Torch:
    """A transformers model and its growing cache."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache = None

    @torch.no_grad()
    def step(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after these tokens."""
        out = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: np.ndarray = out.logits[0, -1].float().numpy()
        return logits


def build(job: DecoderJob, option: str) -> Built:
    """option: the dtype."""
    model = job.module().to(getattr(torch, option))
    return built(job, Torch(model), bytes_of(model), torch.__version__)
