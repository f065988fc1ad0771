"""GPTQModel: its GPTQ on the CPU, saved, and read back from the file."""

from __future__ import annotations

import time
from importlib import metadata

from gptqmodel import GPTQModel, QuantizeConfig

import qfx
from examples.benchmarks.peers.rounding import RoundingJob, group_bytes, judged, linears
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits and group size, "4 64"; symmetric, as it recommends."""
    bits, group = map(int, option.split(" "))
    shapes = [tuple(m.weight.shape) for m in linears(job.module()).values()]
    config = QuantizeConfig(bits=bits, group_size=group, sym=True, desc_act=False)
    model = GPTQModel.load(job.source, config, device="cpu", dtype="float32")
    rows = [row for batch in job.calibration() for row in batch["input_ids"].tolist()]
    started = time.perf_counter()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    seconds = time.perf_counter() - started
    folder = job.path / f"gptqmodel_{bits}_{group}"
    model.tokenizer = None  # its copy cannot be written under transformers 5
    model.save(str(folder))
    size = group_bytes(shapes, bits, group, zero=bits / 8)
    return judged(job, qfx.import_checkpoint(folder).float(), size, metadata.version("gptqmodel"), seconds)
