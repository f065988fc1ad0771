"""What `qfx.plan` decides: capture, annotate, rewrite, calibrate, measure. The live model is only read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qfx import annotation, graph, run
from qfx.allocation.allocate import Given, allocate
from qfx.allocation.caches import allocate_caches
from qfx.allocation.simple import lift
from qfx.calibration.clipping import clip_inputs
from qfx.calibration.observers import Observer, create
from qfx.capture import Captured, capture_export
from qfx.capture_calls import capture_calls
from qfx.data import Call, roomiest, telling
from qfx.errors import Note, UnsupportedError, explain, first_line
from qfx.inputs import GIVE_DATA, example_inputs, without_cache
from qfx.kv.planning import plan_caches
from qfx.layouts import ALSO, READ, layout_of
from qfx.live.places import held, is_own_linear
from qfx.live.walk import walk
from qfx.measuring.measure import bounded, decibel
from qfx.ops import heads as attention_heads
from qfx.passes.annotate import annotate, kind_of, one_of_each_name, plain_tables
from qfx.passes.calibrate import observed
from qfx.passes.quantize import quantize, refuse
from qfx.passes.quantize_attention import is_attention, way_of
from qfx.pipeline import prepare
from qfx.plan import Plan
from qfx.presets import presets
from qfx.recipe import DATA_ROUNDINGS, Recipe, is_static
from qfx.reporting.sqnr import compare
from qfx.rewrites.transform import transform
from qfx.rounding.correct import apply_to, correct
from qfx.rounding.outliers import keep_outliers
from qfx.rounding.sequential import round_weights
from qfx.rounding.weighted import round_weighted
from qfx.storage.hollow import is_hollow_leaf


def decide(
    model: nn.Module, recipe: Recipe, calls: Sequence[Call], *, progress: bool = True,
    resume: str | os.PathLike[str] | None = None, memory: int | None = None, given: Given | None = None,
) -> tuple[Plan, list[Note], list[Note]]:  # fmt: skip
    """(plan, notes about what cannot be had as asked, those of them that were warned about already).

    calls: what the model will see, checked; empty where the recipe needs none. The model is in eval mode. resume: a
    folder for the progress of a rounding that needs data. memory: bytes of activations that it holds. given: what
    predicts the loss of units, for an allocation.
    """
    if recipe.only_caches:
        made = Plan.of(model, recipe)
        made.caches, notes = plan_caches(model, recipe, calls)
        return made, notes, []
    found, reason, step = _capture(model, calls)
    if found is None:
        _check_walkable(recipe, reason, step)
        made, notes = walk(model, recipe, reason, step)
        made.caches, told = plan_caches(model, recipe, calls)
        return made, [*notes, *told, *_unmatched(recipe, [(kind, fqn) for fqn, kind in _walked(made)])], []
    captured, flat, filled = found
    gm = captured.gm
    elsewhere = _read_elsewhere(model, gm)
    prepare(gm)
    notes = [*filled, *annotate(gm, recipe), *refuse(gm)]
    known = [(k, graph.fqn_of(n)) for n in gm.graph.nodes if (k := kind_of(n)) is not None]
    notes += _unmatched(recipe, [*known, *(("embedding", path) for path in plain_tables(gm))])
    made = Plan.of(model, recipe)
    notes += _record(model, gm, made)
    _mark_read(model, made, elsewhere)
    made.caches, told = plan_caches(model, recipe, calls)
    notes += told
    said: list[Note] = []
    if recipe.rewrites or calls:
        divides = not {"smooth", "rotate", "rotate-down"}.isdisjoint(recipe.rewrites)
        undivided = _undivided(model, made) if divides else set()
        notes += transform(gm, made, flat, undivided=undivided, progress=progress)
        if recipe.outliers is not None:
            notes += keep_outliers(gm, made, flat, skip=_undivided(model, made), progress=progress)
        if recipe.clip_inputs:
            notes += clip_inputs(gm, made, flat, progress=progress)
        said = _scales(model, gm, made, flat, progress=progress) if recipe.needs_data else []
        count = len(made.rewrites)
        notes += _allocated(gm, made, flat, captured.outputs, given, progress=progress)
        if len(made.rewrites) > count:  # heads were put in another order
            said = _scales(model, gm, made, flat, progress=progress)
        notes += _rounded(model, gm, made, flat, progress=progress, resume=resume, memory=memory)
        if calls:
            made.sensitivities["sqnr_db"] = _errors(gm, made, flat[0])
    return made, [*notes, *said], said


def _allocated(
    gm: fx.GraphModule, made: Plan, flat: Sequence[Sequence[Any]], outputs: Sequence[str], given: Given | None, *,
    progress: bool,
) -> list[Note]:  # fmt: skip
    """Give units of weights, and heads of caches, formats of their own where the recipe asks for that."""
    recipe, notes = made.recipe, list[Note]()
    if recipe.allocation is not None:
        notes += allocate(gm, made, flat, outputs=outputs, given=given, progress=progress)
    elif recipe.lift is not None:
        scores = None if given is None or given.sensitivity is None else given.sensitivity.calibrated()
        notes += lift(gm, made, flat, outputs=outputs, scores=scores, progress=progress)
    if recipe.cache_bits is not None and made.caches:  # last: heads are in their final order
        notes += allocate_caches(gm, made, flat, outputs=outputs, progress=progress)
    return notes


def _rounded(
    model: nn.Module, gm: fx.GraphModule, made: Plan, flat: Sequence[Sequence[Any]], *, progress: bool,
    resume: str | os.PathLike[str] | None, memory: int | None,
) -> list[Note]:  # fmt: skip
    """Round the weights into the plan where that takes data, and correct what the rounding lost."""
    recipe, notes = made.recipe, list[Note]()
    if recipe.rounding in DATA_ROUNDINGS:
        notes += round_weights(gm, made, flat, progress=progress, resume=resume, memory=memory)
    if recipe.weighting != "uniform":
        notes += round_weighted(gm, made, flat, progress=progress)
    if recipe.bias_correction or recipe.low_rank:
        notes += correct(gm, made, flat, skip=_undivided(model, made))
    return notes


def _check_walkable(recipe: Recipe, reason: str, step: str) -> None:
    """Raises UnsupportedError where a recipe needs the graph that could not be had."""
    if recipe.allocation is not None or recipe.lift is not None or recipe.cache_bits is not None:
        what = f"formats of units are allocated on the model's graph, which cannot be had: {reason}"
        raise UnsupportedError(explain(what, next_step=f"{step}; or leave out the budget (lift, cache_bits)"))


def _capture(
    model: nn.Module, calls: Sequence[Call]
) -> tuple[tuple[Captured, list[list[Any]], list[Note]] | None, str, str]:
    """The graph, its inputs for each call and what is to be told; where it cannot be had, None, the reason and what to
    do.

    Without calls it is looked at and never run, so that its sizes need not vary, which makes most of tracing's time.
    Raises ValueError where the model itself does not take the first call.
    """
    args, kwargs = roomiest(calls) if calls else ((), example_inputs(model))
    if kwargs is None:
        return None, "no example of its inputs is known", GIVE_DATA
    kwargs = without_cache(model, kwargs, args)
    try:
        if calls:
            return capture_calls(model, calls), "", ""
        return (capture_export(model, args, kwargs, dynamic=False, shared=True), [], []), "", ""
    except UnsupportedError as error:
        if calls:
            _try(model, args, kwargs)
        elif unfit := _unfit(model, kwargs):
            return None, f"the example that qfx makes of its inputs does not fit it: {unfit}", GIVE_DATA
        reason = str(error).removeprefix("expected a model that torch.export captures as one graph, found ")
        step = "torch.compile(model, backend='qfx') takes models in several graphs; a part of it can be calibrated by "
        step += "itself: qfx.quantize(model.language_model, recipe, qfx.part_batches(model, 'language_model', data))"
        return None, f"torch.export: {reason.partition('; next step')[0]}", step


def _try(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            explain(
                f"the model does not take a batch of the data: {type(error).__name__}: {error}",
                expected="batches on which model(**batch), model(*batch) or model(batch) runs",
                next_step="try one call of the model with a batch",
            )
        ) from error


def _unfit(model: nn.Module, kwargs: dict[str, Any]) -> str:
    """What the model itself says of an example that qfx made; "" where it takes it, or its weights are not at hand."""
    if any(is_hollow_leaf(module) for module in model.modules()):
        return ""
    try:
        with torch.random.fork_rng(devices=[]):  # the user's chance stays as it was
            model(**kwargs)
    except Exception as error:  # noqa: BLE001  (whatever a foreign forward raises)
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _unmatched(recipe: Recipe, nodes: list[tuple[str, str]]) -> list[Note]:
    """Targets that the user wrote and that match nothing. Those of presets are for many kinds of models."""
    known = {rule.target for preset in presets().values() for rule in preset.rules}
    step = "compare it with the names that qfx.report(model) lists; a part of a name needs a glob such as '*.fc1'"
    return [
        Note(repr(target), "this target of the recipe matches no node of the model", step)
        for target in recipe.unmatched(nodes)
        if target not in known
    ]


def _walked(made: Plan) -> list[tuple[str, str]]:
    return [(fqn, "embedding" if layout == "embedding" else "linear") for fqn, layout in made.layouts.items()]


def _record(model: nn.Module, gm: fx.GraphModule, made: Plan) -> list[Note]:
    """Copy the annotations of the graph into the plan, with how each module holds its weight."""
    notes, twins = one_of_each_name(gm, made.layouts), dict[str, str]()
    for node in gm.graph.nodes:
        formats = annotation.get(node) if node.op == "call_function" else {}
        if not formats:
            continue
        fqn = graph.fqn_of(node)
        if "w" in formats and held(model, fqn) is None:
            if (shared := _shared(model, node)) is None:
                reason = "its weight is a constant made in the forward, and stays in float"
                notes.append(Note(fqn, reason, "make it a parameter"))
            else:
                twins[fqn] = shared
            annotation.clear(node)
            continue
        texts = {role: annotation.to_json(fmt) for role, fmt in formats.items()}
        layout = layout_of(node) if "w" in formats else None
        before = made.annotations.get(fqn, {})
        if before.get("w", texts.get("w")) != texts.get("w"):
            notes.append(_two_formats(fqn, before["w"], texts["w"]))
            annotation.set(node, "w", annotation.from_json(before["w"]))
        made.annotations[fqn] = {**texts, **before}
        if layout is not None and made.layouts.get(fqn, READ).endswith(READ):
            made.layouts[fqn] = layout
    for fqn, shared in twins.items():
        if not {shared, shared.removesuffix(".weight")} & {
            name for name, asked in made.annotations.items() if "w" in asked
        }:
            reason = f"its weight is {shared} too, which the recipe leaves in float: both stay in float"
            notes.append(Note(fqn, reason, "give both the same format"))
    attentions = {graph.fqn_of(node): way_of(node) for node in gm.graph.nodes if is_attention(node)}
    if not made.annotations.keys().isdisjoint(attentions):
        made.layouts |= attentions  # a live model has to know of those that stay in float, too
    return notes


def _read_elsewhere(model: nn.Module, gm: fx.GraphModule) -> set[int]:
    """Ids of the parameters that the forward of a module reads which does not hold them. Of a graph as it was captured:
    what two forwards compute of one weight becomes one node."""
    found = set()
    for node in gm.graph.nodes:
        modules = {user.meta.get("qfx_module") for user in graph.readers(node)} if node.op == "get_attr" else set()
        if not all(module is None or _holds(model, str(module), str(node.target)) for module in modules):
            found.add(id(graph.get_tensor(gm, str(node.target))))
    return found


def _mark_read(model: nn.Module, made: Plan, elsewhere: Set[int]) -> None:
    """Say in the layouts which weights of modules with a forward of their own are read elsewhere, too."""
    for fqn, layout in made.layouts.items():
        owner, leaf = held(model, fqn) or ("", "")
        own = leaf == "weight" and not layout.endswith(READ) and layout != "unknown"
        if own and id(model.get_submodule(owner)._parameters.get(leaf)) in elsewhere:
            made.layouts[fqn] = f"{layout}{ALSO}"


def _shared(model: nn.Module, node: fx.Node) -> str | None:
    """The name that the graph has for a node's weight where its own module holds that parameter, too: what is packed
    under the one name is packed under both (see `Writer`)."""
    weight, module = graph.weight_of(node), node.meta.get("qfx_module")
    if weight is None or not module:
        return None
    return str(weight.target) if _holds(model, str(module), str(weight.target)) else None


def _holds(model: nn.Module, module: str, name: str) -> bool:
    """Whether a module has the parameter of this name as its own."""
    try:
        own, parameter = model.get_submodule(module)._parameters, graph.get_tensor(model, name)
    except AttributeError:  # names of a graph that the model does not have
        return False
    return any(held is parameter for held in own.values())


def _two_formats(fqn: str, first: object, second: object) -> Note:
    reason = f"two nodes read it, and it was asked for as w={first} and as w={second}: the first is taken"
    return Note(fqn, reason, "give both the same format")


def _undivided(model: nn.Module, made: Plan) -> set[str]:
    """Linears whose weight another module's forward reads: nothing in the live model could divide their input."""
    found = set()
    for fqn, layout in made.layouts.items():
        at = held(model, fqn)
        if at is None or at[1] != "weight" or not is_own_linear(model.get_submodule(at[0]), layout.removesuffix(ALSO)):
            found.add(fqn)
    return found


