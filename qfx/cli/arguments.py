"""Arguments and options that several commands have, and the choices of others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def _writable(path: Path | None) -> Path | None:
    """A file that can be written, which is told before the work and not after it."""
    if path is None:
        return None
    from qfx.storage.files import check_writable

    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder, a file is expected")
    try:
        check_writable(path.parent)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    return path


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a transformers model, or its hub name.")]
Quantized = Annotated[Path, typer.Argument(metavar="QUANTIZED", help="Folder that `qfx quantize` wrote.")]
Text = Annotated[Path | None, typer.Option("--data", help="Text file, or .jsonl with one text a line.")]
Field = Annotated[str, typer.Option(help="Name of the text in each line of a .jsonl file.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples run at once.")]
SeqLen = Annotated[
    int | None, typer.Option(min=1, help="Tokens a sample; left out: what the model takes, at most 512.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration samples; left out: the recipe's.")]
TextSamples = Annotated[int | None, typer.Option(min=1, help="Samples of the text; left out: 64.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail where a node cannot have what was asked.")]
Seed = Annotated[int, typer.Option(help="Which parts of the text are taken.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.", callback=_writable)]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write one page with pictures and tables.", callback=_writable)
]
BudgetHtml = Annotated[
    Path | None,
    typer.Option("--html", help="Write one page about what each weight gets of a budget.", callback=_writable),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="With --recipes: draw error over size, and times, here.", callback=_writable),
]
Resume = Annotated[
    Path | None, typer.Option(help="Folder of finished blocks (GPTQ): the same command goes on where it stopped.")
]
Stream = Annotated[
    bool | None, typer.Option(help="Leave the weights on disk until they are used; left out: where memory is short.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Baseline(StrEnum):
    """How the float model runs in a comparison."""

    eager = "eager"
    inductor = "inductor"


class Runtime(StrEnum):
    """Who shall read an ONNX file."""

    onnxruntime = "onnxruntime"
    standard = "standard"


class Layout(StrEnum):
    """Whose checkpoint is written."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"
    bnb = "bnb"
    qfx = "qfx"


class GgufRounding(StrEnum):
    """How weights are rounded into blocks of GGUF."""

    mse = "mse"
    gptq = "gptq"
    learned = "learned"


class Units(StrEnum):
    """What has one format."""

    heads = "heads"
    layers = "layers"
