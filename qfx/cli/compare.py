"""`qfx compare`: a quantized model beside its float original."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qfx.cli.models import TextOptions, batches, check_device, open_quantized
from qfx.cli.terminal import megabytes, step
from qfx.data import Call, python_help, read_texts
from qfx.hf import hub
from qfx.measuring.compare import Accuracy, Latency, accuracy, latency, peak_of
from qfx.storage.files import json_text, write_text


@dataclass(frozen=True)
class Settings:
    """How to run: timed rounds, how the float model runs (eager, inductor), whether to measure memory, the device."""

    repeats: int
    baseline: str
    memory: bool
    device: str


@dataclass(frozen=True)
class Found:
    """The numbers of one comparison; pairs are (float, quantized)."""

    accuracy: Accuracy
    latency: tuple[Latency, Latency]
    disk: tuple[int, int]
    memory: tuple[int | None, int | None]
    shape: tuple[int, ...]
    settings: Settings

    def to_json(self) -> str:
        """All numbers as JSON text; seconds and bytes. What is infinite (SQNR of equal outputs) is null."""
        return json_text(asdict(self))


def run(
    console: Console, quantized: Path, model: str, text: TextOptions, settings: Settings, *, json_file: Path | None
) -> None:
    """Load both, time them in turn, compare their outputs, measure the memory of each in a process of its own."""
    place = check_device(settings.device)
    texts = python_help() if text.file is None else read_texts(text.file, text.field)
    with step(console, f"load {model} and {quantized}"):
        small = open_quantized(quantized, place)
        big = hub.load(model, device=place)
    made = batches(big, texts, text, text.samples or 32)
    calls: list[Call] = [((), batch) for batch in made]
    runs = {
        "float": big.model if settings.baseline == "eager" else torch.compile(big.model),
        "quantized": torch.compile(small.model, backend="qfx"),
    }
    with step(console, "time both in turn"):
        times = latency(runs, calls[0], repeats=settings.repeats)
    with step(console, "compare the outputs"):
        near = accuracy(runs["float"], runs["quantized"], calls, next_token=big.is_causal_lm)
    memory: tuple[int | None, int | None] = (None, None)
    if settings.memory:
        with step(console, "measure peak memory"):
            tensors = {name: value for name, value in made[0].items() if isinstance(value, Tensor)}
            how = (settings.baseline, settings.device)
            memory = (peak_of(big.folder, tensors, "float", *how), peak_of(quantized, tensors, "quantized", *how))
    found = Found(
        accuracy=near,
        latency=(times["float"], times["quantized"]),
        disk=(hub.bytes_on_disk(big.folder), hub.bytes_on_disk(quantized)),
        memory=memory,
        shape=tuple(next(v for v in made[0].values() if isinstance(v, Tensor)).shape),
        settings=settings,
    )
    console.print(table(found))
    if json_file is not None:
        write_text(json_file, found.to_json())


def table(found: Found) -> Table:
    """The numbers for people."""
    shape = " x ".join(map(str, found.shape))
    shown = Table(title=f"float ({found.settings.baseline}) and quantized (qfx), input {shape}", title_justify="left")
    shown.add_column("")
    for name in ("float", "quantized", ""):
        shown.add_column(name, justify="right")
    near = found.accuracy
    shown.add_row(f"SQNR of {near.output}", "", f"{near.sqnr_db:.2f} dB", "")
    shown.add_row(f"cosine of {near.output}", "", f"{near.cosine:.5f}", "")
    if near.kld is not None and near.top1 is not None:
        error = "" if near.kld_error is None else f" ± {near.kld_error:.5f}"
        shown.add_row("KL divergence", "", f"{near.kld:.5f}{error} nats", "")
        shown.add_row("same best token", "", f"{near.top1:.2%}", "")
    if near.perplexity is not None and near.perplexity_reference is not None:
        change = "" if near.change is None else f"{near.change:+.2%}"
        change += "" if near.change_error is None else f" ± {near.change_error:.2%}"
        shown.add_row("perplexity", f"{near.perplexity_reference:.3f}", f"{near.perplexity:.3f}", change)
    big, small = found.latency
    shown.add_row("first call", f"{big.cold:.2f} s", f"{small.cold:.2f} s", "")
    shown.add_row("median call", f"{big.warm * 1e3:.2f} ms", f"{small.warm * 1e3:.2f} ms", _times(big.warm, small.warm))
    shown.add_row("weights on disk", megabytes(found.disk[0]), megabytes(found.disk[1]), _times(*found.disk))
    if found.memory[0] and found.memory[1]:
        shown.add_row("peak memory", megabytes(found.memory[0]), megabytes(found.memory[1]), _times(*found.memory))
    return shown


def _times(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""
