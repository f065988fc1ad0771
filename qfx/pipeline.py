"""The stages between capture and lowering, as lists of passes that read from top to bottom. Both doors use them.

normalize -> annotate -> calibrate -> transform -> calibrate again -> round and quantize
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, fx

from qfx import annotation, graph, run
from qfx.errors import Note, UnsupportedError, listed, warn
from qfx.format import Format
from qfx.packing import Packed
from qfx.passes.annotate import annotate, one_of_each_name
from qfx.passes.convolution import convolution
from qfx.passes.fuse_dequantize import fuse_dequantize
from qfx.passes.normalize import normalize
from qfx.passes.quantize import quantize, refuse
from qfx.passes.rewrites import apply_record
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.reporting.fold import ranges
from qfx.rewrites.transform import transform
from qfx.rounding import rounded

Keep = Callable[[Tensor], Tensor]


def prepare(gm: fx.GraphModule) -> None:
    """Bring a captured graph to the form in which recipes speak of it: one node for each linear, norm, attention."""
    normalize(gm)
    run.run(gm, [convolution, fuse_dequantize])
    graph.rename(gm)


def apply_plan(gm: fx.GraphModule, plan: Plan | None, recipe: Recipe, *, keep: Keep | None = None) -> list[Note]:
    """Quantize a prepared graph: by a plan, or by a recipe that needs no data. Returns what could not be had.

    keep: where packed weights go (see `Spill`); None is memory.
    """
    if plan is None:
        notes = annotate(gm, recipe) + refuse(gm)
        if recipe.rewrites:
            notes += transform(gm, Plan(recipe), [])
        tensors, rounding = {}, recipe.rounding
    else:
        notes = annotate_from(gm, plan) + refuse(gm)
        for record in plan.rewrites:
            apply_record(gm, record, plan.tensors)
        tensors, rounding = plan.tensors, plan.recipe.rounding

    def pack(weight: Tensor, fmt: Format, name: str) -> Packed:
        packed = rounded.pack(tensors, weight, fmt, rounding, name=name)
        if keep is None:
            return packed
        zero = None if packed.zero is None else keep(packed.zero)
        return replace(packed, data=keep(packed.data), scale=keep(packed.scale), zero=zero)

    run.run(gm, [functools.partial(quantize, tensors=tensors, pack=pack)])
    return notes


def annotate_from(gm: fx.GraphModule, plan: Plan) -> list[Note]:
    """Write a plan's formats on the nodes they name, and say which cannot take them. A name of the plan that no node of
    the graph has is no fault here: the graph may be a part of the model."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        for role, fmt in plan.formats(graph.fqn_of(node)).items():
            annotation.set(node, role, fmt)
    return one_of_each_name(gm, plan.layouts)


def told(notes: Iterable[Note], *, strict: bool) -> None:
    """Say each note once as a QfxWarning; under strict raise UnsupportedError with those that are not minor.

    Notes that differ in their nodes alone are one (see `alike`). A warning points to the user's line where known.
    """
    unique = list(dict.fromkeys(notes))
    refused = alike((note for note in unique if not note.minor), len(unique)) if strict else []
    if refused:
        raise UnsupportedError("strict=True and not everything can be had as asked:\n" + "\n".join(map(str, refused)))
    for note in alike(unique):
        warn(str(note), note.where, stacklevel=3)


def alike(notes: Iterable[Note], most: int = 3) -> list[Note]:
    """Notes that differ in their nodes alone as one, whose node names them: `model.layers.0-31.mlp.experts.w1 (32
    nodes)`, at most `most` such names. Of minor ones the source lines may differ, too."""
    groups: dict[Note, list[Note]] = {}
    for note in notes:
        groups.setdefault(replace(note, node="", where="" if note.minor else note.where), []).append(note)
    return [replace(group[0], node=_named([note.node for note in group], most)) for group in groups.values()]


def _named(nodes: list[str], most: int) -> str:
    names = ranges(list(dict.fromkeys(nodes)))  # a layer that is called twice has two nodes
    return nodes[0] if len(nodes) == 1 else f"{listed([name for name, _ in names], most)} ({len(nodes)} nodes)"
