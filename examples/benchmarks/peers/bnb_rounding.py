"""bitsandbytes: NF4 in blocks of 64, with and without double quantization."""

from __future__ import annotations

import time

import bitsandbytes
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from examples.benchmarks.peers.rounding import RoundingJob, judged, linears, replaced
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: "" or "double"."""
    model = job.module()
    started, weights, size = time.perf_counter(), {}, 0
    for name, module in linears(model).items():
        codes, state = quantize_4bit(
            module.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=option == "double"
        )
        weights[name] = dequantize_4bit(codes, state).float()
        size += codes.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes + 4 if option == "double" else 0)
    seconds = time.perf_counter() - started
    return judged(job, replaced(model, weights), size, bitsandbytes.__version__, seconds)
