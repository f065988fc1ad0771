"""Gradients block by block: the same as of the whole at once, in the memory of one block."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qfx import Format
from qfx.analysis import gradients
from qfx.analysis.caches import CacheScores, caches
from qfx.analysis.gradients import Gathered, gather
from qfx.analysis.losses import General
from qfx.analysis.measured import main_output, output_nodes
from qfx.analysis.units import units
from qfx.analysis.weights import Weights
from qfx.rounding.blocks import Cut, cuts
from qfx.rounding.lanes import Program
from tests.qfx.analysis.models import of_zoo, prepared


def at_once(program: Program) -> list[Cut]:
    """A program as one block."""
    return [Cut("all", 0, len(program.nodes))]


def gathered(model: tuple[Any, Any, Any]) -> tuple[Gathered, dict[str, float]]:
    gm, flat, found = model
    name, main = main_output(gm, found.outputs)
    every, attentions, _ = units(gm)
    of_caches = CacheScores(caches(attentions), [Format.parse("i4/tok")])
    general = General(0, name == "logits", [None] * len(flat))
    made = gather(
        Weights(gm, every), Program(gm), flat, [main], general, first_order=True, values=of_caches.hooks
    )  # fmt: skip
    return made, {f"{name} {text}": value for name, row in of_caches.sums.items() for text, value in row.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_blocks_give_the_gradients_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's output, which every layer of a decoder reads, is summed in another order; all else bit by bit."""
    model = prepared() if name == "llama" else of_zoo(name)
    assert len(cuts(Program(model[0]))) > 2
    made, of_caches = gathered(model)
    monkeypatch.setattr(gradients, "cuts", at_once)
    whole, of_caches_whole = gathered(model)
    assert made.weight == whole.weight and made.samples == whole.samples and made.rows == whole.rows
    for own, wanted in ((made.fisher, whole.fisher), (made.gradient, whole.gradient), (made.energy, whole.energy)):
        assert own.keys() == wanted.keys() and own
        for fqn, value in wanted.items():
            torch.testing.assert_close(
                own[fqn], value, rtol=1e-3 if name == "t5" else 0, atol=1e-7 if name == "t5" else 0
            )
    assert made.taylor == pytest.approx(whole.taylor, rel=1e-4 if name == "t5" else 0)
    assert of_caches == pytest.approx(of_caches_whole, rel=1e-4 if name == "t5" else 0)
    assert all(value.abs().sum() > 0 for value in made.fisher.values())


def test_outputs_of_early_blocks_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that stands for long is carried by the blocks between, and its gradient with it."""
    gm, flat, _ = prepared()
    program, every = Program(gm), units(gm)[0]
    early = next(node for node in program.nodes if "up_proj" in str(node.meta.get("qfx_module")))
    (late, *_) = [node for node in output_nodes(gm) if isinstance(node, fx.Node)]

    class Both:
        factor = 0.5

        def __call__(self, outputs: Any, number: int, samples: int) -> tuple[Tensor, float]:
            return outputs[0].square().sum() + outputs[1].float().square().sum(), samples

    made = gather(Weights(gm, every), program, flat, [early, late], Both())
    alone = gather(Weights(gm, every), program, flat, [late, late], Both())
    monkeypatch.setattr(gradients, "cuts", at_once)
    whole = gather(Weights(gm, every), Program(gm), flat, [early, late], Both())
    for fqn, value in whole.fisher.items():
        torch.testing.assert_close(made.fisher[fqn], value, rtol=1e-4, atol=1e-9)
    first = next(iter(made.fisher))
    assert not torch.allclose(made.fisher[first], alone.fisher[first])  # negative control


@dataclass(eq=False)
class Saved:
    """A value that autograd keeps."""

    value: Tensor


@pytest.mark.parametrize("blocks", [True, False])
def test_what_is_inside_of_a_layer_is_let_go(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the loss is found the values of the first layers are gone, but for those between; of one block they stay."""
    gm, flat, found = of_zoo("gpt2")
    _, main = main_output(gm, found.outputs)
    program, general = Program(gm), General(0, is_logits=True, masks=[None] * len(flat))
    every = cuts(program)
    if not blocks:
        monkeypatch.setattr(gradients, "cuts", at_once)
    made: list[tuple[int, weakref.ref[Saved]]] = []
    step, now = program.step, [0]

    def placed(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        now[0] = program.position[node]
        return step(node, *args, **kwargs)

    def pack(value: Tensor) -> Saved:
        held = Saved(value.detach())  # a result that a call keeps would hold itself
        made.append((now[0], weakref.ref(held)))
        return held

    class Looking:
        factor = 0.5
        alive = 0

        def __call__(self, outputs: Any, number: int, samples: int) -> tuple[Tensor, float]:
            self.alive = sum(at < every[-2].start and held() is not None for at, held in made)
            return general(outputs, number, samples)

    monkeypatch.setattr(program, "step", placed)
    looking = Looking()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.value):
        gather(Weights(gm, units(gm)[0]), program, flat[:1], [main], looking)
    assert looking.alive == 0 if blocks else looking.alive > 5
