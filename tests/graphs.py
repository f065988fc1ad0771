"""Small helpers of the tests of passes: capture a function, run a pass, compare text and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph, run
from qfx.capture import capture_export
from qfx.passes.cleanup import cleanup
from qfx.text import dump


class Function(nn.Module):
    """A function with named tensors as its parameters: `function(self, *inputs)`."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor | nn.Module) -> None:
        super().__init__()
        for name, value in tensors.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def capture(model: nn.Module, *inputs: Any, dynamic: bool = False, **kwargs: Any) -> fx.GraphModule:
    """The model's graph in normal form, before any pass. The model moves to the device of its inputs."""
    for x in tensors(inputs)[:1]:
        model.to(x.device)
    captured = capture_export(model.eval(), inputs, kwargs, dynamic=dynamic)
    captured.gm.meta["used_inputs"] = captured.inputs
    return captured.gm


def after(pass_: run.Pass, model: nn.Module, *inputs: Any, dynamic: bool = False) -> tuple[fx.GraphModule, int]:
    """(graph, number of matches) after clean-up, the pass, and clean-up."""
    gm = capture(model, *inputs, dynamic=dynamic)
    run.run(gm, [cleanup, pass_, cleanup])
    graph.rename(gm)
    matches: Mapping[str, int] = gm.meta["qfx_matches"]
    return gm, matches[run.name_of(pass_)]


def text(gm: fx.GraphModule) -> str:
    """The graph's text with names in order."""
    graph.rename(gm)
    return dump(gm)


def calls(gm: fx.GraphModule, *names: str) -> list[fx.Node]:
    """The graph's calls; with names those of these operators."""
    found = [n for n in gm.graph.nodes if n.op == "call_function"]
    return [n for n in found if graph.op_name(n) in names] if names else found


def node_of(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node of a name."""
    (found,) = [n for n in gm.graph.nodes if n.name == name]
    assert isinstance(found, fx.Node)
    return found


def counts(gm: fx.GraphModule) -> dict[str, int]:
    """How often each operator is called."""
    found: dict[str, int] = {}
    for node in calls(gm):
        found[graph.op_name(node)] = found.get(graph.op_name(node), 0) + 1
    return found


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested value, flat."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def error(expected: Any, found: Any) -> float:
    """The greatest error relative to the greatest value, over all tensors."""
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    assert pairs, "nothing to compare"
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    doubles = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in doubles)


@torch.no_grad()
def same(pass_: run.Pass, model: nn.Module, *inputs: Any, limit: float = 1e-5, dynamic: bool = False) -> int:
    """Assert that the model computes the same before and after the pass; returns the number of matches."""
    gm, count = after(pass_, model, *inputs, dynamic=dynamic)
    expected = model(*inputs)
    found = gm(*[tensors(inputs)[i] for i in gm.meta["used_inputs"]])
    assert error(expected, found) <= limit, f"{error(expected, found):.2e} > {limit:.0e}\n{text(gm)}"
    return count
