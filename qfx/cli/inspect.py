"""`qfx inspect`: the report of a saved model."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from qfx.cli.models import open_quantized
from qfx.cli.terminal import step
from qfx.inputs import example_inputs
from qfx.report import report
from qfx.storage.files import write_text


def run(console: Console, folder: Path, *, call: bool, only_float: bool, each: bool, json_file: Path | None) -> None:
    """Show the report; `call` compiles the model and calls it once, where its inputs are known, to see the kernels."""
    loaded = open_quantized(folder)
    inputs = example_inputs(loaded.model) if call else None
    if inputs is not None:
        with step(console, "compile and call once"), torch.no_grad():
            torch.compile(loaded.model, backend="qfx")(**inputs)
    elif call:
        console.print("its inputs are not known, so it was not called: kernels are those of eager mode", style="yellow")
    found = report(loaded.model)
    found.show(console, all_rows=not only_float, fold=not each)
    if json_file is not None:
        write_text(json_file, found.to_json())
