"""What compiled graphs tell the report. A record lives as long as its compiled graph; nothing else is remembered."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qfx.compiled.frame import Frame
from qfx.errors import Note
from qfx.names import Translation
from qfx.reporting.rows import Row


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """One graph, compiled for one set of weights.

    rows: by the names that the compiled model has. weights: name in the graph -> the user's tensor, weakly. options: as
    given to torch.compile. failed: why the untouched graph runs, else "". first_call: seconds that the first call took
    where a compiler works at that time (Triton), else None.
    """

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    weights: tuple[tuple[str, Callable[[], Tensor | None]], ...]
    frame: Frame
    options: Any = None
    failed: str = ""
    first_call: Callable[[], float | None] = lambda: None
    serial: int = field(default_factory=itertools.count().__next__)

    def named(self, names: dict[int, list[str]]) -> GraphRecord | None:
        """The record with the names of a module's index; None where none of its weights is the module's."""
        translation = Translation.between([(name, ref()) for name, ref in self.weights], names)
        if not translation.heads:
            return None
        own = [note for note in self.notes if note.node == "graph" or translation.knows(note.node)]
        return replace(
            self,
            rows=tuple(replace(r, node=translation(r.node)) for r in self.rows if translation.knows(r.node)),
            notes=tuple(n if n.node == "graph" else replace(n, node=translation(n.node)) for n in own),
            weights=tuple((translation(name), ref) for name, ref in self.weights if translation.knows(name)),
        )


_RECORDS: weakref.WeakSet[GraphRecord] = weakref.WeakSet()
_LOCK = threading.Lock()


def remember(record: GraphRecord) -> GraphRecord:
    """Let reports find the record while someone holds it."""
    with _LOCK:
        _RECORDS.add(record)
    return record


def all_records() -> list[GraphRecord]:
    """Every record whose compiled graph lives, in no order."""
    with _LOCK:
        return list(_RECORDS)


def of_function(function: Any) -> list[GraphRecord]:
    """The records of the graphs of a function that was given to torch.compile."""
    return [record for record in all_records() if record.frame.target() is function]
