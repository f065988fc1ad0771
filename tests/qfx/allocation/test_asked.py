from __future__ import annotations

import pytest

from qfx import Recipe
from qfx.allocation.asked import with_budget
from qfx.rounding.method_options import CANDIDATES, AllocationOptions

PLAIN = Recipe.parse("w4a16")


def test_nothing_given_changes_nothing() -> None:
    assert with_budget(PLAIN, avg_bits=None, max_bytes=None) is PLAIN


def test_a_recipe_gets_an_allocation() -> None:
    found = with_budget(PLAIN, units="layers", ratio=0.25, avg_bits=None).allocation
    assert found == AllocationOptions(ratio=0.25, units="layers")
    assert found.formats == CANDIDATES
    assert PLAIN.allocation is None


def test_a_budget_replaces_that_of_the_recipe_and_keeps_the_rest() -> None:
    own = PLAIN.override(allocation=AllocationOptions(avg_bits=3, refine=7, units="layers"))
    assert with_budget(own, max_bytes=10).allocation == AllocationOptions(max_bytes=10, refine=7, units="layers")
    assert with_budget(own).allocation == own.allocation
    assert with_budget(own, units="heads").allocation == AllocationOptions(avg_bits=3, refine=7)


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (PLAIN, {"avg_bits": 3, "max_loss": 1}, "one budget is needed, found avg_bits=3.0 and max_loss=1.0"),
        (PLAIN, {"units": "heads"}, "units='heads' says how a budget is spent: give one"),
        (Recipe.parse("heads"), {}, r"recipe 'heads' needs a budget[\s\S]*avg_bits=4, max_bytes="),
        (PLAIN, {"avg_bits": 0}, "avg_bits: .* greater than 0"),
        (PLAIN, {"avg_bits": float("nan")}, "avg_bits"),
        (PLAIN, {"units": "rows", "avg_bits": 3}, "units: .*'heads' or 'layers'"),
        (PLAIN, {"bits": 3}, "a budget is one of avg_bits, max_bytes, ratio, max_loss, max_memory, found 'bits'"),
    ],
)
def test_bad_budgets_are_refused(recipe: Recipe, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_budget(recipe, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"formats": ()}, "formats must hold at least one format"),
        ({"formats": ("u3/g33x",)}, "bad format"),
        ({"formats": ("i8/tok",)}, "'i8/tok' is no format of a weight"),
        ({"method": "fisher"}, "quant-fisher"),
        ({"bits": 3}, "unknown key 'bits' in AllocationOptions, did you mean 'ties'|unknown key 'bits'"),
        ({"refine": -1}, "refine"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocationOptions(**fields)  # type: ignore[arg-type]


def test_an_allocation_is_part_of_a_recipe_as_text() -> None:
    own = with_budget(Recipe.parse("heads"), avg_bits=3.5)
    assert own.needs_data
    assert Recipe.parse(own.to_dict()) == own
    assert own.to_dict()["allocation"]["avg_bits"] == 3.5


def test_outliers_and_an_allocation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"allocation and outliers both change formats"):
        Recipe.parse("int8-outliers").override(allocation=AllocationOptions(avg_bits=4))
