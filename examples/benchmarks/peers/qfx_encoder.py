"""qfx: torch.compile(backend="qfx") after qfx.quantize, or a file of qfx.export_onnx that OpenVINO runs by itself."""

from __future__ import annotations

import torch

import qfx
from examples.benchmarks.peers.encoding import EncoderJob, built, bytes_in, bytes_of
from examples.benchmarks.peers.worker import Built
from qfx.data import fitting


def build(job: EncoderJob, option: str) -> Built:
    """option: the recipe, and after a space the backend ("w8a8-smooth openvino"), or "file"."""
    recipe, _, backend = option.partition(" ")
    if backend == "file":
        return _file(job, recipe)
    model = job.module()
    batches = [fitting(model, batch) for batch in job.calibration()]
    model = qfx.quantize(model, recipe, data=batches)
    compiled = torch.compile(model, backend="qfx", options={"backend": backend or "auto"})
    return built(job, lambda inputs: compiled(**inputs).last_hidden_state, bytes_of(model), qfx.__version__)


def _file(job: EncoderJob, recipe: str) -> Built:
    """The same graph without torch around it: what is left is OpenVINO, as for its own quantizer's file."""
    import openvino as ov

    from examples.benchmarks.peers.openvino_encoder import opened

    path, data = job.path / f"qfx_{recipe}.onnx", job.calibration()
    made = qfx.export_onnx(job.module(), data[0], path, recipe=recipe, data=data, runtime="standard", dynamic=False)
    computes, run = opened(path, job.threads)
    return built(job, run, bytes_in(*made.files), ov.__version__, arrays=True, computes_in=computes)
