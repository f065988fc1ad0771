"""AutoRound: rounding learned block by block, in its own default settings, steps aside."""

from __future__ import annotations

import time
from importlib import metadata

from auto_round import AutoRound

from examples.benchmarks.peers.rounding import LENGTH, RoundingJob, group_bytes, judged, linears, replaced
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits and group size, "4 64"; with zero points, 16-bit scales."""
    bits, group = map(int, option.split(" "))
    model, plain = job.module(), job.module()
    rows = [row for batch in job.calibration() for row in batch["input_ids"].split(1)]
    started = time.perf_counter()
    found = AutoRound(
        model, job.tokenizer(), bits=bits, group_size=group, sym=False, dataset=rows, nsamples=len(rows), seqlen=LENGTH,
        iters=job.iters, batch_size=8, device_map="cpu", amp=False, low_gpu_mem_usage=False,
    )  # fmt: skip
    made = found.quantize()[0]
    seconds = time.perf_counter() - started
    held = linears(plain)
    modules = dict(made.named_modules())
    weights = {name: modules[name].weight.detach().float() for name in held}
    size = group_bytes((tuple(m.weight.shape) for m in held.values()), bits, group, zero=bits / 8)
    return judged(job, replaced(plain, weights), size, metadata.version("auto-round"), seconds)
