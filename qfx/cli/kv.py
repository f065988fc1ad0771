"""`qfx kv`: what a cache takes in memory, format by format."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qfx.cli.terminal import step
from qfx.hf import hub
from qfx.kv.memory import Formats, Memory, formats_of, parse_bytes
from qfx.recipe import Recipe
from qfx.storage.files import write_text

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Line:
    """One cache. token_bytes: of each further token of all layers. ratio: of the cache's bytes at `context` to those of
    the float one. longest: tokens of each sequence for which there is room, None where no context is too long."""

    name: str
    stores: str
    token_bytes: float
    cache_bytes: int
    ratio: float
    longest: int | None


def run(
    console: Console, model: str, formats: str, memory: str, *, batch: int, context: int | None, dtype: str | None,
    recipe: str | None, json_file: Path | None,
) -> None:  # fmt: skip
    """What can be refused is refused before the model is looked at. Of its files only config.json is read."""
    room = parse_bytes(memory)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype is {', '.join(_DTYPES)}, found {dtype!r}")
    names = [name.strip() for name in formats.split(",") if name.strip()]
    for name in names:
        formats_of(name, (), torch.float16)
    weights = None if recipe is None else Recipe.parse(recipe)
    folder = hub.resolve(model)
    _, config = hub.class_of(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized\n  next step: give the float model, and --recipe for its weights")
    with step(console, f"look at {model}"):
        found = Memory.of_config(config, dtype=_DTYPES.get(dtype or ""), weights=weights)
    for note in found.notes:
        console.print(f"[yellow]note[/] {note}", soft_wrap=True)
    tokens = context or min(found.positions or 8192, 8192)
    lines = [line(found, None, "float", room, batch, tokens)]
    lines += [line(found, name, name, room, batch, tokens) for name in names]
    console.print(table(found, lines, memory, batch, tokens))
    if json_file is not None:
        write_text(json_file, json.dumps(record(found, lines, room, batch, tokens), indent=1) + "\n")


def line(found: Memory, kv: Any, name: str, room: int, batch: int, context: int) -> Line:
    """One format; kv None: as the model makes them."""
    formats: Formats = None if kv is None else found.formats(kv)
    sizes = [found.cache_bytes(one, batch=batch, context=context) for one in (formats, None)]
    texts = list(dict.fromkeys(map(str, formats or ())))
    stores = "as the model makes them" if formats is None else texts[0] if len(texts) == 1 else f"{len(texts)} formats"
    longest = found.longest(formats, room, batch=batch)
    return Line(name, stores, float(found.token_bytes(formats)), sizes[0], sizes[0] / sizes[1], longest)


def table(found: Memory, lines: list[Line], memory: str, batch: int, context: int) -> Table:
    """The lines for people."""
    of = f"{batch} sequences" if batch > 1 else "one sequence"
    limit = f"; the model takes {found.positions:,} tokens" if found.positions else ""
    title = f"cache of {len(found.layers)} layers, {of}, beside {_size(found.weights)} of weights{limit}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("cache", no_wrap=True)
    shown.add_column("stores", overflow="fold")
    shown.add_column("bytes/token", justify="right")
    shown.add_column(f"at {context:,} tokens", justify="right")
    shown.add_column("of float", justify="right")
    shown.add_column(f"longest in {memory}", justify="right")
    for one in lines:
        longest = "no limit" if one.longest is None else f"{one.longest:,}" if one.longest else "no room"
        shown.add_row(
            one.name, one.stores, f"{one.token_bytes:,.1f}", _size(one.cache_bytes), f"{one.ratio:.3f}", longest
        )  # fmt: skip
    return shown


def record(found: Memory, lines: list[Line], room: int, batch: int, context: int) -> dict[str, Any]:
    """The lines and what they rest on, JSON-able."""
    return {
        "weights": found.weights, "activations": str(found.activations), "memory": room, "batch": batch,
        "context": context, "positions": found.positions, "caches": [asdict(one) for one in lines],
    }  # fmt: skip


def _size(count: float) -> str:
    """Bytes for people, in powers of two."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
