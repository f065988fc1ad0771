"""qfx.combine: what goes together, and why the rest does not."""

from __future__ import annotations

import itertools

import pytest

from qfx import Format, Recipe, Rule, combine
from qfx.combine import APART, IMPLIED, NEEDS, ORDER, ROTATIONS, Need, check, in_order
from qfx.passes.rewrites import MODULES
from qfx.recipe import REWRITES

RULES = (Rule(target="linear", x="i4/tok", w="i4/ch"),)


def test_the_table_speaks_of_every_rewrite() -> None:
    assert sorted(ORDER) == sorted(REWRITES)
    assert set(ROTATIONS) <= set(ORDER) <= set(MODULES)
    assert all(pair <= set(ORDER) and len(pair) == 2 for pair in APART)
    for name, needed in IMPLIED.items():
        assert all(ORDER.index(one) < ORDER.index(name) for one in needed)


def test_order() -> None:
    assert in_order(["smooth", "rotate", "untie", "norm-fold"]) == ["untie", "norm-fold", "rotate", "smooth"]
    assert in_order([]) == []


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
    with pytest.raises(ValueError, match="'v-o' and 'rotate' cannot be combined") as caught:
        Recipe.parse("w4a8-rotate").override(rewrites=("rotate", "v-o"))
    assert "next step: leave 'v-o' or 'rotate' out" in str(caught.value)


def test_rounding_and_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that takes only formats with zero points."""
    monkeypatch.setitem(NEEDS, "odd", Need(lambda fmt: fmt.has_zero, "it finds zero points"))
    weights = [("*.mlp", Format.parse("f16")), ("linear", Format.parse("u4/g32"))]
    check((), "odd", weights)
    check((), "rtn", [("linear", Format.parse("i4/ch"))])
    with pytest.raises(ValueError, match=r"rounding 'odd' cannot be combined with w='i4/ch' \(rule for 'linear'\): it"):
        check((), "odd", [*weights, ("linear", Format.parse("i4/ch"))])


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
    assert combine.ORDER.index("rotate") < combine.ORDER.index("smooth")
