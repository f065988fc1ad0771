"""A budget that is given beside a recipe, written into it."""

from __future__ import annotations

from typing import Any

from qfx.errors import explain
from qfx.recipe import Recipe
from qfx.rounding.method_options import BUDGETS


def with_budget(
    recipe: Recipe, *, units: str | None = None, batch: int | None = None, context: int | None = None,
    **budgets: float | None,
) -> Recipe:  # fmt: skip
    """The recipe with this budget in place of its own, and units cut so; as it is where nothing is given.

    A recipe without allocation gets one. batch, context: for max_memory. Raises ValueError for two budgets, units
    without a budget, a batch or a context without max_memory, and an allocation that has no budget.
    """
    given: dict[str, Any] = {name: value for name, value in budgets.items() if value is not None}
    if unknown := set(given) - set(BUDGETS):
        raise ValueError(f"a budget is one of {', '.join(BUDGETS)}, found {unknown.pop()!r}")
    own = recipe.allocation
    if (batch is not None or context is not None) and "max_memory" not in given:
        raise ValueError("batch and context are for the budget max_memory: give it, such as max_memory=8_000_000_000")
    if own is None and not given:
        if units is not None:
            raise ValueError(f"units={units!r} says how a budget is spent: give one, such as avg_bits=4")
        return recipe
    load = {name: value for name, value in (("batch", batch), ("context", context)) if value is not None}
    made = recipe.override(allocation=given | load | ({} if units is None else {"units": units}))
    if made.allocation is None or not made.allocation.budgets:
        raise ValueError(
            explain(
                f"recipe {recipe.name!r} needs a budget",
                expected="one of avg_bits=4, max_bytes=10_000_000, ratio=0.25 (of 16 bits), max_loss=1 (%), max_memory",
                next_step="give it beside the recipe, or in its field allocation",
            )
        )
    return made
