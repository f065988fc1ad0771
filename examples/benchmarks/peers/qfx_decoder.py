"""qfx: the exported folder under `qfx.onnx.load` or onnxruntime-genai, or torch.compile with transformers' cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import qfx
from examples.benchmarks.peers.decoding import DecoderJob, built, bytes_below, made
from examples.benchmarks.peers.eager_decoder import Torch
from examples.benchmarks.peers.encoding import bytes_of
from examples.benchmarks.peers.worker import Built


def build(job: DecoderJob, option: str) -> Built:
    """option: a preset, then words.

    Nothing is `qfx.onnx.load`; `genai` is onnxruntime-genai, `compiled` torch.compile; `prefill` reads prompts by
    integers.
    """
    recipe, *how = option.split(" ")
    if "compiled" in how:
        model = qfx.quantize(job.module(), recipe)
        compiled: Any = torch.compile(model, backend="qfx", dynamic=True)
        return built(job, Torch(compiled), bytes_of(model), qfx.__version__)
    prefill = "i8/tok" if "prefill" in how else None
    path = job.path / f"qfx_{recipe}{'_prefill' if prefill else ''}"
    if not path.exists():
        with made(path) as folder:
            _write(job, folder, recipe, prefill)
    if "genai" in how:
        from examples.benchmarks.peers.genai_decoder import opened

        return opened(job, path)
    from qfx import onnx

    size = bytes_below(path, "*.onnx", "*.onnx.data")
    return built(job, Torch(onnx.load(path, threads=job.threads)), size, qfx.__version__)


def _write(job: DecoderJob, folder: Path, recipe: str, prefill: str | None) -> None:
    model = job.module()
    qfx.export_onnx(model, None, folder, recipe=recipe, prefill=prefill)
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
