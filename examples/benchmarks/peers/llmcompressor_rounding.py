"""llm-compressor: its GPTQ on the CPU, layer by layer."""

from __future__ import annotations

import time
from importlib import metadata

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier

from examples.benchmarks.peers.rounding import LENGTH, RoundingJob, group_bytes, judged, linears
from examples.benchmarks.peers.worker import Built


def build(job: RoundingJob, option: str) -> Built:
    """option: bits and group size, "4 64"; symmetric, as its schemes are, with its own order of columns."""
    bits, group = map(int, option.split(" "))
    model = job.module()
    shapes = [tuple(m.weight.shape) for m in linears(model).values()]
    rows = [row for batch in job.calibration() for row in batch["input_ids"].tolist()]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    torch.set_num_threads(job.threads)
    started = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=LENGTH, num_calibration_samples=len(rows),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return judged(job, model.eval(), group_bytes(shapes, bits, group), metadata.version("llmcompressor"), seconds)
