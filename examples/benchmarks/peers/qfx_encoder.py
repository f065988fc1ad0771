"""qfx: torch.compile(backend="qfx"), after qfx.quantize where the recipe needs data."""

from __future__ import annotations

import torch

import qfx
from examples.benchmarks.peers.encoding import EncoderJob, built, bytes_of
from examples.benchmarks.peers.worker import Built
from qfx.data import fitting


def build(job: EncoderJob, option: str) -> Built:
    """option: the recipe, and the backend after a space ("w8a8-smooth openvino")."""
    recipe, _, backend = option.partition(" ")
    model = job.module()
    batches = [fitting(model, batch) for batch in job.calibration()]
    model = qfx.quantize(model, recipe, data=batches)
    compiled = torch.compile(model, backend="qfx", options={"backend": backend or "auto"})
    return built(job, lambda inputs: compiled(**inputs).last_hidden_state, bytes_of(model), qfx.__version__)
