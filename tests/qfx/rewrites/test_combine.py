"""qfx.rewrites.combine: what goes together, and why the rest does not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx import Format, Recipe, Rule
from qfx.passes.rewrites import MODULES
from qfx.recipe import REWRITES
from qfx.rewrites.combine import APART, IMPLIED, ORDER, ROTATIONS, check, in_order

RULES = (Rule(target="linear", x="i4/tok", w="i4/ch"),)


def test_the_table_speaks_of_every_rewrite() -> None:
    assert sorted(ORDER) == sorted(REWRITES)
    assert set(ROTATIONS) <= set(ORDER) and set(ORDER) - {"awq"} <= set(MODULES)  # awq's factors are those of others
    assert all(pair <= set(ORDER) and len(pair) == 2 for pair in APART)
    for name, needed in IMPLIED.items():
        assert all(ORDER.index(one) < ORDER.index(name) for one in needed)


def test_order() -> None:
    assert in_order(["smooth", "rotate", "untie", "norm-fold"]) == ["untie", "norm-fold", "rotate", "smooth"]
    scales = {"awq", "v-o", "up-down", "smooth"}  # in the basis that the rotations give
    assert min(map(ORDER.index, scales)) > max(map(ORDER.index, ROTATIONS))
    assert in_order(["rotate-qk", "smooth-k"]) == ["smooth-k", "rotate-qk"], "the rotation mixes the channels"
    assert in_order([]) == []
    check(ORDER[:3])


@pytest.mark.parametrize("pair", list(itertools.combinations(ORDER, 2)))
def test_every_pair_is_taken_or_refused_with_its_reason(pair: tuple[str, str]) -> None:
    reason = APART.get(frozenset(pair))
    if reason is None:
        assert Recipe(name="r", rules=RULES, rewrites=pair).rewrites == pair
        return
    first, second = in_order(pair)
    with pytest.raises(ValueError, match=f"the rewrites '{first}' and '{second}' cannot be combined: {reason}"):
        Recipe(name="r", rules=RULES, rewrites=pair[::-1])


def test_presets_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="'rotate-down' and 'up-down' cannot be combined: the up projection") as caught:
        Recipe.parse("w4a8-rotate").override(rewrites=("up-down", "rotate-down"))
    assert "next step: leave 'rotate-down' or 'up-down' out" in str(caught.value)


FORMATS = [
    *(
        "i8",
        "i8/ch",
        "u8/ch",
        "i4/g8",
        "u4/g8/f16",
        "i3/ch",
        "u2/ch",
        "nf4/g8",
        "f8e4m3/ch",
        "f8e4m3/b4x8",
        "f8e5m2/g8",
    ),
    *("f4e2m1/g8/e8m0", "f4e2m1/g16/e4m3", "i5/b4x8", "bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["rtn", "mse", "hqq", "gptq", "learned"])
@pytest.mark.parametrize("w", FORMATS)
def test_every_rounding_takes_every_format(rounding: Any, w: str) -> None:
    """After rotations, too: a model of one gated MLP keeps its function to the precision of the format."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
    x = torch.randn(32, 16)
    wanted = model(x).detach()
    options: dict[str, Any] = {"learned": {"steps": 2}} if rounding == "learned" else {}
    recipe = Recipe(
        name="r", rules=(Rule(target="linear", w=w),), rounding=rounding, rewrites=("rotate-down",), **options
    )
    found = qfx.quantize(model, recipe, [(x,)])(x).detach()
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < {8: 0.1, 16: 0.01}.get(Format.parse(w).bits, 1.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotation_block", 1, "rotation_block"),
        ("rotation_block", "whole", "rotation_block"),
        ("rotation_seed", -1, "rotation_seed"),
        ("rotation_seed", 1.5, "rotation_seed"),
    ],
)
def test_options_of_rotations_are_checked(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(name="r", rules=RULES, **{field: value})  # type: ignore[arg-type]


def test_options_of_rotations_are_written_and_read() -> None:
    recipe = Recipe(name="r", rules=RULES, rewrites=("rotate",), rotation_seed=3, rotation_block=32)
    assert Recipe.parse(recipe.to_dict()) == recipe
    assert not recipe.needs_data
