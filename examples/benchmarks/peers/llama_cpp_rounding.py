"""llama.cpp's own quantizer, its blocks read back by gguf and put into the float model."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
from torch import Tensor, nn

import qfx
from examples.benchmarks.peers.rounding import RoundingJob, judged, linears, replaced
from examples.benchmarks.peers.worker import Built
from qfx.interop.gguf_arch import architecture_of
from qfx.interop.gguf_energy import input_energy
from qfx.interop.gguf_types import MIXES


def build(job: RoundingJob, option: str) -> Built:
    """option: a type of whole files, "Q4_0", with an importance matrix of the calibration text "Q4_0 matrix". Where its
    blocks do not fit a width, llama.cpp takes another type."""
    mix, _, matrix = option.partition(" ")
    model = job.module()
    source, target = job.path / "float.gguf", job.path / f"{mix}.gguf"
    qfx.export_gguf(model, source, "F32", tokenizer=False)
    started = time.perf_counter()
    quantize(source, target, mix, importance(model, job.calibration()) if matrix else {}, job.threads)
    seconds = time.perf_counter() - started
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    held, names = linears(model), tensor_names(model)
    float_file = qfx.import_gguf(target, packed=False)
    weights = {name: float_file.get_parameter(f"{name}.weight").detach() for name in held}
    size = sum(read[names[name]].n_bytes for name in held)
    kinds = sorted({read[names[name]].tensor_type.name for name in held})
    return judged(
        job, replaced(model, weights), size, metadata.version("llama-cpp-python"), seconds, types=", ".join(kinds)
    )


def tensor_names(model: Any) -> dict[str, str]:
    """GGUF's name of each module's weight."""
    modules = architecture_of(model.config).modules(model.config.num_hidden_layers)
    return {fqn: f"{stem}.weight" for stem, fqn in modules.items()}


def importance(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """llama.cpp's importance matrix: GGUF name of a linear's weight -> mean squares of its inputs, f32 [columns]."""
    names = tensor_names(model)
    found = input_energy(model, [fqn for fqn in names if isinstance(model.get_submodule(fqn), nn.Linear)], batches)
    energy = {names[fqn]: value for fqn, value in found.items()}
    if model.config.tie_word_embeddings:
        energy["token_embd.weight"] = energy.pop("output.weight")
    return energy


def quantize(source: Path, target: Path, mix: str, energy: Mapping[str, Tensor], threads: int) -> None:
    """Write the float file anew in a type. energy: of `importance`, empty for none.

    Raises: RuntimeError with llama.cpp's code where it refuses.
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = MIXES[mix][1], threads
    rows = [(name.encode(), value.float().contiguous()) for name, value in energy.items()]
    if rows:
        table = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for entry, (name, value) in zip(table, rows, strict=False):
            entry.name, entry.size = name, value.numel()
            entry.data = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_float))
        settings.imatrix = table
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")
