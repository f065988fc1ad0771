"""ONNX Runtime: the graph of torch.onnx.export in float32, and after its own quantize_dynamic per channel.

"fused" runs onnxruntime's transformer optimizer (attention, GELU and norms as one node each) before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch

from examples.benchmarks.peers.encoding import EncoderJob, built, bytes_in
from examples.benchmarks.peers.worker import Built


def build(job: EncoderJob, option: str) -> Built:
    """option: words out of fused and int8; empty is the plain float32 graph."""
    path = _exported(job)
    if "fused" in option:
        path = _fused(job, path)
    if "int8" in option:
        path = _quantized(path)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    output = [session.get_outputs()[0].name]
    data = path.with_name(path.name + ".data")

    def run(inputs: dict[str, Any]) -> Any:
        return session.run(output, inputs)[0]

    size = bytes_in(path, *([data] if data.exists() else []))
    return built(job, run, size, onnxruntime.__version__, arrays=True)


def _exported(job: EncoderJob) -> Path:
    path = job.path / "float32.onnx"
    if not path.exists():
        inputs = job.calibration()[0]
        program = torch.onnx.export(job.module(), (), kwargs=inputs, dynamo=True, verbose=False)
        assert program is not None
        program.save(path, external_data=False)
    return path


def _fused(job: EncoderJob, path: Path) -> Path:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    fused = path.with_stem("fused")
    if not fused.exists():
        config: Any = job.module().config
        options = FusionOptions("bert")
        options.enable_skip_layer_norm = False  # slow on CPU
        heads = config.num_attention_heads
        made = optimizer.optimize_model(
            str(path), "bert", heads, config.hidden_size, opt_level=0, optimization_options=options
        )
        made.save_model_to_file(str(fused))
    return fused


def _quantized(path: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_stem(path.stem + "_int8")
    if not quantized.exists():
        quantize_dynamic(path, quantized, per_channel=True, weight_type=QuantType.QInt8)
    return quantized
