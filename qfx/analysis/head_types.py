"""What attention heads do: where their probabilities lie, what type that makes them, and which bits tables give a type.

    positional   one offset has most of the attention, or explains it (Voita et al. 2019)
    semantic     the tokens decide: heads of induction and of duplicate tokens (Olsson et al. 2022), or no offset does
    mixed        anything between
    cross        the keys are another sequence's

No source shows that the type of a head tells the bits that it needs. The tables are priors; measured loss decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qfx.analysis.units import Unit
from qfx.errors import nearest

TYPES = ("positional", "semantic", "mixed", "cross")
PRIORS: dict[str, dict[str, int]] = {  # task -> type -> bits
    "qa": {"semantic": 8, "positional": 4, "mixed": 6, "cross": 8},
    "translation": {"semantic": 4, "positional": 8, "mixed": 6, "cross": 8},
    "classification": dict.fromkeys(TYPES, 8),
}
_ONE_OFFSET, _EXPLAINED, _UNEXPLAINED, _SAME_TOKENS = 0.9, 0.8, 0.2, 0.3


@dataclass(frozen=True)
class Head:
    """One query head. All but offset are shares from 0 to 1; None: not to be had from this model or data.

    sink: attention on the first token. largest: queries whose greatest attention is at `offset` (key less query).
    explained: variance of the attention, without the first token's, that the offset explains. previous: attention on
    the token before. induction, duplicate: on repeated random tokens, attention on the token after, and on, the former
    copy. outliers: scores before the softmax above mean + 4 standard deviations of the layer's.
    """

    attention: str
    layer: str
    head: int
    kv_head: int
    type: str
    sink: float | None = None
    largest: float | None = None
    offset: int | None = None
    explained: float | None = None
    previous: float | None = None
    induction: float | None = None
    duplicate: float | None = None
    outliers: float | None = None


def prior(heads: Iterable[Head], task: str) -> dict[tuple[str, int], int]:
    """(attention, query head) -> bits that the table of a task gives its type. Raises ValueError for other tasks."""
    if task not in PRIORS:
        raise ValueError(f"there is no table of bits for the task {task!r}, {nearest(task, PRIORS)}")
    return {(head.attention, head.head): PRIORS[task][head.type] for head in heads}


def prior_of_units(heads: Iterable[Head], units: Iterable[Unit], task: str) -> dict[str, int]:
    """Unit -> bits that the table of a task gives its head; for keys and values the most of the heads that read them.

    Units that are no head's are missing. Raises ValueError for other tasks.
    """
    heads = list(heads)
    bits = prior(heads, task)
    found: dict[str, int] = {}
    for unit in units:
        role = "kv_head" if unit.kind in ("k", "v", "cache_k", "cache_v") else "head"
        own = [
            bits[head.attention, head.head]
            for head in heads
            if unit.head is not None and head.attention == unit.attention and getattr(head, role) == unit.head
        ]
        if own:
            found[unit.name] = max(own)
    return found


def type_of(facts: Mapping[str, Any], *, cross: bool = False) -> str:
    """The type that the shares of a head make, see the module."""
    if cross:
        return "cross"
    explained = facts.get("explained", math.nan)
    if explained >= _EXPLAINED or facts.get("largest", 0.0) >= _ONE_OFFSET:
        return "positional"
    same = facts.get("induction", 0.0) + facts.get("duplicate", 0.0)
    return "semantic" if same > _SAME_TOKENS or explained <= _UNEXPLAINED else "mixed"
