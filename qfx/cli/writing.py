"""The command that makes calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qfx.cli.arguments import Debug, Device, Model, SeqLen
from qfx.cli.terminal import guarded


def generate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl file, one text a line.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 128,
    seq_len: SeqLen = None,
    temperature: Annotated[float, typer.Option(help="Below 1 the likely tokens are drawn more often.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Which texts are written.")] = 0,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Let MODEL write text on which it can be calibrated, where there is none like that which it will see."""
    with guarded(debug) as console:
        from qfx.cli import generate as command

        command.run(
            console, model, out, samples=samples, seq_len=seq_len, temperature=temperature, seed=seed, device=device
        )
