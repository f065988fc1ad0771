"""The options of `torch.compile(model, backend="qfx", options={...})`, validated key by key."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfx.errors import explain, nearest
from qfx.plan import Plan
from qfx.recipe import Recipe

BACKENDS = ("auto", "onnx", "openvino", "reference")
KEYS = ("recipe", "plan", "strict", "backend", "cache")
LATER = {"kv": "a quantized KV cache"}
CACHE_KEYS = ("folder", "max_bytes")


@dataclass(frozen=True)
class CacheAt:
    """folder: None is the default one. max_bytes: None is the default."""

    folder: Path | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Options:
    """recipe: what to do with a float model. plan: formats and scales decided before (instead of a recipe).

    strict: raise where a node does not get what was asked. backend: "auto" (ONNX Runtime on CPU), "onnx",
    "openvino" (where it is installed), "reference".
    default: neither recipe nor plan was given, so that a model quantized before runs as it is. cache: where sessions
    are kept for the next process; True is the default place, False is nowhere.
    """

    recipe: Recipe
    plan: Plan | None = None
    strict: bool = False
    backend: str = "auto"
    default: bool = True
    cache: CacheAt | bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Read `options=` of torch.compile. A key whose value is None counts as left out.

        Raises ValueError for an unknown key (with the nearest valid one), a wrong type, both a recipe and a plan, and a
        recipe that needs data; FileNotFoundError for a plan that is not there.
        """
        given = _checked(options)
        plan = _plan(given.get("plan"))
        if plan is not None and "recipe" in given:
            raise ValueError(
                explain(
                    "options 'recipe' and 'plan' were both given", next_step="leave 'recipe' out: a plan has its own"
                )
            )
        recipe = plan.recipe if plan is not None else _recipe(given.get("recipe", "w8a8"))
        default = plan is None and "recipe" not in given
        strict, backend = _flag(given.get("strict", False)), _backend(given.get("backend", "auto"))
        return cls(recipe, plan, strict, backend, default, _cache(given.get("cache", True)))


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that were given, their keys known."""
    if not isinstance(options, Mapping | None):
        raise ValueError(
            explain("options is a dictionary", expected=f"keys {', '.join(KEYS)}", found=f"{options!r}",
                    next_step='for example options={"recipe": "w4a16"}')
        )  # fmt: skip
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key, value in given.items():
        if key in LATER and value is not False:
            raise ValueError(
                explain(f"option {key!r} ({LATER[key]}) is not in this version", next_step=f"leave {key!r} out")
            )
        if key not in KEYS and key not in LATER:
            raise ValueError(
                explain(
                    f"unknown option {key!r}, {nearest(str(key), KEYS)}",
                    expected=f"one of {', '.join(KEYS)}",
                    next_step="correct the key, or leave it out",
                )
            )
    return given


def _plan(given: object) -> Plan | None:
    if given is None or isinstance(given, Plan):
        return given
    if isinstance(given, str | os.PathLike):
        return Plan.load(Path(given))
    raise ValueError(
        explain(
            "option 'plan' takes a plan or the folder of one",
            expected="a qfx.Plan or a path",
            found=f"{type(given).__name__}: {given!r}",
            next_step="give what qfx.plan(...) returned, or the folder it was saved in",
        )
    )


def _recipe(given: Any) -> Recipe:
    recipe = Recipe.parse(given)
    if recipe.needs_data:
        step = (
            "model = qfx.quantize(model, recipe, data=batches), then torch.compile(model, backend='qfx'); "
            "or options={'plan': qfx.plan(model, recipe, batches)}"
        )
        what = f"recipe {recipe.name!r} needs calibration data, which torch.compile does not have"
        raise ValueError(explain(what, next_step=step))
    return recipe


def _flag(strict: object) -> bool:
    if not isinstance(strict, bool):
        raise ValueError(
            explain("option 'strict' takes a bool", expected="True or False", found=repr(strict), next_step="give one")
        )
    return strict


def _backend(name: object) -> str:
    if name not in BACKENDS:
        raise ValueError(
            explain(
                f"unknown backend {name!r}, {nearest(str(name), BACKENDS)}",
                expected=f"one of {', '.join(BACKENDS)}",
                next_step="correct the name, or leave it out",
            )
        )
    if name == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ValueError(explain("the backend 'openvino' is not installed", next_step="pip install openvino"))
    return str(name)


def _cache(given: Any) -> CacheAt | bool:
    """True, False, a folder, or {"folder": ..., "max_bytes": ...}."""
    if isinstance(given, bool):
        return given
    if isinstance(given, str | os.PathLike) and os.fspath(given):
        return CacheAt(Path(given).expanduser())
    if isinstance(given, Mapping) and set(given) <= set(CACHE_KEYS):
        folder, most = given.get("folder"), given.get("max_bytes")
        is_size = most is None or (isinstance(most, int) and not isinstance(most, bool) and most > 0)
        if is_size and isinstance(folder, str | os.PathLike | None):
            return CacheAt(None if folder is None else Path(folder).expanduser(), most)
    raise ValueError(
        explain(
            "option 'cache' says where compiled sessions are kept",
            expected="True, False, a folder, or {'folder': a folder, 'max_bytes': a positive int}",
            found=repr(given),
            next_step="give one of these, or leave it out",
        )
    )
