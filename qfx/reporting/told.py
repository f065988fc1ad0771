"""What was said while a model was quantized, kept with it for its report: skipped rewrites, shared tables, little data.

It goes along with copies of the model in memory. A folder holds what the model is; `qfx.plan` has the notes, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qfx.errors import Note
from qfx.pipeline import alike

_NAME = "_qfx_notes"


def remember(model: nn.Module, notes: Iterable[Note]) -> None:
    """Keep notes with a quantized model, those that differ in their nodes alone as one."""
    model.__dict__[_NAME] = tuple(alike(dict.fromkeys(notes)))


def remembered(model: nn.Module) -> tuple[Note, ...]:
    """The notes that are kept with a model; none where it was loaded."""
    found: tuple[Note, ...] = model.__dict__.get(_NAME, ())
    return found
