"""`qfx.plan` and `qfx.quantize`: decide on the exported graph, then write into the live module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from qfx import annotation, data as batches, graph
from qfx.capture import Captured, capture_export
from qfx.errors import Note, UnsupportedError, explain
from qfx.format import Format
from qfx.inputs import example_inputs, need_inputs, without_cache
from qfx.observers import Observer, create
from qfx.passes.annotate import annotate
from qfx.passes.calibrate import calibrate
from qfx.passes.observe import insert_observers, remove_observers
from qfx.passes.quantize import refuse
from qfx.pipeline import prepare, told
from qfx.plan import Plan
from qfx.recipe import Recipe, is_static
from qfx.transform import transform
from qfx.writeback import layout_of, write_back

RecipeLike = Any  # a preset name, a Recipe, a mapping or a path: what Recipe.parse takes


def plan(
    model: nn.Module, recipe: RecipeLike = "w8a8", data: Iterable[Any] | None = None, *, strict: bool = False,
    progress: bool = True, **overrides: Any,
) -> Plan:  # fmt: skip
    """Decide formats, rewrites and scales for `model`; the model is not changed.

    data: batches (tensors, tuples or dicts of keyword arguments); needed by recipes with static activations or smoothing.
    overrides: fields of the recipe to change. strict: what cannot be had as asked is an UnsupportedError, not a warning.
    Raises ValueError for bad data and recipes, UnsupportedError for a model that cannot be exported as one graph.
    """
    asked = Recipe.parse(recipe).override(**overrides) if overrides else Recipe.parse(recipe)
    if asked.needs_data and data is None:
        raise ValueError(
            explain(
                f"recipe {asked.name!r} needs calibration data",
                next_step="pass data=batches (about 128 samples of what the model will see)",
            )
        )
    calls = batches.calls(model, data, asked.num_calibration_samples) if data is not None else None
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _plan(model, asked, calls, strict=strict, progress=progress)
    finally:
        for module, training in modes:
            module.training = training


def quantize(
    model: nn.Module, recipe: RecipeLike | Plan = "w8a8", data: Iterable[Any] | None = None, *, strict: bool = False,
    **overrides: Any,
) -> nn.Module:  # fmt: skip
    """Quantize `model` in place by a recipe or a plan, and return it.

    Linear layers, embeddings, patch convolutions and expert weights become packed; norms are folded where the recipe
    rewrites. generate(), state_dict(), deepcopy() and torch.compile(backend="qfx") go on working. Errors come before
    anything is changed. See `plan` for the arguments.
    """
    if isinstance(recipe, Plan):
        if overrides or data is not None:
            raise ValueError("a plan is complete: expected no data and no recipe fields beside it; next step: leave them out")
        recipe.check(model, strict=strict)
        made = recipe
    else:
        made = plan(model, recipe, data, strict=strict, **overrides)
    with torch.no_grad():
        model, notes = write_back(model, made)
    told(notes, strict=False)
    return model


def _plan(model: nn.Module, recipe: Recipe, calls: list[Any] | None, *, strict: bool, progress: bool) -> Plan:
    args, kwargs = calls[0] if calls else ((), example_inputs(model))
    if kwargs is None:
        raise need_inputs(model)
    captured = capture_export(model, args, without_cache(model, kwargs) if not args else kwargs)
    gm = captured.gm
    notes = prepare(gm)
    notes += annotate(gm, recipe) + refuse(gm)
    made = Plan.of(model, recipe)
    _decide(gm, made)
    if recipe.needs_data:
        assert calls
        flat = [captured.flatten(a, without_cache(model, k) if not a else k) for a, k in calls]
        notes += transform(gm, made, flat, progress=progress)
        notes += _scales(gm, made, flat, progress=progress)
    told(notes, strict=strict)
    made.notes = [str(note) for note in notes]
    return made


def _decide(gm: fx.GraphModule, made: Plan) -> None:
    """Copy the annotations of the graph into the plan, with how each module holds its weight."""
    for node in gm.graph.nodes:
        formats = annotation.get(node) if node.op == "call_function" else {}
        if not formats:
            continue
        fqn = graph.fqn_of(node)
        made.annotations[fqn] = {r: str(f) if isinstance(f, Format) else [str(h) for h in f] for r, f in formats.items()}
        if "w" in formats:
            made.layouts[fqn] = layout_of(node)


def _scales(gm: fx.GraphModule, made: Plan, flat: Sequence[Sequence[Any]], *, progress: bool) -> list[Note]:
    """Calibrate the scales of static activation formats into the plan."""
    recipe = made.recipe

    def make(node: fx.Node, role: str) -> Observer | None:
        fmt = annotation.get(node)[role]
        if role != "x" or not isinstance(fmt, Format) or not is_static(fmt):
            return None
        return create(recipe.observer, fmt, name=graph.fqn_of(node), percentile=recipe.percentile)

    observers = insert_observers(gm, make)
    try:
        notes = calibrate(gm, flat, observers, total=len(flat), progress=progress) if observers else []
    finally:
        remove_observers(gm)
    for (fqn, role), observer in observers.items():
        fmt = Format.parse(str(made.annotations[fqn][role]))
        found = observer.qparams(fmt)
        made.tensors[f"{fqn}/x_scale"] = found.scale
        if found.zero is not None:
            made.tensors[f"{fqn}/x_zero"] = found.zero
    return notes
