"""The conditions on sizes that torch notes while it traces: where one does not hold, the graph may be another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch


def sizes_of(environment: Any) -> dict[Any, int]:
    """The example's size for each symbol of a torch ShapeEnv; none of None."""
    return {symbol: int(size) for symbol, size in getattr(environment, "backed_var_to_val", {}).items()}


def is_number(size: Any) -> bool:
    """Whether a size of a graph is fixed; that of a symbol, too, which the trace found to be one."""
    return not isinstance(size, torch.SymInt) or bool(size.node.expr.is_number)


def conditions(environment: Any) -> list[Any]:
    """What a torch ShapeEnv has noted, as sympy expressions of the symbols that are left, each once."""
    return list(dict.fromkeys(_replaced(guard.expr, environment.replacements) for guard in environment.guards))


def hold(found: Sequence[Any], sizes: Mapping[Any, int]) -> bool:
    """Whether all conditions are true for these sizes of their symbols."""
    numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    return all(_true(condition, numbers) for condition in found)


def _replaced(expr: Any, replacements: Mapping[Any, Any]) -> Any:
    for _ in range(len(replacements) + 1):
        new = expr.xreplace(replacements)
        if new == expr:
            break
        expr = new
    return expr


def _true(condition: Any, numbers: Mapping[Any, Any]) -> bool:
    try:
        return bool(condition.xreplace(numbers))
    except (ZeroDivisionError, AssertionError, TypeError):
        return False
