"""The commands that measure a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qfx.cli.arguments import Debug, Device, Json
from qfx.cli.terminal import guarded


def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="The .json file for the numbers.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each session; left out: torch's.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call this device; left out: its processor.")] = None,
    debug: Debug = False,
) -> None:
    """Measure this CPU, so that speed on it can be predicted. Nothing else should run meanwhile."""
    with guarded(debug) as console:
        from qfx.cli import profile as command

        command.run(console, out, threads, name)


def tune(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="What `qfx quantize` wrote, or a float model; left out: usual sizes."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="For a float MODEL: its formats; left out: w4a16.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Counts of tokens, comma between them; left out: powers of two up to 8192.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="f16, bf16 or f32: what the model runs in.")] = "f16",
    device: Device = "cuda",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the file; left out: QFX_TUNED_DIR, or the user's own.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="Only these: gemm8, weight_only, ..., comma between them.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="After which no other layer is begun.")] = None,
    shipped: Annotated[bool, typer.Option("--shipped", help="Write into the package, for its maintainers.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Measure which configurations of the kernels are fastest on this GPU for the layers of MODEL."""
    with guarded(debug) as console:
        from qfx.cli import tune as command

        command.run(
            console, model, recipe=recipe, rows=rows, dtype=dtype, device=device, out=out, shipped=shipped,
            json_file=json, minutes=minutes, kernels=kernels,
        )  # fmt: skip
