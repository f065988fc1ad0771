"""Models in float16 look for overflow (BART, Marian, RT-DETR: `if not torch.isfinite(x).all(): x = x.clamp(..)`), and a
trace has no values that it could look at. It takes the branch of values that are finite.

Where a traced graph runs, that branch is right: files compute float16 in float32, which does not overflow there. Of
other dtypes nobody knows the answer (a mask may hold -Inf), and they are asked of no trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_ASKS = {torch.isfinite: True, torch.isinf: False, torch.isnan: False}
_SUMS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}


class TakenFinite(TorchFunctionMode):
    """While it is entered, `if` of whether all values of a float16 tensor are finite, or any is Inf or NaN, reads
    none."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()  # what is asked of a tensor that is a condition

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0] in self._known:
            return bool(self._known[args[0]])
        found = func(*args, **(kwargs or {}))
        answer = _ASKS.get(func, _SUMS.get(func))
        if answer is None or not isinstance(found, Tensor) or not args:
            return found
        if args[0].dtype == torch.float16 if func in _ASKS else self._known.get(args[0]) is answer:
            self._known[found] = answer
        return found
