"""Recipes that lift the weights which matter most to more bits: no budget, no solver.

    heads     the share of heads whose quantization costs most: their rows of q, k, v and columns of o
    edges     the first and the last layers
    max_loss  the layers that cost most, as few as keep the rise of perplexity at or below so many percent

    %linear: f32[2,9,64] = aten.linear(%x, @layers.0.attn.q.weight)     # w=u4/g32/f16
    ->
    %linear: f32[2,9,64] = aten.linear(%x, @layers.0.attn.q.weight)     # w=[i8/g32/f16,u4/g32/f16]

All start from the formats that the recipe's rules give. What has as many bits already, or several formats, stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from qfx import annotation, graph
from qfx.allocation import assign
from qfx.allocation.perplexity import Perplexity
from qfx.allocation.predict import Scores
from qfx.allocation.problem import Assignment
from qfx.analysis.attentions import Attention
from qfx.analysis.energies import energies
from qfx.analysis.measured import Measure, some
from qfx.analysis.units import Unit
from qfx.analysis.units import units as find_units
from qfx.analysis.weights import Weights, rounding_of
from qfx.errors import Note, explain
from qfx.format import Format
from qfx.passes.annotate import kind_of
from qfx.passes.calibrate import progress_bar
from qfx.plan import Plan
from qfx.rewrites.permute import permute
from qfx.rounding.method_options import LiftOptions

TOLD = "lift"  # in Plan.sensitivities
Groups = dict[str, list[Unit]]  # what is lifted together, by name


def lift(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, outputs: Sequence[str] = (),
    scores: Scores | None = None, progress: bool = True,
) -> list[Note]:  # fmt: skip
    """Lift weights of a prepared, annotated float graph, and of `plan`, as `plan.recipe.lift` says.

    batches: the graph's inputs. outputs: names of its outputs, as in `Captured.outputs`. scores: unit -> format ->
    predicted loss, in place of measuring each head or layer alone. `plan.sensitivities["lift"]` tells the loss of each
    head or layer and whether it was lifted. Returns what did not go as asked. Raises ValueError where there is nothing
    to lift, and for max_loss where the model has no perplexity.
    """
    options = plan.recipe.lift
    assert options is not None
    high = Format.parse(options.format)
    base, skip = _base(gm, high)
    units, attentions, notes = find_units(gm, by="layers" if options.heads is None else "heads", skip=skip)
    units = [unit for unit in units if unit.fqn in base]
    groups = _layers(units) if options.heads is None else _heads(units, attentions)
    if not groups:
        raise ValueError(_nothing(options))
    low = {unit.name: base[unit.fqn] for unit in units}
    told: dict[str, Any] = {"format": options.format}
    losses: Mapping[str, float] = {}
    if options.edges is not None:
        lifted = _edges(list(groups), options.edges)
        notes += _everything(lifted, groups, options)
    else:
        used = some(batches, options.samples)
        measure = Measure(
            gm, used, units=units, tensors=plan.tensors, outputs=outputs, rounding=rounding_of(plan.recipe),
            seen=energies(gm, used, plan.recipe),
        )  # fmt: skip
        losses = _losses(measure, groups, low, scores, progress=progress)
        order = sorted(groups, key=lambda name: -losses[name])
        if options.heads is not None:
            lifted = order[: round(options.heads * len(order))]
        else:
            lifted, rise = _until(Perplexity(measure), order, groups, low, high, float(options.max_loss or 0))
            told["rise"] = rise
            notes += _not_enough(rise, options)
        told |= {"measured": measure.kld(_chosen(low, groups, lifted, high)), "what": measure.what}
    plan.sensitivities[TOLD] = told | {
        "groups": {name: {"loss": losses.get(name), "lifted": name in lifted} for name in groups}
    }
    _write(gm, plan, units, low, _chosen(low, groups, lifted, high))
    return [*notes, *(permute(gm, plan, minor=True) if options.heads is not None else [])]


def _base(gm: fx.GraphModule, high: Format) -> tuple[dict[str, Format], list[str]]:
    """FQN -> the one format of a weight that may be lifted; names of the other weights."""
    formats: dict[str, set[Any]] = {}
    names: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        weight = graph.weight_of(node) if kind_of(node) not in (None, "attention", "conv") else None
        if weight is not None:
            formats.setdefault(str(weight.target), set()).add(annotation.get(node).get("w"))
            names.setdefault(str(weight.target), []).append(graph.fqn_of(node))
    base: dict[str, Format] = {}
    skip: list[str] = []
    for held, found in formats.items():
        (one, *more) = found
        if isinstance(one, Format) and not more and one.bits < high.bits:
            base |= dict.fromkeys(names[held], one)
        else:
            skip += names[held]
    return base, skip


def _heads(units: Sequence[Unit], attentions: Sequence[Attention]) -> Groups:
    """For each query head its units of q and o, and those of k and v that it reads."""
    found: Groups = {}
    for attention in attentions:
        for head in range(attention.heads):
            own = [unit for unit in units if unit.attention == attention.name and _reads(attention, head, unit)]
            if own:
                found[f"{attention.name}.{head}"] = own
    return found


def _reads(attention: Attention, head: int, unit: Unit) -> bool:
    if unit.head is None:
        return False
    if unit.kind in ("q", "o"):
        return unit.head == head
    count = len(dict.fromkeys(getattr(attention, unit.kind).starts))
    return unit.head == head * count // attention.heads


def _layers(units: Sequence[Unit]) -> Groups:
    """The weights of each layer; a weight beside the layers is one of its own."""
    found: Groups = {}
    for unit in units:
        found.setdefault(unit.layer or unit.fqn, []).append(unit)
    return found


def _edges(names: Sequence[str], count: int) -> list[str]:
    """The first and last `count` layers of each stack."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.rpartition(".")
        if number.isdigit():
            stacks.setdefault(stem, []).append(name)
    found: list[str] = []
    for stack in stacks.values():
        ordered = sorted(stack, key=lambda name: int(name.rpartition(".")[2]))
        found += dict.fromkeys(ordered[:count] + ordered[-count:])
    return found


