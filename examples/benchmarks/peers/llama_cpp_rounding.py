"""llama.cpp's own quantizer, its blocks read back by gguf and put into the float model."""

from __future__ import annotations

import ctypes
import time
from importlib import metadata

import gguf
import llama_cpp

import qfx
from examples.benchmarks.peers.rounding import RoundingJob, judged, linears, replaced
from examples.benchmarks.peers.worker import Built
from qfx.interop.gguf_arch import architecture_of
from qfx.interop.gguf_types import MIXES


def build(job: RoundingJob, option: str) -> Built:
    """option: a type of whole files, "Q4_0". Where its blocks do not fit a width, llama.cpp takes another type."""
    model = job.module()
    source, target = job.path / "float.gguf", job.path / f"{option}.gguf"
    qfx.export_gguf(model, source, "F32", tokenizer=False)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = MIXES[option][1], job.threads
    started = time.perf_counter()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    seconds = time.perf_counter() - started
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    arch, held = architecture_of(model.config), linears(model)
    names = {fqn: f"{stem}.weight" for stem, fqn in arch.modules(model.config.num_hidden_layers).items()}
    float_file = qfx.import_gguf(target, packed=False)
    weights = {name: float_file.get_parameter(f"{name}.weight").detach() for name in held}
    size = sum(read[names[name]].n_bytes for name in held)
    kinds = sorted({read[names[name]].tensor_type.name for name in held})
    return judged(
        job, replaced(model, weights), size, metadata.version("llama-cpp-python"), seconds, types=", ".join(kinds)
    )
