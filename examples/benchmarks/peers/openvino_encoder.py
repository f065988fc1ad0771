"""OpenVINO: as it comes (bfloat16 where the processor has it), in float32, and in 8 bits by NNCF."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import torch

from examples.benchmarks.peers.encoding import EncoderJob, Inputs, built, bytes_in
from examples.benchmarks.peers.worker import Built


def build(job: EncoderJob, option: str) -> Built:
    """option: default, float32 or nncf."""
    path = job.path / f"openvino_{'int8' if option == 'nncf' else 'float'}.xml"
    if not path.exists():
        _write(job, option, path)
    computes, run = opened(path, job.threads, option == "float32")
    size = bytes_in(path, path.with_suffix(".bin"))
    return built(job, run, size, ov.__version__, arrays=True, computes_in=computes)


def opened(path: Path, threads: int, float32: bool = False) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    """What OpenVINO computes floats of this file in, and a function from its inputs by name to its first output."""
    core = ov.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if float32:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(inputs: dict[str, Any]) -> Any:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    return compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), run


def _write(job: EncoderJob, option: str, path: Path) -> None:
    """The graph with fixed shapes; floats stay in float32 in the file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = job.calibration()[0]
        model = ov.convert_model(job.module(), example_input=example)
        model.reshape({name: list(tensor.shape) for name, tensor in example.items()})
        if option == "nncf":
            import nncf

            data = nncf.Dataset(job.calibration(), _arrays)
            model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=64)
        ov.save_model(model, path, compress_to_fp16=False)


def _arrays(inputs: Inputs) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}