def _scales(
    model: nn.Module, gm: fx.GraphModule, made: Plan, flat: Sequence[Sequence[Any]], *, progress: bool
) -> list[Note]:
    """Calibrate the scales of static activation formats into the plan."""
    recipe, first = made.recipe, dict[int, str]()
    names = {path: first.setdefault(id(m), path) for path, m in model.named_modules(remove_duplicate=False)}

    def alike(fqn: str) -> str:  # a module under several names has one scale
        owner, _, leaf = fqn.rpartition(".")
        return names.get(fqn) or f"{names.get(owner, owner)}.{leaf}"

    def make(node: fx.Node, role: str) -> Observer | None:
        formats = annotation.get(node)[role]
        static = [fmt for fmt in annotation.each(formats) if is_static(fmt)]
        if role not in ("x", "q", "k", "v") or not static:
            return None
        name = graph.fqn_of(node)
        fmt = replace(static[0], granularity="head") if isinstance(formats, tuple) else static[0]
        return create(recipe.observer, fmt, name=name, percentile=recipe.percentile, centred=role == "k")

    observers, notes = observed(gm, flat, make, alike=alike, progress=progress)
    for (fqn, role), observer in observers.items():
        formats = annotation.from_json(made.annotations[fqn][role])
        if isinstance(formats, tuple):
            found = attention_heads.qparams(role, formats, observer.range)
        else:
            found = observer.qparams(annotation.each(formats)[0])
        made.tensors[f"{fqn}/{role}_scale"] = found.scale
        if found.zero is not None:
            made.tensors[f"{fqn}/{role}_zero"] = found.zero
    return notes


def _errors(gm: fx.GraphModule, made: Plan, inputs: Sequence[Any]) -> dict[str, float]:
    """SQNR in dB of each quantized node on one batch: the float graph against the quantized one."""
    quantized = graph.copy(gm)
    apply_to(quantized, made)
    quantize(quantized, tensors=made.tensors, rounding=made.recipe.rounding)
    run.settle(quantized)
    with telling(1):
        energies = compare(gm, quantized, inputs)
    found = {fqn: decibel(*pair) for fqn, pair in energies.items()}
    if bad := next((fqn for fqn, value in found.items() if math.isnan(value)), None):
        raise ValueError(
            explain(
                f"the result of {bad!r} on the first batch holds NaN or Inf",
                expected="finite values",
                next_step="look for a failed load, an overflow in half precision or bad data before quantizing",
            )
        )
    return {fqn: bounded(value) for fqn, value in found.items()}
