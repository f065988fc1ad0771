"""Run by `qfx compare` in a process of its own: `python -m qfx.cli.peak FOLDER BATCH KIND BASELINE DEVICE`.

Loads the model, calls it once on the tensors of the safetensors file BATCH, and prints its peak memory in bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qfx.cli.models import open_quantized
from qfx.data import fitting
from qfx.hf import hub
from qfx.measuring.compare import peak_memory
from qfx.storage.files import read_safetensors


def main(folder: str, batch: str, kind: str, baseline: str, device: str) -> None:
    """Prints one number, or None where the system does not tell."""
    if kind == "quantized":
        model = open_quantized(Path(folder), device).model
        run = torch.compile(model, backend="qfx")
    else:
        model = hub.load(folder, device=device).model
        run = model if baseline == "eager" else torch.compile(model)
    inputs = {name: value.to(device) for name, value in read_safetensors(batch).items()}
    with torch.no_grad():
        run(**fitting(model, inputs))
    sys.stdout.write(f"\n{peak_memory()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
