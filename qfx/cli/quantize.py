"""`qfx quantize`: load, read data, quantize, save."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qfx import hub
from qfx.cli.models import TextOptions, batches, check_device
from qfx.cli.terminal import megabytes, step
from qfx.data import read_texts
from qfx.recipe import Recipe


def run(
    console: Console, model: str, out: Path, recipe: str, text: TextOptions, *, strict: bool, device: str,
    resume: Path | None = None,
) -> None:  # fmt: skip
    """Everything that can be refused is refused before the model is loaded."""
    parsed = Recipe.parse(recipe)
    place = check_device(device)
    texts = None if text.file is None else read_texts(text.file, text.field)
    if texts is None and parsed.needs_data:
        raise ValueError(
            f"recipe {parsed.name!r} needs calibration data\n"
            "  next step: --data FILE, or a recipe that needs none: w8a8, w4a16"
        )
    folder = hub.resolve(model)
    if out.exists() and (not out.is_dir() or out.resolve() == folder.resolve()):
        raise ValueError(f"{out} cannot be written to: it is {'the model itself' if out.is_dir() else 'a file'}")
    from qfx.quantize import quantize
    from qfx.report import report
    from qfx.save import save

    with step(console, f"load {model}"):
        loaded = hub.load(folder, device=place)
    data = None
    if texts is not None and not parsed.needs_data:
        console.print(f"recipe {parsed.name!r} needs no data: {text.file} is not used", style="yellow")
    elif texts is not None:
        samples = text.samples or parsed.num_calibration_samples
        with step(console, f"read {text.file}"):
            data = batches(loaded, texts, text, samples)
    with step(console, f"quantize by {parsed.name}", spinner=False):
        quantized = quantize(loaded.model, parsed, data, strict=strict, resume=resume)
    with step(console, f"save to {out}"):
        save(quantized, out)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(out)
    report(quantized).show(console, all_rows=False)
    console.print(f"on disk: {megabytes(hub.bytes_on_disk(folder))} -> {megabytes(hub.bytes_on_disk(out))}")
