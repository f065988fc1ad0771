"""Attention formats in a live model: modules whose calls of F.scaled_dot_product_attention multiply rounded operands.

The class of a module that computes attention becomes a subclass of itself. While its forward runs, and in this thread
alone, a TorchFunctionMode takes F.scaled_dot_product_attention and calls qfx::quantized_attention in its place;
parameters, buffers, names and hooks stay. Attention over a quantized cache keeps the formats of the cache. torch.export
and torch.compile see the operator itself.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qfx.annotation import Formats, each, show
from qfx.errors import Note, UnsupportedError, explain, warn
from qfx.live.modules import without_fast_paths
from qfx.live.subclass import class_maker, subclass
from qfx.ops import attention as attention_ops
from qfx.ops.heads import ROLES, read
from qfx.passes.quantize_attention import BY_HAND, SDPA, numbers
from qfx.passes.rotate_qk import Site
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.reporting.rows import Row

HELD = "qfx_attention"
# name: the FQN; formats: role -> text; scales, zeros: role -> numbers; rotation: of q and k, [block, seed]; sqnr_db: dB
Spec = dict[str, Any]
_CACHES = "qfx.kv"  # the package of handles on quantized caches
STEP = "load the model with attn_implementation='sdpa'; a compiled or exported model has it as it is"


def find(model: nn.Module, plan: Plan) -> tuple[dict[str, Spec], list[Note]]:
    """Name of each module -> how its attention shall be computed, and notes about attention that stays in float.

    Raises UnsupportedError where a static format has no scale, ValueError where the model has no such module.
    """
    found: dict[str, Spec] = {}
    notes = []
    turned = {r["attention"]: [r["block"], r["seed"]] for r in plan.rewrites if r["name"] == Site.NAME}
    for fqn, formats in planned(plan).items():
        owner = fqn.rpartition(".")[0]
        reason = _reason_against(fqn, plan)
        if reason:
            asked = " ".join(f"{role}={show(fmt)}" for role, fmt in formats.items())
            notes.append(Note(fqn, f"{asked} was asked, but {reason}: stays in float", STEP))
            continue
        steps = {role: numbers(plan.tensors, fqn, role, fmt) for role, fmt in formats.items()}
        found[owner] = {
            "name": fqn,
            "formats": {role: show(fmt) for role, fmt in formats.items()},
            "scales": {role: scales for role, (scales, _) in steps.items() if scales},
            "zeros": {role: zeros for role, (_, zeros) in steps.items() if zeros},
            "rotation": turned.get(fqn),
            "sqnr_db": plan.sensitivities.get("sqnr_db", {}).get(fqn),
        }
    check(model, found)
    return found, notes


def planned(plan: Plan) -> dict[str, dict[str, Formats]]:
    """Name of each attention that the plan gives formats to -> role -> format, or formats of its heads."""
    found = {}
    for fqn in plan.annotations:
        formats = {r: fmt for r, fmt in plan.formats(fqn).items() if r in ROLES}
        if formats:
            found[fqn] = formats
    return found


def without(recipe: Recipe | None, plan: Plan | None) -> tuple[Recipe | None, Plan | None, list[Note]]:
    """Recipe and plan without formats of attention, for a file whose cache has formats; a note where there were any."""
    asked = plan is not None and bool(planned(plan))
    if plan is None and recipe is not None:
        asked = any(recipe.formats_for("attention", rule.target) for rule in recipe.rules)
    if not asked:
        return recipe, plan, []
    if plan is not None:
        plan = replace(plan, annotations={f: roles for f, roles in plan.annotations.items() if f not in planned(plan)})
    elif recipe is not None:
        recipe = recipe.override(ignore=(*recipe.ignore, "attention"))
    reason = "formats of attention were asked beside those of the cache, which hold: attention itself runs in float"
    return recipe, plan, [Note("attention", reason, "leave out kv=, or the formats of attention")]


def check(model: nn.Module, specs: Mapping[str, Any]) -> None:
    """Raises ValueError where the model has no module of one of these names, or a format is not one of attention's."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner, spec in specs.items():
        if owner not in modules:
            what = "the plan gives formats to attention that the model lacks"
            found = f"no module {owner!r} in {type(model).__name__}"
            raise ValueError(explain(what, found=found, next_step="plan again for this model"))
        for role, text in spec["formats"].items():
            reasons = (attention_ops.reason_against(role, fmt) for fmt in each(read(text) or ()))
            reason = next((reason for reason in reasons if reason), None)
            if role not in ROLES or reason:
                raise ValueError(f"attention {spec['name']!r} cannot have {role}={text}: {reason or 'no such role'}")


def attend(model: nn.Module, specs: Mapping[str, Spec]) -> nn.Module:
    """Give the modules of these names the attention that `find` said. Returns the model."""
    for owner, spec in specs.items():
        module = model.get_submodule(owner)
        module.__dict__[HELD] = spec
        if not hasattr(type(module), "qfx_attending"):
            kind: Any = type(module)
            module.__class__ = _class_of(kind)
    without_fast_paths(model)
    return model


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """What `attend` gave the modules of a model, by their names."""
    return {fqn: module.__dict__[HELD] for fqn, module in model.named_modules() if HELD in module.__dict__}


