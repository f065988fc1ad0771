"""Helpers of the tests of exact rewrites: zoo models captured once, the function before and after a rewrite."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph, run
from qfx.capture import capture_export
from qfx.errors import Note
from qfx.passes import untie
from qfx.passes.cleanup import cleanup
from qfx.passes.normalize import normalize
from qfx.passes.rewrites import apply_record
from tests.graphs import capture, tensors
from tests.zoo import ZOO

Factor = Callable[[Any], Tensor | None]


class Case:
    """A model, its inputs, its graph in normal form and its outputs."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool = True
    ) -> None:
        self.model, self.args, self.kwargs = model.eval(), args, kwargs
        captured = capture_export(model, args, kwargs, dynamic=dynamic)
        self._graph = captured.gm
        normalize(self._graph)
        self.flat = captured.flatten(args, kwargs)
        self.expected = self.run(model)
        self.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def copies(self, *, untied: bool = False) -> tuple[fx.GraphModule, nn.Module]:
        """A graph and a live model to change."""
        gm, live = graph.copy(self._graph), copy.deepcopy(self.model)
        for site in untie.find(gm)[0] if untied else ():
            untie.apply(gm, site)
            untie.apply(live, site)
        return gm, live

    @torch.no_grad()
    def run(self, model: nn.Module) -> list[Tensor]:
        """The floating outputs of a live model."""
        return [t for t in tensors(model(*self.args, **self.kwargs)) if t.is_floating_point()]

    @torch.no_grad()
    def error(self, changed: nn.Module) -> float:
        """How far a changed graph or live model is from the original: the greatest relative error of an output."""
        if isinstance(changed, fx.GraphModule):
            changed.graph.lint()
            changed.recompile()
            found = [t for t in tensors(changed(*self.flat)) if t.is_floating_point()]
        else:
            found = self.run(changed)
        pairs = zip(found, self.expected, strict=True)
        return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)

    def untouched(self) -> bool:
        """Does the original model hold what it held?"""
        return all(torch.equal(tensor, self.before[name]) for name, tensor in self.model.state_dict().items())


def cleaned(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """The graph of a model with fixed sizes, after clean-up."""
    gm = capture(model, *inputs)
    run.run(gm, [cleanup])
    return gm


VARYING = ("bert", "gpt2", "llama")


@lru_cache(maxsize=32)
def zoo(name: str) -> Case:
    """A model of the zoo; of those in VARYING the sizes are symbols, of the others numbers: a third of the tracing."""
    model, inputs = ZOO[name]()
    return Case(model, (), inputs, dynamic=name in VARYING)


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Random factors from about 0.05 to 20."""
    return torch.exp(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def check(
    case: Case, rewrite: ModuleType, factor: Factor, *, untied: bool = False, limit: float = 1e-5
) -> tuple[list[Any], list[Note]]:
    """Apply a rewrite at every site it finds, by its JSON record, to the graph and to a live copy; both stay exact."""
    gm, live = case.copies(untied=untied)
    sites, refusals = rewrite.find(gm)
    records = [site.to_record() for site in sites]
    assert [type(site).from_record(json.loads(json.dumps(r))) for site, r in zip(sites, records, strict=True)] == [
        type(site).from_record(r) for site, r in zip(sites, records, strict=True)
    ]
    for site, record in zip(sites, records, strict=True):
        values = factor(site)
        given = {"factor": values} if values is not None else {}
        record |= {key: key for key in given}
        apply_record(gm, record, given)
        if not getattr(site, "explicit", False):
            apply_record(live, record, given)
    assert case.error(gm) <= limit, f"{case.error(gm):.1e}"
    assert case.error(live) <= limit, f"{case.error(live):.1e}"
    assert case.untouched()
    assert list(live.state_dict()) == list(case.before)
    return sites, refusals
