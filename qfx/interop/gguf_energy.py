"""How strongly data drives each input of each linear: the mean square over all tokens but padding (an imatrix)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qfx.calibration.padding import Attended, attended_by, of_view, without
from qfx.data import calls, telling
from qfx.quantize import evaluating


def input_energy(model: nn.Module, names: Iterable[str], data: Iterable[Any]) -> dict[str, Tensor]:
    """FQN of a linear layer -> f32 [in features], the mean square of its inputs over the batches of `data`.

    Layers that no batch reaches are left out. Hooks are taken off again. Raises ValueError for bad data (the batch is
    named), and for a layer whose inputs are not finite (named).
    """
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = without(of_view(args[0], kept).detach(), kept).to(torch.float32).flatten(0, -2)
            total = x.square().sum(0)
            if not bool(torch.isfinite(total).all()):
                raise ValueError(f"the inputs of {name!r} are not finite on the calibration data")
            found[name] = found[name] + total if name in found else total
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    batches = calls(model, data)
    kept: Attended = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        with evaluating(model):
            for number, (args, kwargs) in enumerate(batches, 1):
                kept = attended_by(model, args, kwargs)
                with telling(number):
                    model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).cpu() for name, total in found.items()}