def attention_rows(model: nn.Module) -> Iterable[Row]:
    """Rows of the report for the modules that `attend` changed."""
    for spec in specs_of(model).values():
        asked = " ".join(f"{role}={spec['formats'][role]}" for role in ROLES if role in spec["formats"])
        kernel = "qfx::quantized_attention (reference)"
        yield Row(spec["name"], "attention", asked, kernel, sqnr_db=spec["sqnr_db"])


def _reason_against(fqn: str, plan: Plan) -> str:
    if plan.layouts.get(fqn) == BY_HAND:
        return "its module spells it out (matmul, softmax, matmul), which nothing can take in a live model"
    owner = fqn.rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    for other, layout in plan.layouts.items():
        inner = other.rpartition(".")[0]
        apart = layout in (BY_HAND, SDPA) and other not in plan.annotations and inner != owner
        if apart and other.startswith(prefix):
            return f"the module calls {inner!r}, whose attention shall stay as it is"
    return ""


class _Caught(TorchFunctionMode):
    """Takes F.scaled_dot_product_attention: `take` is called with it and its arguments. count: how often it was."""

    def __init__(self, take: Callable[..., Tensor]) -> None:
        super().__init__()
        self.take = take
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if not torch.compiler.is_compiling():
                self.count += 1
            return self.take(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:  # calls it in turn, where this mode is not on
            with self:
                return _MULTI_HEAD(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    spec: Spec, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if of_cache(key, value):
        plain: Tensor = func(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
        return plain
    if dropout_p > 0 or query.dim() != 4:
        what = "dropout" if dropout_p > 0 else f"operands of {query.dim()} dimensions"
        step = "call model.eval() first" if dropout_p > 0 else "give it operands [B, H, S, D]"
        raise UnsupportedError(explain(f"attention {spec['name']!r} in {spec['formats']} has {what}", next_step=step))
    key, value = once(spec, key, value)
    if spec["rotation"] is not None:
        query, key = (torch.ops.qfx.hadamard(x, *spec["rotation"], False) for x in (query, key))
    steps: list[Any] = []
    for role in "qkv":
        steps += [spec["scales"].get(role, []), spec["zeros"].get(role, [])]
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    texts = [spec["formats"].get(role, "") for role in ROLES]
    y: Tensor = torch.ops.qfx.quantized_attention(
        query, key, value, attn_mask, None, *steps, scale, is_causal, 0.0, *texts
    )
    return y


def once(spec: Spec, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] with the G heads that a spec has formats or scales for, where it has them by heads.

    A module may give F.scaled_dot_product_attention those, or (by its mask, too) each repeated for the query heads that
    read it. A graph in normal form has them once.
    """
    texts = spec["formats"]  # not parsed, for Dynamo
    counts = [text.count(",") + 1 for text in texts.values() if text.startswith("[")]
    counts += [len(n) for role, n in spec.get("scales", {}).items() if role != "q" and "/head" in texts[role]]
    heads, own = key.shape[1], min(counts, default=0)
    if not own or heads <= own or heads % own:
        return key, value
    return key[:, :: heads // own], value[:, :: heads // own]


def of_cache(*states: Tensor) -> bool:
    """Whether any of these is a handle on a quantized cache."""
    return any(type(one).__module__.startswith(_CACHES) for one in states)


def catching(
    base: type[nn.Module], taker: Callable[[Any], Callable[..., Tensor]], say: Callable[[Any], None]
) -> Callable[..., Any]:
    """The forward of a class, in which `taker(module)` is called in the place of F.scaled_dot_product_attention.

    It gets that function and its arguments. say: is called with a module whose forward did not call it.
    """
    own: Any = base

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Caught(taker(self)) as caught:
            result = own.forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and not caught.count:
            say(self)
        return result

    return forward


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    def say(module: nn.Module) -> None:
        spec = module.__dict__[HELD]
        say_float(spec["name"], spec["formats"])

    forward = catching(base, lambda self: functools.partial(_attention, self.__dict__[HELD]), say)
    return subclass(base, {"forward": forward, "qfx_attending": base})


def say_float(name: str, formats: Mapping[str, str]) -> None:
    """Warn that the formats of an attention were not had."""
    asked = " ".join(f"{role}={text}" for role, text in formats.items())
    reason = f"{asked} was asked, but its forward did not call F.scaled_dot_product_attention: ran in float"
    warn(str(Note(name, reason, STEP)), stacklevel=4)


def _projected(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by the three parts of one weight; torch's own way of it Dynamo cannot trace while a mode is on."""
    if q is k and k is v:
        whole = F.linear(q, w, b).chunk(3, -1)
        return whole[0].contiguous(), whole[1].contiguous(), whole[2].contiguous()
    weights, biases = w.chunk(3), (None, None, None) if b is None else b.chunk(3)
    one, other, last = (F.linear(x, part, bias) for x, part, bias in zip((q, k, v), weights, biases, strict=True))
    return one, other, last


# F.multi_head_attention_forward, without its question whether a mode is on, which would hand it back to the mode.
_MULTI_HEAD = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **F.multi_head_attention_forward.__globals__,
        "has_torch_function": lambda _: False,
        "_in_projection_packed": _projected,
    },
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
    F.multi_head_attention_forward.__closure__,
)
