"""qfx: quantize, then torch.compile(backend="qfx") with transformers' growing cache."""

from __future__ import annotations

from typing import Any

import torch

import qfx
from examples.benchmarks.peers.decoding import DecoderJob, built
from examples.benchmarks.peers.eager_decoder import Torch
from examples.benchmarks.peers.encoding import bytes_of
from examples.benchmarks.peers.worker import Built

OWN: dict[str, Any] = {
    "2-bit": {"rules": [{"target": "linear", "w": "i2/g64"}, {"target": "embedding", "w": "i8/ch"}]},
}


def build(job: DecoderJob, option: str) -> Built:
    """option: a preset, or a name out of OWN."""
    model = qfx.quantize(job.module(), OWN.get(option, option))
    compiled = torch.compile(model, backend="qfx", dynamic=True)
    return built(job, Torch(compiled), bytes_of(model), qfx.__version__)
