"""The options of `torch.compile(model, backend="qfx", options={...})`, validated key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qfx.errors import explain, nearest
from qfx.plan import Plan
from qfx.recipe import Recipe

BACKENDS = ("auto", "onnx", "reference")
KEYS = ("recipe", "plan", "strict", "backend")
LATER = {"kv": "a quantized KV cache", "cache": "a cache of compiled artefacts on disk"}


@dataclass(frozen=True)
class Options:
    """recipe: what to do with a float model. plan: formats and scales decided before (instead of a recipe).

    strict: raise where a node does not get what was asked. backend: "auto" (ONNX Runtime on CPU), "onnx" or "reference".
    """

    recipe: Recipe
    plan: Plan | None = None
    strict: bool = False
    backend: str = "auto"

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Raises ValueError for an unknown key (the nearest valid one named), a wrong type or a recipe that needs data."""
        given = dict(options or {})
        for key in given:
            if key in LATER and given[key] not in (None, False):
                raise ValueError(
                    explain(f"option {key!r} ({LATER[key]}) is not in this version", next_step=f"leave {key!r} out")
                )
            if key not in KEYS and key not in LATER:
                raise ValueError(
                    explain(f"unknown option {key!r}, {nearest(str(key), KEYS)}", expected=f"one of {', '.join(KEYS)}")
                )
        plan = given.get("plan")
        if plan is not None and "recipe" in given:
            raise ValueError(
                explain("options 'recipe' and 'plan' were both given", next_step="leave 'recipe' out: a plan holds its own")
            )
        if plan is not None and not isinstance(plan, Plan):
            plan = Plan.load(plan)
        recipe = plan.recipe if plan is not None else Recipe.parse(given.get("recipe", "w8a8"))
        if plan is None and recipe.needs_data:
            raise ValueError(
                explain(
                    f"recipe {recipe.name!r} needs calibration data, which torch.compile does not have",
                    next_step="model = qfx.quantize(model, recipe, data=batches), then torch.compile(model, backend='qfx'); "
                    "or options={'plan': qfx.plan(model, recipe, batches)}",
                )
            )
        return cls(recipe, plan, _flag(given), _backend(given))


def _flag(given: Mapping[str, Any]) -> bool:
    strict = given.get("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(explain("option 'strict' takes a bool", expected="True or False", found=repr(strict)))
    return strict


def _backend(given: Mapping[str, Any]) -> str:
    name = given.get("backend", "auto")
    if name not in BACKENDS:
        raise ValueError(
            explain(f"unknown backend {name!r}, {nearest(str(name), BACKENDS)}", expected=f"one of {', '.join(BACKENDS)}")
        )
    return str(name)
