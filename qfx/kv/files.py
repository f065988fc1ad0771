"""What an exported file can have of a plan's caches: 8 or 4 bits for keys and values alike, scales fixed beforehand.

k=i8/tok/f16 v=i8/tok/f16    ->    kv="i8": i8/ch     a scale for each channel of each head, found on data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qfx.errors import Note, listed
from qfx.kv.held import caches_of
from qfx.kv.planning import plan_caches
from qfx.kv.plans import Cached, read
from qfx.plan import Plan
from qfx.recipe import Recipe

_KV = {8: "i8", 4: "i4"}


def asked_caches(model: nn.Module, recipe: Recipe | None, plan: Plan | None) -> dict[str, Any]:
    """The caches of a plan, those that a recipe asks for, or those that the live model has."""
    if plan is not None:
        return plan.caches
    return plan_caches(model, recipe)[0] if recipe is not None and recipe.cache_rules else caches_of(model)


def for_file(caches: Mapping[str, Any], kv: object, *, has_cache: bool, data: bool) -> tuple[str | None, list[Note]]:
    """(`kv` of an export for these caches, what of them the file has not).

    kv: what the caller asks for, which holds. has_cache: the file is a decoder with its cache. data: is there any.
    """
    own = [one for one in read(caches) if not one.is_plain]
    if not own:
        return None, []
    asked = str(own[0].format) if len({one.format for one in own}) == 1 else "formats by heads or layers"
    if kv is not None:
        return None, [_note(own, f"kv={kv!r} is stored in the place of {asked}", "leave kv= out", minor=True)]
    if not has_cache:
        reason = f"the file has no cache that could be stored as {asked}: what runs it keeps keys and values"
        return None, [_note(own, reason, "none needed; a decoder with its cache is written to a folder", minor=True)]
    bits = {fmt.bits if fmt.is_integer else 0 for one in own for fmt in (*one.format.keys, *one.format.values)}
    found = _KV.get(bits.pop()) if len(bits) == 1 else None
    if found is None:
        reason = f"its cache stays in float: a file stores i8 or i4 for keys and values alike, not {asked}"
        return None, [_note(own, reason, "give kv='i8' or kv='i4', with data")]
    if not data:
        reason = f"its cache stays in float: {found} in a file has fixed scales, which take calibration data"
        return None, [_note(own, reason, "give data=batches of token ids")]
    reason = f"its cache is {found}/ch: a file has fixed scales for each channel, not {asked}"
    return found, [_note(own, reason, f"kv={found!r} asks for just that")]


def left_out(model: nn.Module) -> list[Note]:
    """A note for a file of weights alone, which holds no formats of a cache."""
    own = [one for one in read(caches_of(model)) if not one.is_plain]
    reason = "the formats of its cache are not written: the file holds weights, and what runs it makes the cache"
    step = "qfx.save keeps them; else ask for a quantized cache where the file is run"
    return [_note(own, reason, step, minor=True)] if own else []


def _note(own: list[Cached], reason: str, step: str, *, minor: bool = False) -> Note:
    return Note(listed([one.layer.fqn for one in own], 1), reason, step, minor=minor)
