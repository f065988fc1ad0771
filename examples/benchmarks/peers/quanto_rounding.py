"""optimum-quanto: quantize and freeze."""

from __future__ import annotations

import time
from importlib import metadata

from optimum import quanto

from examples.benchmarks.peers.rounding import RoundingJob, group_bytes, judged, linears
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits. Below 8 bits it has groups of 128 where they fit, else 64 or 32, with 16-bit scales and shifts."""
    bits = int(option)
    model = job.module()
    shapes = [tuple(m.weight.shape) for m in linears(model).values()]
    started = time.perf_counter()
    quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"), exclude="lm_head")
    quanto.freeze(model)
    seconds = time.perf_counter() - started
    if bits == 8:
        size = sum(n * k + 2 * n for n, k in shapes)
    else:
        size = sum(group_bytes([shape], bits, _group(shape[1]), zero=2) for shape in shapes)
    return judged(job, model, size, metadata.version("optimum-quanto"), seconds)


def _group(columns: int) -> int:
    return next(size for size in (128, 64, 32) if columns % size == 0)
