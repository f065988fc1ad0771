"""Sizes that vary can become expressions so long that torch works on them for hours: tracing then stops in time.

Windows that are padded and turned back, layer after layer (Swin, MaskFormer), give each size as a quotient of those
before it, and their length doubles with each. Sizes of other models are sums and quotients of a few terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Operations: most models that trace well have up to 15, the tokens of a pyramid 8 for each of its levels; those of
# Swin pass 70 in its second layer.
LONGEST = 60


class LongSize(Exception):  # noqa: N818  (how a trace is left, not what a user sees)
    """A size of a traced tensor is an expression of more than LONGEST operations."""


class ShortSizes(TorchFunctionMode):
    """While it is entered, a function that gives a tensor of such a size raises LongSize."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found) if isinstance(found, list | tuple) else (found,):
            if isinstance(leaf, torch.Tensor):
                self._look(leaf)
        return found

    def _look(self, tensor: torch.Tensor) -> None:
        for size in tensor.shape:
            if isinstance(size, torch.SymInt) and (expr := size.node.expr) not in self._seen:
                self._seen.add(expr)
                if expr.count_ops() > LONGEST:
                    raise LongSize(str(expr))
