"""Edits of parameters by FQN, in a GraphModule and in the user's live model alike.

An edit replaces parameters by new ones, so that tensors which others hold stay as they were; every name of a tied
parameter gets the new one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qfx import graph
from qfx.passes._sites import Norm
from qfx.storage.spill import beside, rest

_PART = 1 << 20  # elements that are worked on in f64 at once


def check_factor(factor: Tensor, count: int, what: str) -> None:
    """Raises ValueError for what are no `count` positive factors."""
    if factor.shape != (count,) or not bool((factor > 0).all()) or not bool(torch.isfinite(factor).all()):
        raise ValueError(f"expected {count} positive factors for {what!r}, found {factor}")


def edit(module: nn.Module, fqn: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter or buffer by `change` of it, computed in f64 and cast back, under every name that it has."""
    old = graph.get_tensor(module, fqn)
    with torch.no_grad():
        new = change(old.detach().to(torch.float64)).to(old.dtype).contiguous()
    put(module, fqn, new)


def put(module: nn.Module, fqn: str, new: Tensor) -> None:
    """Let every name of the tensor `fqn` hold `new`, a parameter where that is one. The order of parameters stays.

    Where the old tensor lies in a file, the new one does, too (see `qfx.storage.spill`).
    """
    old = graph.get_tensor(module, fqn)
    new = beside(new.detach(), old)
    rest(old)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            for leaf, held in store.items():
                if held is old:
                    store[leaf] = new  # type: ignore[assignment]


def scale(module: nn.Module, fqn: str, factor: Tensor, axis: int) -> None:
    """Multiply a stored tensor by `factor` along one axis, in f64 and in parts, since the tensor may be large."""
    old = graph.get_tensor(module, fqn)
    shape = [1] * old.dim()
    shape[axis] = -1
    wide = factor.to(old.device, torch.float64).reshape(shape)
    new = torch.empty_like(old, memory_format=torch.contiguous_format, requires_grad=False)
    with torch.no_grad():
        for rows in parts(old):
            new[rows] = (old[rows].to(torch.float64) * (wide[rows] if axis % old.dim() == 0 else wide)).to(old.dtype)
            rest(old[rows])
    put(module, fqn, new)


def parts(tensor: Tensor) -> list[slice]:
    """Slices of the first axis, each of a bounded number of elements."""
    step = max(_PART * len(tensor) // max(tensor.numel(), 1), 1)
    return [slice(start, start + step) for start in range(0, len(tensor), step)]


def scale_norm(module: nn.Module, norm: Norm, factor: Tensor) -> None:
    """Multiply what a norm gives by `factor` [channels]."""
    one = 1.0 if norm.plus_one else 0.0
    edit(module, norm.weight, lambda w: (w + one) * factor.to(w) - one)
    if norm.bias is not None:
        scale(module, norm.bias, factor, 0)
