"""`qfx export`: load, quantize, write ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qfx.cli.models import TextOptions, batches, open_quantized, tell_few
from qfx.cli.terminal import megabytes, step
from qfx.data import read_texts
from qfx.decoding.cache_scales import SAMPLES, cache_formats
from qfx.decoding.encoder_decoder import is_encoder_decoder
from qfx.hf import hub
from qfx.kv.held import caches_of
from qfx.recipe import Recipe
from qfx.storage.files import check_writable


def run(
    console: Console, model: str, out: Path, recipe: str | None, text: TextOptions, how: Mapping[str, Any], *,
    strict: bool,
) -> None:  # fmt: skip
    """A folder that qfx wrote is exported as it is, another model by a recipe. how: further options of the export."""
    from qfx.export import checked_ending, export_onnx

    checked_ending(out)
    check_writable(out.parent if out.suffix == ".onnx" else out)  # before the work, not after it
    kv = how.get("kv")
    saved = (Path(model) / "qfx.json").is_file()
    parsed = None if recipe is None else Recipe.parse(recipe)
    if saved and parsed is not None:
        raise ValueError(f"{model} is quantized already\n  next step: leave --recipe out, or give the float model")
    if parsed is None and not saved:
        parsed = Recipe.parse("w8a8")
    cache_formats(kv)  # before anything is loaded
    static = parsed is not None and parsed.needs_data
    cached = kv is not None or bool(parsed is not None and parsed.cache_rules)
    texts = None if text.file is None else read_texts(text.file, text.field)
    if texts is None and parsed is not None and static:
        raise ValueError(f"recipe {parsed.name!r} needs calibration data\n  next step: --data FILE")
    if texts is None and kv is not None:
        raise ValueError(f"--kv {kv} needs calibration data\n  next step: --data FILE")
    with step(console, f"load {model}"):
        loaded = open_quantized(Path(model)) if saved else hub.load(hub.resolve(model))
    data = None
    if texts is not None and (static or cached or caches_of(loaded.model)):
        samples = text.samples or (parsed.num_calibration_samples if parsed is not None else SAMPLES)
        with step(console, f"read {text.file}"):
            data = batches(loaded, texts, text, samples)
        tell_few(console, data, samples, text.file)
    with step(console, f"export to {out}", spinner=False):
        done = export_onnx(loaded.model, None, out, recipe=parsed, data=data, strict=strict, **how)
    folder = done.path != out
    if folder and loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(out)
    console.print(f"inputs:  {_shown(done.inputs)}\noutputs: {_shown(done.outputs)}")
    console.print(f"opset {done.opset}, {len(done.formats)} quantized nodes, {megabytes(done.nbytes)}:")
    for file in done.files:
        console.print(f"  {file}")
    if folder:
        other = "" if is_encoder_decoder(loaded.model) else ", or onnxruntime_genai.Model(folder)"
        console.print(f"open it: qfx.onnx.load(folder){other}")


def _shown(names: Sequence[str]) -> str:
    """The names; of many the first and their number."""
    return ", ".join(names) if len(names) <= _MOST else f"{', '.join(names[:_MOST])}, ... ({len(names)} in all)"


_MOST = 6
