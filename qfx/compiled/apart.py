"""Outputs of a compiled graph that lie where its state is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def apart(outputs: Sequence[Any], changed: Mapping[int, Tensor]) -> list[Any]:
    """Outputs, copies of those that lie in what is about to change: a graph may give an input, or a part of it.

    changed: what the first of them are to be written into; one that is there already stays.
    """
    places = {t.untyped_storage().data_ptr() for t in changed.values() if t.numel()}

    def lies_there(value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() > 0 and value.untyped_storage().data_ptr() in places

    return [o.clone() if o is not changed.get(i) and lies_there(o) else o for i, o in enumerate(outputs)]
