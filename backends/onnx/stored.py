"""A lowered graph that was saved: ONNX Runtime's own optimized models and what to feed them. Nothing is captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qfx.backends.onnx.lowering import as_tensor
from qfx.backends.onnx.session import Session
from qfx.errors import Note

Slots = dict[str, Any]


class Stored:
    """Runs what `OnnxLowered.stored` describes, from the folder that its models were saved in; called as that is.

    The weights are mapped from the files, so that only what is used of them is in memory, shared between processes.
    Raises SessionError where ONNX Runtime cannot read a model.
    """

    notes: tuple[Note, ...] = ()

    def __init__(self, folder: Path, program: Mapping[str, Any]) -> None:
        self._inputs = list(program["inputs"])
        self._steps = [_step(folder, step) for step in program["steps"]]
        self._outputs = [(o[0], None) if isinstance(o, list) else (None, o) for o in program["outputs"]]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run. Raises ValueError where the number of inputs differs from the placeholders."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"expected {len(self._inputs)} inputs in placeholder order, found {len(inputs)}")
        slots: Slots = dict(zip(self._inputs, inputs, strict=True))
        for step in self._steps:
            step(slots)
        return tuple(slots[name] if name is not None else value for name, value in self._outputs)


def _step(folder: Path, step: Mapping[str, Any]) -> Callable[[Slots], None]:
    session = Session.open(folder / step["model"], {int(o): int(i) for o, i in step["in_place"]})
    inputs: Sequence[str] = step["inputs"]
    sizes, outputs = step["sizes"], step["outputs"]

    def run(slots: Slots) -> None:
        feeds = [as_tensor(slots[name]) for name in inputs]
        feeds += [as_tensor(slots[name] if axis is None else slots[name].shape[axis]) for name, axis in sizes]
        for (name, is_integer), value in zip(outputs, session.run(feeds), strict=True):
            slots[name] = value.item() if is_integer else value

    return run
