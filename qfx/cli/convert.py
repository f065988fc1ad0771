"""`qfx convert`: a quantized model as a checkpoint of another library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import nn

from qfx import interop
from qfx.cli.models import check_target
from qfx.cli.terminal import megabytes, step
from qfx.hf import hub
from qfx.storage.files import check_writable

EXPORTS: dict[str, Callable[..., None]] = {
    "compressed-tensors": interop.export_compressed_tensors,
    "gptq": interop.export_gptq,
    "awq": interop.export_awq,
    "bnb": interop.export_bnb,
}


def run(console: Console, folder: Path, out: Path, layout: str, *, strict: bool) -> None:
    """The tokenizer comes along. Raises ValueError for a folder that holds no quantized model."""
    from qfx.save import save

    check_target(out, folder)
    check_writable(out)
    with step(console, f"load {folder}"):
        model = _load(folder, strict=strict)
        tokenizer = hub.load_tokenizer(folder)
    with step(console, f"write {out}", spinner=False):
        if layout == "qfx":
            save(model, out)
            if tokenizer is not None:
                tokenizer.save_pretrained(out)
        else:
            EXPORTS[layout](model, out, tokenizer=tokenizer, strict=strict)
    console.print(f"on disk: {megabytes(hub.bytes_on_disk(folder))} -> {megabytes(hub.bytes_on_disk(out))}")


def _load(folder: Path, *, strict: bool) -> nn.Module:
    from qfx.save import load

    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}\n  expected: a folder that `qfx quantize` wrote, or a checkpoint"
        )
    if (folder / "qfx.json").is_file():
        return load(folder)
    return interop.import_checkpoint(folder, strict=strict)
