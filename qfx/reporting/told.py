"""What was said while a model was quantized, kept with it for its report: skipped rewrites, shared tables, little data.

It goes along with copies of the model in memory and with its folder, there without source lines, which name files of
the machine that quantized it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from qfx.errors import Note
from qfx.pipeline import alike

_NAME = "_qfx_notes"


def remember(model: nn.Module, notes: Iterable[Note]) -> None:
    """Keep notes with a quantized model, those that differ in their nodes alone as one."""
    model.__dict__[_NAME] = tuple(alike(dict.fromkeys(notes)))


def remembered(model: nn.Module) -> tuple[Note, ...]:
    """The notes that are kept with a model."""
    found: tuple[Note, ...] = model.__dict__.get(_NAME, ())
    return found


def written(model: nn.Module) -> list[dict[str, Any]]:
    """The notes of a model for its folder, JSON-able; `read` is the way back."""
    return [{key: value for key, value in asdict(note).items() if key != "where"} for note in remembered(model)]


def read(found: Iterable[Mapping[str, Any]]) -> tuple[Note, ...]:
    """The notes of a folder. Raises TypeError for other fields than `written` gave."""
    return tuple(Note(**one) for one in found)
