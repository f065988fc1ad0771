"""A budget that is given beside a recipe, written into it."""

from __future__ import annotations

from typing import Any

from qfx.errors import explain
from qfx.method_options import BUDGETS, AllocationOptions
from qfx.recipe import Recipe


def with_budget(recipe: Recipe, *, units: str | None = None, **budgets: float | None) -> Recipe:
    """The recipe with this budget in place of its own, and units cut so; as it is where nothing is given.

    A recipe without allocation gets one. Raises ValueError for two budgets, units without a budget, and an allocation
    that has none.
    """
    given: dict[str, Any] = {name: value for name, value in budgets.items() if value is not None}
    if unknown := set(given) - set(BUDGETS):
        raise ValueError(f"a budget is one of {', '.join(BUDGETS)}, found {unknown.pop()!r}")
    own = recipe.allocation
    if own is None and not given:
        if units is not None:
            raise ValueError(f"units={units!r} says how a budget is spent: give one, such as avg_bits=4")
        return recipe
    fields = {} if own is None else {name: getattr(own, name) for name in AllocationOptions.model_fields}
    if given:
        fields = {name: value for name, value in fields.items() if name not in BUDGETS} | given
    made = AllocationOptions(**(fields if units is None else fields | {"units": units}))
    if not made.budgets:
        raise ValueError(
            explain(
                f"recipe {recipe.name!r} needs a budget",
                expected="one of avg_bits=4, max_bytes=10_000_000, ratio=0.25 (of 16 bits), max_loss=1 (%)",
                next_step="give it beside the recipe, or in its field allocation",
            )
        )
    return recipe.override(allocation=made)