def _losses(
    measure: Measure, groups: Groups, low: Assignment, scores: Scores | None, *, progress: bool
) -> dict[str, float]:
    """What it costs to quantize each group alone."""
    if scores is not None:
        return {name: sum(scores[u.name][str(low[u.name])] for u in own) for name, own in groups.items()}
    found = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("measuring groups", total=len(groups))
        for name, own in groups.items():
            found[name] = measure.kld({unit.name: low[unit.name] for unit in own})
            bar.advance(task)
    return found


def _until(
    perplexity: Perplexity, order: Sequence[str], groups: Groups, low: Assignment, high: Format, limit: float
) -> tuple[list[str], float]:
    """(the fewest groups, in order, with which perplexity rises by at most `limit` percent, the rise); all where none.

    Found by bisection: what is lifted further is taken to do no harm.
    """

    def rise(count: int) -> float:
        return perplexity.rise(_chosen(low, groups, order[:count], high))

    under, over = 0, len(order)
    if (found := rise(under)) <= limit:
        return [], found
    found = rise(over)
    while found <= limit and over - under > 1:
        middle = (under + over) // 2
        at = rise(middle)
        if at <= limit:
            over, found = middle, at
        else:
            under = middle
    return list(order[:over]), found


def _chosen(low: Assignment, groups: Groups, lifted: Sequence[str], high: Format) -> Assignment:
    return low | {unit.name: high for name in lifted for unit in groups[name]}


def _write(gm: fx.GraphModule, plan: Plan, units: Sequence[Unit], low: Assignment, chosen: Assignment) -> None:
    changed = {unit.fqn for unit in units if chosen[unit.name] != low[unit.name]}
    own = [unit for unit in units if unit.fqn in changed]
    assign.write(plan, assign.formats_of(own, chosen), Weights(gm, own).readers)


def _nothing(options: LiftOptions) -> str:
    what = "heads whose projections" if options.heads is not None else "weights that"
    return explain(
        f"there is nothing to lift to '{options.format}'",
        expected=f"{what} a rule gives one format of fewer bits",
        next_step="give them one, such as target='linear', w='u4/g32/f16'",
    )


def _everything(lifted: Sequence[str], groups: Groups, options: LiftOptions) -> list[Note]:
    layers = [name for name in groups if name.rpartition(".")[2].isdigit()]
    if len(lifted) < len(layers):
        return []
    reason = f"edges={options.edges} are all of its {len(layers)} layers"
    return [Note("layers", reason, "give fewer, or a rule with more bits", minor=True)]


def _not_enough(rise: float, options: LiftOptions) -> list[Note]:
    if rise <= float(options.max_loss or 0):
        return []
    reason = (
        f"perplexity rises by {rise:.2f} % with every layer in {options.format}, {options.max_loss:g} % were allowed"
    )
    return [Note("lift", reason, "lift to a format of more bits, or allow more")]
