"""Baselines of allocation: they fit the budget and use it, and what they store is counted as it is stored."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from examples.benchmarks import allocation_baselines as baselines
from qfx.analysis.units import Unit
from qfx.annotation import Columns, Outliers
from qfx.format import Format

HIDDEN, HEAD, HEADS, WIDE, LAYERS = 128, 32, 4, 256, 6


def units_of_a_llama() -> list[Unit]:
    found = [Unit("model.embed_tokens", "model.embed_tokens", "embedding", "", (512, HIDDEN))]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for kind in "qkvo":
            fqn, axis = f"{layer}.self_attn.{kind}_proj", int(kind == "o")
            shape = (HIDDEN, HEAD) if axis else (HEAD, HIDDEN)
            found += [
                Unit(f"{fqn}.{kind}{h}", fqn, kind, layer, shape, axis, h * HEAD, (h + 1) * HEAD, h, f"{layer}.attn")
                for h in range(HEADS)
            ]
        for name, shape in (("gate", (WIDE, HIDDEN)), ("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE))):
            fqn = f"{layer}.mlp.{name}_proj"
            found.append(Unit(fqn, fqn, "linear", layer, shape))
    return found


WEIGHTS = baselines.Weights(units_of_a_llama())
FORMATS = [baselines.affine(bits, 32) for bits in (2, 3, 4)]


def budget(bits: float) -> int:
    return int(bits * WEIGHTS.elements / 8)


def some_mix(seed: int = 0) -> baselines.Assignment:
    generator = random.Random(seed)
    return {name: generator.choice(FORMATS) for name in WEIGHTS.units}


def test_weights_are_put_together_again() -> None:
    assert WEIGHTS.shape("model.layers.0.self_attn.q_proj") == (HIDDEN, HIDDEN)
    assert WEIGHTS.shape("model.layers.0.self_attn.o_proj") == (HIDDEN, HIDDEN)
    assert WEIGHTS.shape("model.layers.0.mlp.down_proj") == (HIDDEN, WIDE)
    assert WEIGHTS.layers == LAYERS
    assert WEIGHTS.elements == 512 * HIDDEN + LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)


def test_bytes_are_those_of_the_parts() -> None:
    """Zero points of neighbouring columns share bytes; without any, and of rows, every part is stored by itself."""
    generator = random.Random(0)
    plain = {name: Format.parse(generator.choice(["i2/g32", "i3/g32", "i8/g32"])) for name in WEIGHTS.units}
    parts = {name: unit.nbytes(plain[name]) for name, unit in WEIGHTS.units.items()}
    assert WEIGHTS.nbytes(plain) == sum(parts.values())
    mix = some_mix()
    apart = sum(unit.nbytes(mix[name]) for name, unit in WEIGHTS.units.items())
    assert 0.99 * apart < WEIGHTS.nbytes(mix) < apart


def test_a_group_over_two_heads_of_an_output_projection_is_stored_once() -> None:
    """64 columns in groups of 64: two heads of 32 share their scales where both are so, and each alone is padded."""
    o = "model.layers.0.self_attn.o_proj"
    wide, other = Format.parse("u4/g64/f16"), Format.parse("u4/g32/f16")
    together = WEIGHTS.stored(o, Columns((wide, wide, other, other)))
    apart = WEIGHTS.stored(o, Columns((wide, other, wide, other)))
    assert together == wide.nbytes((HIDDEN, 64)) + other.nbytes((HIDDEN, 64))
    assert apart == 2 * wide.nbytes((HIDDEN, 32)) + other.nbytes((HIDDEN, 64)) > together


def test_one_format_for_all_heads_is_one_format() -> None:
    formats = WEIGHTS.formats(WEIGHTS.whole(lambda _: FORMATS[0]))
    assert set(formats.values()) == {FORMATS[0]}
    mixed = WEIGHTS.formats({**WEIGHTS.whole(lambda _: FORMATS[0]), "model.layers.0.self_attn.o_proj.o1": FORMATS[1]})
    low, high = FORMATS[:2]
    assert mixed["model.layers.0.self_attn.o_proj"] == Columns((low, high, low, low))


@pytest.mark.parametrize("bits", [2.5, 3, 4, 5, 6])
@pytest.mark.parametrize("family", [baselines.uniform_filled, baselines.by_type, baselines.k_mix])
def test_candidates_fit_and_use_the_budget(family: object, bits: float) -> None:
    wanted = budget(bits)
    found = family(WEIGHTS, wanted)  # type: ignore[operator]
    assert 0 < len(found) <= baselines.MOST
    for assignment in found:
        assert set(assignment) == set(WEIGHTS.units)
        assert WEIGHTS.nbytes(assignment) <= wanted
    assert max(map(WEIGHTS.nbytes, found)) >= 0.985 * wanted


def test_uniform_is_one_format() -> None:
    found = baselines.uniform(WEIGHTS, budget(4))
    assert found and all(len(set(assignment.values())) == 1 for assignment in found)
    assert max(WEIGHTS.nbytes(a) for a in found) <= budget(4)
    assert baselines.uniform(WEIGHTS, budget(1)) == []


def test_a_recipe_by_type_gives_attention_no_less() -> None:
    for assignment in baselines.by_type(WEIGHTS, budget(3)):
        bits: dict[str, set[int]] = {"self_attn": set(), "mlp": set()}
        for name, fmt in assignment.items():
            if name != "model.embed_tokens":
                bits["mlp" if ".mlp." in name else "self_attn"].add(fmt.bits)
        assert max(bits["self_attn"]) >= min(bits["mlp"])
        assert all(max(b) - min(b) <= 1 for b in bits.values()), "filling up gives one bit more"


def test_the_k_mix_lifts_what_llama_cpp_lifts() -> None:
    """Before it is filled up: a budget which a mix of 4 and 6 bits meets to the byte leaves nothing to fill."""
    low, high = baselines.affine(4, 32), baselines.affine(6, 32)

    def choose(fqn: str) -> Format:
        better = any(f"layers.{i}." in fqn for i in (2, 5)) and fqn.endswith(("v_proj", "down_proj"))
        return high if better or "layers" not in fqn else low

    exact = WEIGHTS.whole(choose)
    assert exact in baselines.k_mix(WEIGHTS, WEIGHTS.nbytes(exact))


def test_filling_up_leaves_little_and_takes_nothing() -> None:
    low = WEIGHTS.whole(lambda _: baselines.affine(3, 64))
    size = WEIGHTS.nbytes(low)
    assert WEIGHTS.filled(low, size) == low
    filled = WEIGHTS.filled(low, int(1.1 * size))
    assert 1.09 * size <= WEIGHTS.nbytes(filled) <= 1.1 * size
    assert all(filled[name].bits >= 3 for name in filled)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_and_inverted_mixes_have_the_bytes_of_the_plan(seed: int) -> None:
    mix = some_mix(seed)
    other, again = (baselines.shuffled(WEIGHTS, mix, 5) for _ in range(2))
    losses = {name: float(number % 7) for number, name in enumerate(WEIGHTS.units)}
    inverted = baselines.inverted(WEIGHTS, mix, losses)
    assert other == again != mix
    assert WEIGHTS.nbytes(other) == WEIGHTS.nbytes(inverted) == WEIGHTS.nbytes(mix)
    assert baselines.inverted(WEIGHTS, mix, {name: -loss for name, loss in losses.items()}) != inverted


def test_inverting_gives_least_to_who_loses_most() -> None:
    names = [f"model.layers.0.self_attn.q_proj.q{h}" for h in range(3)]
    mix = WEIGHTS.whole(lambda _: FORMATS[1]) | dict(zip(names, FORMATS, strict=True))
    losses = dict.fromkeys(WEIGHTS.units, 1.0) | {names[0]: 0.1, names[2]: 10.0}
    inverted = baselines.inverted(WEIGHTS, mix, losses)
    sizes = [WEIGHTS.units[name].nbytes(inverted[name]) for name in names]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2]
    assert {inverted[names[0]], inverted[names[2]]} == {FORMATS[0], FORMATS[2]}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)


def test_the_most_driven_columns_are_kept_while_bytes_last() -> None:
    torch.manual_seed(0)
    model = Layer()
    shapes = {"up": (96, 64), "down": (64, 96)}
    weights = baselines.Weights([Unit(name, name, "linear", "", shape) for name, shape in shapes.items()])
    energy = {"up": torch.ones(64), "down": torch.ones(96)}
    energy["up"][[7, 30]] = 1e4
    base = baselines.affine(4, 32)
    plain = weights.nbytes(weights.whole(lambda _: base))
    found = baselines.outlier_columns(weights, plain + 500, base, model, energy)
    assert found is not None and found["down"] == base
    up = found["up"]
    assert isinstance(up, Outliers) and set(up.columns) == {7, 30} and up.rest == base
    assert sum(weights.stored(name, formats) for name, formats in found.items()) <= plain + 500
    assert baselines.outlier_columns(weights, plain - 1, base, model, energy) is None
