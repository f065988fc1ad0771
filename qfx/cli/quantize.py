"""`qfx quantize`: load, read data, quantize, save."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qfx.allocation.asked import with_budget
from qfx.cli.models import TextOptions, batches, check_device, check_target, tell_few
from qfx.cli.terminal import megabytes, step
from qfx.data import read_texts
from qfx.hf import hub
from qfx.recipe import Recipe, Rule
from qfx.storage import streamed
from qfx.storage.files import check_writable

_SHARE = 0.6  # of the free memory that a model may take before it stays on disk


def run(
    console: Console, model: str, out: Path, recipe: str, text: TextOptions, *, strict: bool, device: str,
    resume: Path | None = None, stream: bool | None = None, budget: Mapping[str, Any] | None = None,
    html_file: Path | None = None, kv: str | None = None,
) -> None:  # fmt: skip
    """Everything that can be refused is refused before the model is loaded.

    stream: leave the weights on disk until they are used; None: where they would take too much of the free memory.
    budget: by name, as `qfx.plan` takes it, None where it is not given. html_file: for pictures of what it gives each
    weight. kv: formats of the cache (of keys and of values, comma between them), beside what the recipe says.
    """
    parsed = with_budget(with_cache(Recipe.parse(recipe), kv), **(budget or {}))
    _check(parsed, text, html_file)
    place = check_device(device)
    texts = None if text.file is None else read_texts(text.file, text.field)
    folder = hub.resolve(model)
    check_target(out, folder)
    check_writable(out)  # before the work, not after it
    from qfx.quantize import plan, quantize
    from qfx.report import report
    from qfx.save import save

    if stream and place.type != "cpu":
        raise ValueError(f"--stream runs on the CPU, found --device {device}\n  next step: leave one of them out")
    if stream is None:
        stream = place.type == "cpu" and _is_tight(console, folder)
    with step(console, f"{'open' if stream else 'load'} {model}"):
        loaded = streamed.load(folder, scratch=out.absolute().parent) if stream else hub.load(folder, device=place)
    data = None
    if texts is not None and not parsed.needs_data:
        console.print(f"recipe {parsed.name!r} needs no data: {text.file} is not used", style="yellow")
    elif texts is not None:
        samples = text.samples or parsed.num_calibration_samples
        with step(console, f"read {text.file}"):
            data = batches(loaded, texts, text, samples)
        tell_few(console, data, samples, text.file)
    with step(console, f"quantize by {parsed.name}", spinner=False):
        made = None if html_file is None else plan(loaded.model, parsed, data, strict=strict, resume=resume)
        gc.collect()  # graphs, which would keep every float weight alive
        if made is None:
            quantized = quantize(loaded.model, parsed, data, strict=strict, resume=resume)
        else:
            quantized = quantize(loaded.model, made, strict=strict)
    with step(console, f"save to {out}"):
        save(quantized, out, tokenizer=loaded.tokenizer)
    report(quantized).show(console, all_rows=False)
    if made is not None and html_file is not None:
        from qfx.pictures.plans import allocation

        allocation(made, title=f"{parsed.name} of {Path(model).name}").write(html_file)
    console.print(f"on disk: {megabytes(hub.bytes_on_disk(folder))} -> {megabytes(hub.bytes_on_disk(out))}")


def _check(recipe: Recipe, text: TextOptions, html_file: Path | None) -> None:
    """Raises ValueError for a recipe without the data that it needs, and without a budget that could be drawn."""
    if html_file is not None and recipe.allocation is None:
        raise ValueError(
            f"--html shows what each weight gets under a budget, and recipe {recipe.name!r} has none\n"
            "  next step: --recipe heads --avg-bits 4, or leave --html out"
        )
    if text.file is None and recipe.needs_data:
        under, other = (
            (" under a budget", "") if recipe.allocation else ("", ", or a recipe that needs none: w8a8, w4a16")
        )
        raise ValueError(
            f"recipe {recipe.name!r}{under} needs calibration data\n"
            f"  next step: --data FILE (of a language model, qfx generate writes one){other}"
        )


def with_cache(recipe: Recipe, kv: str | None) -> Recipe:
    """The recipe with a rule for the cache. Raises ValueError for formats that no cache can have."""
    if kv is None:
        return recipe
    keys, *values = kv.split(",")
    if len(values) > 1:
        raise ValueError(f"--kv takes one format, or those of keys and of values, found {kv!r}")
    rule = Rule(target="cache", k=keys, v=values[0] if values else keys)
    return recipe.override(name=f"{recipe.name}+kv={kv}", rules=(*recipe.rules, rule), cache_bits=None)


def _is_tight(console: Console, folder: Path) -> bool:
    """Whether the model of a folder, in float32, would take too much of the free memory; says so."""
    free, needed = streamed.free_memory(), streamed.float_bytes(folder)
    if free is None or needed is None or needed < _SHARE * free:
        return False
    told = f"the weights stay on disk: in float32 they would take {megabytes(needed)} of {megabytes(free)} free memory"
    console.print(f"{told} (--no-stream loads them)", style="yellow")
    return True
