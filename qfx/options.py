"""The options of `torch.compile(model, backend="qfx", options={...})`, validated key by key."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qfx.errors import check_flags, explain, nearest
from qfx.format import Format
from qfx.ops.attention import needs_scale, reason_against
from qfx.plan import Plan
from qfx.recipe import Recipe, Rule

BACKENDS = ("auto", "onnx", "openvino", "reference", "triton")
KEYS = ("recipe", "plan", "kv", "strict", "backend", "cache")
CACHE_KEYS = ("folder", "max_bytes")


@dataclass(frozen=True)
class CacheAt:
    """folder: None is the default one. max_bytes: None is the default."""

    folder: Path | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Options:
    """recipe: what to do with a float model. plan: formats and scales decided before (instead of a recipe).

    kv: the rule for keys and values of attention, which is the last of the recipe, too. It is about what attention
    computes with; what is cached between calls is the caller's.
    strict: raise where a node does not get what was asked. backend: "auto" (ONNX Runtime on CPU, Triton on a GPU),
    "onnx", "openvino" and "triton" (where they are installed), "reference".
    default: neither recipe nor plan was given, so that a model quantized before runs as it is. cache: where sessions
    are kept for the next process; True is the default place, False is nowhere. mode: Inductor's, for Triton.
    """

    recipe: Recipe
    plan: Plan | None = None
    strict: bool = False
    backend: str = "auto"
    default: bool = True
    cache: CacheAt | bool = True
    kv: Rule | None = None
    mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Read `options=` of torch.compile, and keep its `mode=`. A key whose value is None counts as left out.

        Raises ValueError for an unknown key (with the nearest valid one), a wrong type, both a recipe and a plan, a
        mode that the backend does not have, and a recipe that needs data; FileNotFoundError for a plan that is not
        there.
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
        kv = _kv(given.get("kv"))
        if kv is not None and plan is not None:
            step = "leave 'kv' out, and plan with a rule for 'attention'"
            raise ValueError(explain("options 'plan' and 'kv' were both given: a plan has its own", next_step=step))
        if kv is not None:
            recipe = recipe.override(rules=(*recipe.rules, kv))
        default = plan is None and "recipe" not in given
        strict, backend = given.get("strict", False), _backend(given.get("backend", "auto"))
        check_flags(strict=strict)
        if mode is not None and backend not in ("auto", "triton"):
            what, step = f"mode {mode!r} is for the backend 'triton'", "leave mode= out, or the option 'backend'"
            raise ValueError(explain(what, found=f"backend '{backend}'", next_step=step))
        return cls(recipe, plan, strict, backend, default, _cache(given.get("cache", True)), kv, mode)


def checked_mode(mode: str | None, example_inputs: Sequence[Any], model: nn.Module | None) -> str | None:
    """One of Inductor's modes, checked; None for the default one, and for a graph on the CPU of a model on a GPU.

    Raises ValueError for unknown modes, and where neither the inputs nor the model are on a GPU.
    """
    if mode in (None, "default"):
        return None
    here = _on_gpu(example_inputs)
    if not here and not (model is not None and _on_gpu(itertools.chain(model.parameters(), model.buffers()))):
        raise ValueError(explain(f"mode {mode!r} is Inductor's", expected="no mode", next_step="leave mode= out"))
    from torch._inductor import list_mode_options

    if mode not in list_mode_options():
        valid = ", ".join(list_mode_options())
        raise ValueError(explain(f"unknown mode {mode!r}", expected=f"one of {valid}", next_step="leave mode= out"))
    return mode if here else None


def _on_gpu(values: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == "cuda" for x in values)


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that were given, their keys known."""
    if not isinstance(options, Mapping | None):
        raise ValueError(
            explain("options is a dictionary", expected=f"keys {', '.join(KEYS)}", found=f"{options!r}",
                    next_step='for example options={"recipe": "w4a16"}')
        )  # fmt: skip
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in given:
        if key not in KEYS:
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


def _kv(given: Any) -> Rule | None:
    """The rule of "i8", of a format's text, or of {"k": ..., "v": ...}; None for None and False. A type alone, and fp8,
    has a scale for each token of each head."""
    if given is None or given is False:
        return None
    texts = {"k": given, "v": given} if isinstance(given, str) else given
    if not isinstance(texts, Mapping) or not texts or not set(texts) <= {"k", "v"}:
        raise ValueError(
            explain(
                "option 'kv' gives keys and values of attention a format",
                expected='"i8", another format such as "f8e4m3/tok", or {"k": ..., "v": ...}',
                found=repr(given),
                next_step="give one of these, or leave it out",
            )
        )
    formats: dict[str, Any] = {role: str(_kv_format(role, text)) for role, text in texts.items()}
    return Rule(target="attention", **formats)


def _kv_format(role: str, text: Any) -> Format:
    try:
        fmt = Format.parse("f8e4m3" if text == "fp8" else text)
    except ValueError as error:
        raise ValueError(f"option 'kv': {error}") from error
    if not fmt.is_plain and str(fmt) == fmt.type:
        fmt = Format(fmt.type, "tok")
    reason = reason_against(role, fmt)
    if reason is None and needs_scale(role, fmt):
        reason = "torch.compile has no data to find its scale from"
    if reason is not None:
        step = f"write '{fmt.type}/tok'; qfx.QuantizedCache takes formats in groups"
        raise ValueError(explain(f"option 'kv': {role}={text} cannot be had: {reason}", next_step=step))
    return fmt


def _backend(name: object) -> str:
    if name not in BACKENDS:
        raise ValueError(
            explain(
                f"unknown backend {name!r}, {nearest(str(name), BACKENDS)}",
                expected=f"one of {', '.join(BACKENDS)}",
                next_step="correct the name, or leave it out",
            )
        )
    if name in ("openvino", "triton") and importlib.util.find_spec(str(name)) is None:
        raise ValueError(explain(f"the backend '{name}' is not installed", next_step=f"pip install {name}"))
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
