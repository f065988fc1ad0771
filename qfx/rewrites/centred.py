"""A LayerNorm of values whose mean is zero: an RMS norm with the LayerNorm's parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qfx.errors import UnsupportedError, explain
from qfx.live.subclass import class_maker, subclass


def centred(module: nn.Module) -> nn.Module:
    """Let an nn.LayerNorm divide by the root mean square of its input instead of the deviation from the mean.

    The module's class becomes a subclass of itself; parameters, names and hooks stay. Raises UnsupportedError for
    modules with a forward of their own.
    """
    if is_centred(module):
        return module
    if not can_be_centred(module):
        raise UnsupportedError(
            explain(
                f"the plan makes an RMS norm of a {type(module).__name__}",
                expected="an nn.LayerNorm over the last axis, with its own forward",
                next_step="plan again for this model",
            )
        )
    kind: Any = type(module)
    module.__class__ = _class_of(kind)
    return module


def can_be_centred(module: nn.Module) -> bool:
    """Is it an nn.LayerNorm over the last axis that computes what nn.LayerNorm does?"""
    own = isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward
    return own and "forward" not in module.__dict__ and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def is_centred(module: nn.Module) -> bool:
    """Has `centred` changed it?"""
    return hasattr(type(module), "qfx_centred")


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.LayerNorm, input: Tensor) -> Tensor:  # noqa: A002  (nn.LayerNorm's own name)
        y = F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
        return y if self.bias is None else y + self.bias

    return subclass(base, {"forward": forward, "qfx_centred": base}, "Centred")
