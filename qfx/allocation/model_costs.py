"""The costs of a model, and the formats of a plan as costs take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qfx.allocation.costs import Asked, Costs
from qfx.capture import capture_export
from qfx.decoding import decoder
from qfx.errors import UnsupportedError
from qfx.hf.hub import is_causal_lm
from qfx.inputs import example_inputs, need_inputs, without_cache
from qfx.pipeline import prepare
from qfx.plan import Plan
from qfx.quantize import evaluating


def costs_of(model: nn.Module, example: Mapping[str, Any] | None = None) -> Costs:
    """Of a model: a decoder's with its cache and the logits of the last token alone, as `generate` and exports run it.

    example: keyword arguments of a call; None where the model's configuration tells its inputs. Raises ValueError where
    they are not known, UnsupportedError for a model that is not one graph.
    """
    with evaluating(model), torch.no_grad():
        if is_causal_lm(model):
            try:
                captured, names = decoder.capture_decoder(model, last_only=True)
            except UnsupportedError:
                pass  # it keeps no plain cache: its costs are those of a call without one
            else:
                prepare(captured.gm)
                decoder.fuse_cache(captured, names)
                return Costs.of(captured.gm)
        given = example_inputs(model) if example is None else without_cache(model, dict(example))
        if given is None:
            raise need_inputs(model)
        captured = capture_export(model, (), given)
        prepare(captured.gm)
        return Costs.of(captured.gm)


def weights_of(model: nn.Module) -> Costs:
    """The costs of a model where its weights alone are asked for: of a graph without a cache in which no size varies,
    which is traced in a sixth of the time. Raises as `costs_of`."""
    with evaluating(model), torch.no_grad():
        given = example_inputs(model)
        if given is None:
            raise need_inputs(model)
        captured = capture_export(model, (), given, dynamic=False)
        prepare(captured.gm)
        return Costs.of(captured.gm)


def formats_of_plan(plan: Plan, costs: Costs) -> Asked:
    """Roles and formats by name, of the plan's nodes whose weights are in the costs."""
    known = {name for one in costs.stored.values() for name in one.names}
    return {fqn: plan.formats(fqn) for fqn in plan.annotations if fqn in known}
