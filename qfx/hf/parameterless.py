"""Models of transformers that have no float parameter left: they still say their device and dtype.

transformers reads both from the first parameter (`generate()` and `save_pretrained` do, too); packed weights are
buffers, so that a model without norms' weights and biases (OLMo) would have none.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from qfx.live.modules import PackedModule
from qfx.live.subclass import class_maker, subclass


def tell_device(model: nn.Module) -> nn.Module:
    """Let each transformers model in `model` without float parameters tell device and dtype from what is packed."""
    found = sys.modules.get("transformers.modeling_utils")
    whole: list[Any] = [] if found is None else [m for m in model.modules() if isinstance(m, found.PreTrainedModel)]
    for module in whole:
        floats = any(p.is_floating_point() for p in module.parameters())
        if not floats and any(True for _ in module.buffers()) and not hasattr(module, "qfx_parameterless"):
            module.__class__ = _class_of(type(module))
    return model


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    def device(self: nn.Module) -> torch.device:
        return next(tensor.device for tensor in (*self.parameters(), *self.buffers()))

    return subclass(base, {"device": property(device), "dtype": property(_dtype), "qfx_parameterless": base})


def _dtype(self: nn.Module) -> torch.dtype:
    """That of float parameters where some came back, else what packed weights are computed in."""
    for parameter in self.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    for module in self.modules():
        if isinstance(module, PackedModule):
            return module.dtype
        for spec in module.__dict__.get("qfx_packed", {}).values():
            found: torch.dtype = spec.dtype
            return found
    return torch.float32
