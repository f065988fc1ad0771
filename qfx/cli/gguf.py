"""`qfx export-gguf`: load, write a GGUF file for llama.cpp."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from qfx.cli.models import TextOptions, batches, open_quantized
from qfx.cli.terminal import megabytes, step
from qfx.data import read_texts
from qfx.hf import hub
from qfx.interop.gguf_types import mix_named
from qfx.storage.files import check_writable

SAMPLES = 64


def run(
    console: Console,
    model: str,
    out: Path,
    mix: str,
    text: TextOptions,
    *,
    rounding: str,
    tokenizer: bool,
    strict: bool,
) -> None:
    """A folder that qfx wrote keeps its values where blocks hold them; everything else is rounded into the mix."""
    mix = mix_named(mix)  # before anything is loaded
    if rounding != "mse" and text.file is None:
        raise ValueError(f"--rounding {rounding} needs data\n  next step: --data text.txt, like the model's own text")
    if out.is_dir():
        raise ValueError(f"{out} is a folder\n  expected: the path of a .gguf file")
    check_writable(out.parent)
    saved = (Path(model) / "qfx.json").is_file()
    texts = None if text.file is None else read_texts(text.file, text.field)
    from qfx.interop.gguf_export import export_gguf, need_gguf

    need_gguf()
    with step(console, f"load {model}"):
        loaded = open_quantized(Path(model)) if saved else hub.load(hub.resolve(model))
    data = None
    if texts is not None:
        with step(console, f"read {text.file}"):
            data = batches(loaded, texts, text, text.samples or SAMPLES)
    with step(console, f"write {out}"):
        done = export_gguf(
            loaded.model,
            out,
            mix,
            tokenizer=loaded.tokenizer if tokenizer else False,
            data=data,
            rounding=rounding,
            strict=strict,
            name=Path(model).name,
        )
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(done.types.values()).most_common())
    console.print(f"{done.path}: {megabytes(done.nbytes)}, {len(done.types)} tensors ({counts})")
