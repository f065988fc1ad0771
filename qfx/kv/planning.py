"""From rules to the caches of a plan, and whether a plan's caches are those of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qfx.errors import Note, explain, nearest
from qfx.kv.asked import is_cache
from qfx.kv.plans import Cached, CacheLayer, Caches, asked_format, read
from qfx.kv.sites import cache_layers
from qfx.recipe import Recipe, matches


def plan_caches(model: nn.Module, recipe: Recipe, calls: Sequence[Any] = ()) -> tuple[Caches, list[Note]]:
    """What a recipe's rules give the layers of a model's cache, and notes about rules that cannot be had. Layers that
    no rule names stay in the dtype of the model; without any that is named there is nothing.

    Raises ValueError for lists of formats that are not of the model's heads, or of heads that change places.
    """
    _check_order(recipe)
    if not recipe.cache_rules:
        return {}, []
    layers, missing = cache_layers(model, calls)
    if missing is not None:
        return {}, [missing]
    found: Caches = {}
    some = False
    for layer in layers:
        asked = recipe.cache_for(layer.fqn)
        fmt = asked_format(asked, dtype_of(model))
        fmt.check_heads(layer.heads, layer.fqn)
        found[layer.fqn] = Cached(layer, fmt).to_json()
        some = some or bool(asked)
    return found if some else {}, _unmatched(recipe, layers)


def check_model(model: nn.Module, caches: Mapping[str, Any]) -> None:
    """Raises ValueError where a model has no module of a name that caches are planned for, or, as far as its
    configuration says, fewer layers. How many heads its keys have is seen when the first ones come."""
    names = {name for name, _ in model.named_modules()}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    count = getattr(text, "num_hidden_layers", None)
    for one in read(caches):
        if one.layer.fqn not in names:
            step = "plan again for this model"
            what = f"the plan has a cache for {one.layer.fqn!r}, which {type(model).__name__} lacks"
            raise ValueError(explain(what, expected=nearest(one.layer.fqn, names), next_step=step))
        if isinstance(count, int) and one.layer.index >= count:
            what = f"the plan has a cache for layer {one.layer.index}"
            raise ValueError(explain(what, expected=f"{count} layers, as the model has"))


def _check_order(recipe: Recipe) -> None:
    """Raises ValueError for formats by heads beside what gives heads another order."""
    planned = recipe.allocation is not None and recipe.allocation.units == "heads"
    if not planned and "permute-heads" not in recipe.rewrites:
        return
    for rule in recipe.rules:
        if any(isinstance(text, tuple) for role, text in rule.texts.items() if role in "qkvp"):
            what = f"the rule for {rule.target!r} lists formats by heads, and the recipe gives heads another order"
            step = "leave out 'permute-heads', plan units='layers', or take cache_bits, which sees the final order"
            step = step if is_cache(rule.target) else step.rpartition(",")[0].replace(", ", " or ")
            raise ValueError(explain(what, next_step=step))


def _unmatched(recipe: Recipe, layers: Sequence[CacheLayer]) -> list[Note]:
    """Rules whose names are those of no attention."""
    targets = dict.fromkeys(t for t in (*(r.target for r in recipe.cache_rules), *recipe.ignore) if is_cache(t))
    missing = [t for t in targets if not any(matches(t, "cache", layer.fqn) for layer in layers)]
    step = f"the caches are those of {layers[0].fqn}, ..., {layers[-1].fqn}"
    return [Note(repr(target), "this target of the recipe matches no cache of the model", step) for target in missing]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floats, as its first parameter has it."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
