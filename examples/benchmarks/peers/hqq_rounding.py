"""HQQ's own quantizer, weight by weight."""

from __future__ import annotations

import time
from importlib import metadata

import torch
from hqq.core.quantize import Quantizer

from examples.benchmarks.peers.rounding import RoundingJob, group_bytes, judged, linears, replaced
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits and group size, "4 64". Scale and zero point are 16-bit floats."""
    bits, group = map(int, option.split(" "))
    model = job.module()
    held = linears(model)
    started, weights = time.perf_counter(), {}
    for name, module in held.items():
        codes, meta = Quantizer.quantize(
            module.weight.detach(), nbits=bits, group_size=group, axis=1, optimize=True, device="cpu",
            compute_dtype=torch.float32, bitpack=False,
        )  # fmt: skip
        weights[name] = Quantizer.dequantize(codes, meta).float()
    seconds = time.perf_counter() - started
    size = group_bytes((tuple(m.weight.shape) for m in held.values()), bits, group, zero=2)
    return judged(job, replaced(model, weights), size, metadata.version("hqq"), seconds)
