from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx import Format, Recipe, graph
from qfx.allocation import predict
from qfx.analysis.energies import energies
from qfx.analysis.units import units, wholes
from qfx.analysis.weights import Weights
from qfx.calibration.importance import Importance
from qfx.passes.annotate import annotate
from qfx.rounding.parts import round_in_parts
from tests.qfx.analysis.models import Batch, captured, causal, ids

HEADS = Recipe.parse("heads")
UP, OUT = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"
U3 = Format.parse("u3/g16/f16")


def annotated(model: nn.Module, batches: list[Batch], recipe: Recipe = HEADS) -> tuple[fx.GraphModule, list[list[Any]]]:
    gm, flat, _ = captured(model, batches)
    annotate(gm, recipe)
    return gm, flat


def read_by(model: nn.Module, name: str, batches: list[Batch]) -> list[Tensor]:
    """What a linear of the model reads, [B, T, K] for each batch."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return found


def test_mean_squares_of_what_each_linear_reads() -> None:
    model, batches = causal()
    found = energies(*annotated(model, batches), HEADS)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found) <= linears and len(linears - set(found)) <= 1  # a tied head is stored with its table
    for name in (UP, OUT):
        wanted = torch.cat([x.flatten(0, 1) for x in read_by(model, name, batches)]).square().mean(0)
        torch.testing.assert_close(found[name].moments, wanted, rtol=1e-4, atol=1e-7)


def test_padding_does_not_count() -> None:
    model, _ = causal()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    batches: list[Batch] = [{"input_ids": ids(), "attention_mask": mask, "use_cache": False}]
    (x,) = read_by(model, UP, batches)
    found = energies(*annotated(model, batches), HEADS)[UP].moments
    torch.testing.assert_close(found, x[mask.bool()].square().mean(0), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, x.flatten(0, 1).square().mean(0), rtol=1e-2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.tanh(self.linear(x)))
        return y


def test_a_linear_that_is_called_twice_has_the_mean_of_both() -> None:
    model, batch = Twice().eval(), {"x": torch.randn(5, 32, generator=torch.Generator().manual_seed(0))}
    found = energies(*annotated(model, [batch]), HEADS)
    wanted = torch.cat(read_by(model, "linear", [batch])).square().mean(0)
    torch.testing.assert_close(found["linear"].moments, wanted)


@pytest.mark.parametrize(
    ("fields", "some"),
    [
        ({"rounding": "gptq"}, True),
        ({"rounding": "learned"}, True),
        ({"rounding": "mse", "weighting": "energy"}, True),
        ({"rounding": "mse", "weighting": "covariance"}, True),
        ({"rounding": "mse"}, False),
        ({"rounding": "rtn"}, False),
        ({"rounding": "hqq"}, False),
    ],
)
def test_only_for_recipes_that_round_by_data(fields: dict[str, str], some: bool) -> None:
    recipe = Recipe.parse({"rules": [{"target": "linear", "w": "u4/g16/f16"}], **fields})
    model, batches = causal(batches=1)
    assert bool(energies(*annotated(model, batches, recipe), recipe)) is some


def test_no_recipe_and_no_formats_no_energies() -> None:
    gm, flat, _ = captured(*causal(batches=1))
    assert energies(gm, flat, None) == {} == energies(gm, flat, HEADS)


def test_units_are_rounded_by_the_energies_of_their_own_channels() -> None:
    model, batches = causal()
    gm, flat = annotated(model, batches)
    every = units(gm)[0]
    found = energies(gm, flat, HEADS)
    weights, plain = Weights(gm, every, seen=found), Weights(gm, every)
    value = model.get_parameter(f"{OUT}.weight").detach()
    one = next(unit for unit in every if unit.name == f"{OUT}.o1")
    energy = found[OUT].moments
    cut = slice(one.start, one.stop)
    wanted = round_in_parts(value[:, cut].contiguous(), U3, "mse", name=OUT, importance=Importance(energy[cut]))
    assert torch.equal(weights.part(one, U3)[1], wanted.dequantize())
    assert not torch.equal(weights.part(one, U3)[1], plain.part(one, U3)[1])
    own = [unit for unit in every if unit.fqn == OUT]
    for each, (_, back) in zip(own, weights.parts(own, U3), strict=True):
        assert torch.equal(back, weights.part(each, U3)[1])
    whole = next(unit for unit in wholes(every) if unit.fqn == OUT)
    wanted = round_in_parts(value, U3, "mse", name=OUT, importance=found[OUT])
    assert torch.equal(weights.part(whole, U3)[1], wanted.dequantize())
    placed = weights.place({unit.name: U3 for unit in own})
    (node,) = [node for node in placed if graph.fqn_of(node) == OUT]
    parts = torch.cat([weights.part(unit, U3)[1] for unit in own], 1)
    assert torch.equal(placed[node], parts)


def test_other_ways_to_round_do_not_weigh() -> None:
    model, batches = causal()
    gm, flat = annotated(model, batches)
    every, found = units(gm)[0], energies(gm, flat, HEADS)
    for rounding in ("rtn", "hqq"):
        with_, without = Weights(gm, every, rounding=rounding, seen=found), Weights(gm, every, rounding=rounding)
        assert torch.equal(with_.part(every[0], U3)[1], without.part(every[0], U3)[1])


def test_channels_that_carry_most_are_rounded_for() -> None:
    model, batches = causal()
    gamma = model.get_parameter("model.layers.0.post_attention_layernorm.weight")
    weight = model.get_parameter(f"{UP}.weight").detach()
    with torch.no_grad():
        gamma.mul_(torch.logspace(-1, 1, len(gamma)).roll(5))
    gm, flat = annotated(model, batches)
    every, found = units(gm)[0], energies(gm, flat, HEADS)
    unit = next(unit for unit in every if unit.fqn == UP)
    x = torch.cat([x.flatten(0, 1) for x in read_by(model, UP, batches)])
    losses = []
    for weights in (Weights(gm, every, seen=found), Weights(gm, every)):
        _, back = weights.part(unit, U3)
        losses.append(float((x @ (back - weight).T).square().mean()))
        told = predict.errors(weights, unit, [U3])[U3]
        error = (back - weight).double().square()
        assert told == pytest.approx(
            float((error * found[UP].moments).mean() if weights.seen else error.mean()), rel=1e-4
        )
    assert losses[0] < 0.9 * losses[1], losses
