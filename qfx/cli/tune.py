"""`qfx tune`: measure which configurations of the GPU's kernels are fastest for a model."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qfx.cli.models import check_device, open_quantized
from qfx.cli.terminal import step
from qfx.errors import explain
from qfx.hf import hub
from qfx.recipe import Recipe
from qfx.storage.files import write_text

if TYPE_CHECKING:
    from qfx.backends.triton.device import Device
    from qfx.backends.triton.tune import Measure, Tuned
    from qfx.backends.triton.tune_works import Work

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_SHOWN = 20


def run(
    console: Console, model: str | None, *, recipe: str | None, rows: str | None, dtype: str, device: str,
    out: Path | None, shipped: bool, json_file: Path | None, minutes: float | None = None,
    kernels: str | None = None, measure: Measure | None = None,
) -> None:  # fmt: skip
    """Tune, and write what is faster after each layer, so that an interrupt loses one. measure: None for the GPU.

    minutes: after which no other layer is begun. kernels: those whose choices are measured, comma between them.
    Everything that can be refused is refused before the model is loaded.
    """
    if dtype not in _DTYPES:
        raise ValueError(explain("--dtype of activations", expected=", ".join(_DTYPES), found=dtype))
    found = _kernels_of(device)
    from qfx.backends.triton import tune, tuning

    counts = _rows(rows, tune.ROWS)
    folder = _folder(out, shipped)
    tuning.check(folder, found)
    works: Sequence[Work] | Iterable[Work] = _works(console, model, recipe, torch.device(device), _DTYPES[dtype])
    results: list[Tuned] = []
    wrong: list[str] = []
    gc.collect()
    gc.freeze()  # what is there stays; a CUDA graph begins with a collection
    path, until = tuning.file_of(folder, found), time.monotonic() + 60 * (minutes or math.inf)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("tune", total=None if model is None else len(list(works)) * len(counts))
        for work, count in ((work, count) for work in works for count in counts if count <= work.most):
            if time.monotonic() > until:
                console.print(f"{minutes:g} minutes are over before {work.name}, {count} rows", style="yellow")
                break
            progress.update(bar, description=f"{work.name}, {count} rows", advance=1)
            asked = work if kernels is None else replace(work, only=tuple(kernels.split(",")))
            try:
                done = list(tune.tune(asked, count, measure, known={one.choice for one in results}))
            except ValueError as error:  # a wrong result: the others are measured all the same
                console.print(str(error), style="red", soft_wrap=True, markup=False)
                wrong.append(work.name)
                continue
            results += done
            gc.collect()  # graphs hold their weights in cycles
            if table := tune.table_of(done):
                path = tuning.write(folder, found, table)
    _show(console, results)
    faster = sum(one.best is not None for one in results)
    console.print(f"{found.name}: {faster} of {len(results)} choices are faster than without them: {path}")
    if json_file is not None:
        write_text(json_file, json.dumps([asdict(one) for one in results], indent=1) + "\n")
    if wrong:
        raise ValueError(f"{len(wrong)} layers were not measured, for their results are wrong: {', '.join(wrong)}")


def _kernels_of(device: str) -> Device:
    """The facts of the device. Raises ValueError where there is none, UnsupportedError where it has no kernels."""
    place = check_device(device)
    from qfx.backends.triton import device as devices

    return devices.find(place)


def _rows(asked: str | None, usual: Sequence[int]) -> list[int]:
    if asked is None:
        return list(usual)
    try:
        found = [int(part) for part in asked.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(explain("--rows are counts of tokens, comma between them", expected="1,16,2048", found=asked))
    return found


def _folder(out: Path | None, shipped: bool) -> Path:
    """Where the file is written."""
    from qfx.backends.triton import tuning

    if shipped and out is not None:
        raise ValueError("--shipped writes into the package, found --out too\n  next step: leave one of them out")
    folder = tuning.SHIPPED if shipped else out or tuning.own_folder()
    if folder is None:
        raise ValueError(
            explain(
                "there is no folder for what is measured",
                found="QFX_CACHE_DIR is empty",
                next_step="set QFX_TUNED_DIR to a folder",
            )
        )
    return folder


def _works(
    console: Console, model: str | None, recipe: str | None, place: torch.device, dtype: torch.dtype
) -> Iterable[Work]:
    """What is tuned: the layers of a model, or the usual ones."""
    from qfx.backends.triton import tune_works

    if model is None:
        if recipe is not None:
            raise ValueError("--recipe is for a MODEL, found none\n  next step: give its folder, or leave --recipe out")
        return tune_works.works_of_usual_models(place, dtype)
    saved = (Path(model) / "qfx.json").is_file()
    if saved and recipe is not None:
        raise ValueError(f"{model} is quantized already\n  next step: leave --recipe out, or give the float model")
    parsed = None if saved else Recipe.parse(recipe or "w4a16")
    if parsed is not None and parsed.needs_data:
        raise ValueError(
            f"recipe {parsed.name!r} needs calibration data\n"
            "  next step: `qfx quantize` the model by it, and give that folder; or a recipe of the same formats"
        )
    with step(console, f"load {model}"):
        if parsed is None:
            loaded = open_quantized(Path(model), place)
        else:
            loaded = hub.load(hub.resolve(model), device=place)
    if parsed is not None:
        from qfx.quantize import quantize

        with step(console, f"quantize by {parsed.name}", spinner=False):
            quantize(loaded.model, parsed)
    return tune_works.works_of(loaded.model.to(dtype))


def _show(console: Console, results: Sequence[Tuned]) -> None:
    """The greatest gains, and what was left out."""
    table = Table(title="greatest gains", title_justify="left")
    for name in ("kernel", "problem", "rows"):
        table.add_column(name)
    for name in ("before us", "now us", "tried", "left out"):
        table.add_column(name, justify="right")
    gains = [one for one in results if one.best is not None]
    for one in sorted(gains, key=lambda one: (one.seconds or 0) / (one.before or 1))[:_SHOWN]:
        assert one.before is not None and one.seconds is not None
        times = (f"{one.before * 1e6:.1f}", f"{one.seconds * 1e6:.1f}")
        table.add_row(*one.choice, *times, str(one.tried), str(len(one.dropped)))
    if gains:
        console.print(table)
    reasons: dict[str, int] = {}
    for one in results:
        for config, why in one.dropped:
            reasons.setdefault(f"{one.choice[0]} {_text(config)}: {why}", 0)
            reasons[f"{one.choice[0]} {_text(config)}: {why}"] += 1
    for reason, count in list(reasons.items())[:_SHOWN]:
        console.print(f"left out {count} x {reason}", style="yellow", soft_wrap=True, markup=False)
    if len(reasons) > _SHOWN:
        console.print(f"... and {len(reasons) - _SHOWN} others", style="yellow")


def _text(config: object) -> str:
    return json.dumps(config, separators=(",", ":"))
