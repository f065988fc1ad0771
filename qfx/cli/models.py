"""The models and texts that commands are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from qfx import data
from qfx.errors import first_line
from qfx.hf import hub

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class TextOptions:
    """The text of a command (file None: none given), JSON field, and how it is cut. None: the command chooses."""

    file: Path | None
    field: str
    samples: int | None
    batch_size: int
    seq_len: int | None
    seed: int


def check_target(out: Path, model: Path) -> None:
    """Raises ValueError where a folder cannot be written, since it is a file or the model's own."""
    if out.exists() and (not out.is_dir() or out.resolve() == model.resolve()):
        what = "the model itself" if out.is_dir() else "a file"
        raise ValueError(f"{out} cannot be written to: it is {what}\n  next step: give another folder")


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError where there is none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {first_line(error)}") from error
    return device


def open_quantized(folder: Path, device: torch.device | str = "cpu") -> hub.Loaded:
    """A model that `qfx quantize` wrote. Raises ValueError where the folder holds none."""
    from qfx.save import load

    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}\n  expected: a folder that `qfx quantize` wrote")
    model = load(folder)
    return hub.Loaded(model.eval().to(device), hub.load_tokenizer(folder), folder)


def batches(loaded: hub.Loaded, texts: list[str], options: TextOptions, samples: int) -> list[dict[str, Any]]:
    """Batches of a text for a model, on its device."""
    made = data.text_batches(
        loaded.tokenizer,
        texts,
        seq_len=sample_length(loaded, options.seq_len),
        batch_size=options.batch_size,
        samples=samples,
        seed=options.seed,
    )
    device = _device(loaded.model)
    return [data.fitting(loaded.model, {k: v.to(device) for k, v in batch.items()}) for batch in made]


def tell_few(console: Console, made: list[dict[str, Any]], wanted: int, file: Path | None) -> None:
    """Say how many samples a text gave where it is shorter than was asked for."""
    sizes = [next(v.shape for v in batch.values() if isinstance(v, Tensor)) for batch in made]
    if (found := sum(size[0] for size in sizes)) < wanted:
        told = f"{file} gives {found} of {wanted} samples of {sizes[0][1]} tokens"
        console.print(told, style="yellow", soft_wrap=True)


def sample_length(loaded: hub.Loaded, asked: int | None) -> int:
    """Tokens a sample. Raises ValueError where more are asked for than the model takes."""
    limits = [
        getattr(loaded.tokenizer, "model_max_length", None),
        getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None),
    ]
    most = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    if asked is None:
        return DEFAULT_LENGTH if most is None else min(DEFAULT_LENGTH, most)
    if most is not None and asked > most:
        raise ValueError(f"the model takes {most} tokens, found --seq-len {asked}")
    return asked


def _device(model: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
