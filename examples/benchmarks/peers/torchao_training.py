"""torchao: its quantization-aware training of int8 dynamic activations and int4 weights in groups of 32."""

from __future__ import annotations

from typing import Any

import torch
import torchao
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig

from examples.benchmarks.peers.training import TrainJob, built
from examples.benchmarks.peers.worker import Built

BITS, GROUP = 4, 32


def build(job: TrainJob, option: str) -> Built:
    """option: "compiled" or "eager"."""
    return built(job, prepared(job.module()), compiled=option == "compiled", version=torchao.__version__)


def config() -> Any:
    """The format: weights int4 without zero points in groups of 32, activations int8 per token with zero points."""
    dtype = getattr(torch, f"int{BITS}")
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=PerGroup(GROUP))


def prepared(model: Any) -> Any:
    """The model with torchao's fake quantization in all its linears, in place."""
    quantize_(model, QATConfig(config(), step="prepare"))
    return model
