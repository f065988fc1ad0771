"""torchao: integer weights by its quantize_, which has a scale (and zero point) for each group."""

from __future__ import annotations

import time

import torch
import torchao
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType

from examples.benchmarks.peers.rounding import RoundingJob, group_bytes, judged, linears
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits and group size, "4 64"; its float32 scales are counted as 16 bits, as other libraries store."""
    bits, group = map(int, option.split(" "))
    model = job.module()
    names = set(linears(model))
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
    )
    shapes = [tuple(m.weight.shape) for m in linears(model).values()]
    started = time.perf_counter()
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    seconds = time.perf_counter() - started
    size = group_bytes(shapes, bits, group, zero=bits / 8)
    return judged(job, model, size, torchao.__version__, seconds)
