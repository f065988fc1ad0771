"""`qfx advise`: from what is wanted to recipes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qfx.advise import advise
from qfx.allocation.devices import Device, device
from qfx.cli.models import TextOptions, batches
from qfx.cli.terminal import step
from qfx.data import read_texts
from qfx.hf import hub
from qfx.storage.files import write_text

SAMPLES = 64  # of the text, where the user names no number


def run(
    console: Console, model: str, on: str | None, text: TextOptions, recipes: str | None, *, max_loss: float | None,
    ratio: float | None, batch: int, prompt: int, context: int | None, json_file: Path | None,
) -> None:  # fmt: skip
    """Everything that can be refused is refused before the model is loaded."""
    found = None if on is None else device(on)
    texts = None if text.file is None else read_texts(text.file, text.field)
    names = None if recipes is None else [name.strip() for name in recipes.split(",") if name.strip()]
    if found is None:
        found = _measured(console)
    with step(console, f"load {model}"):
        loaded = hub.load(model)
    data = None if texts is None else batches(loaded, texts, text, text.samples or SAMPLES)
    with step(console, "try recipes") as told:
        advice = advise(
            loaded.model, data, device=found, max_loss=max_loss, ratio=ratio, batch=batch, sequence=prompt,
            context=context, recipes=names, told=told,
        )  # fmt: skip
    advice.show(console)
    if json_file is not None:
        write_text(json_file, advice.to_json())


def _measured(console: Console) -> Device:
    """This CPU, measured now."""
    from qfx.allocation.profile import measure

    with step(console, "measure this CPU (qfx profile -o cpu.json keeps it)"):
        return measure()
