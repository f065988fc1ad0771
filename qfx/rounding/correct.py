"""Corrections after rounding, found by what each linear reads: low-rank compensation, then bias correction.

One pass over the graph with all batches side by side: every linear sees what comes behind those before it, rounded and
corrected. What is found goes into the plan as records, which both doors apply as they apply rewrites; unlike those they
are not exact: they change the float function towards what the rounded one lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.errors import Note, source_line
from qfx.format import Format
from qfx.passes import bias_correction, low_rank
from qfx.passes._hessian import Hessian, factor
from qfx.passes.rewrites import apply_record
from qfx.plan import Plan
from qfx.rounding import rounded
from qfx.rounding.blocks import Linear, find
from qfx.rounding.lanes import Lane, Program

TOLD = "correction"  # in Plan.sensitivities: FQN -> squared error of the mean result before, and what else is told
_DAMPENING = 1e-4


def correct(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, skip: Collection[str] = ()
) -> list[Note]:
    """Find the corrections that `plan.recipe` asks for, and record them in `plan`. `gm`, in float, is not changed.

    skip: linears whose weight another module's forward reads: the live model has no place for a correction. Returns
    what could not be corrected. Raises ValueError for data on which the model does not run.
    """
    recipe = plan.recipe
    own = graph.copy(gm)
    sites, notes = _sites(own, skip, bias=recipe.bias_correction)
    for node, site in sites.items():
        if recipe.bias_correction and site.bias is None:  # so that the lanes have a place for it
            dtype = graph.val(node).dtype
            zeros = torch.zeros(graph.val(node).shape[-1], dtype=dtype)
            bias_correction.apply(own, site, zeros)
    program = Program(own, plan.tensors)
    linears = find(program)
    with torch.no_grad():
        wanted = _means(Program(gm), batches, {graph.fqn_of(node) for node in sites}) if recipe.bias_correction else {}
        lane = Lane(program, batches, rounded=True)
        for linear in linears:
            _replace(lane, linear, plan)
            if (own_site := sites.get(linear.node)) is not None:
                _correct(lane, linear, own_site, plan, wanted)
    return notes


def _sites(
    gm: fx.GraphModule, skip: Collection[str], *, bias: bool
) -> tuple[dict[fx.Node, bias_correction.Site], list[Note]]:
    """Linears that can be corrected, by node, and notes about the others."""
    found: dict[fx.Node, bias_correction.Site] = {}
    notes = []
    named = [n for n in gm.graph.nodes if graph.schema_name(n) == "aten::linear" and "w" in annotation.get(n)]
    for node in named:
        site: bias_correction.Site | str = bias_correction.site_of(node)
        fqn = graph.fqn_of(node)
        if isinstance(site, str) and not bias:
            site = bias_correction.Site(fqn, None)
        if fqn in skip or fqn != node.meta.get("qfx_module"):
            site = "another module's forward reads its weight"
        elif sum(graph.fqn_of(other) == fqn for other in named) > 1:
            site = "it is called several times, and each call errs in another way"
        elif not isinstance(annotation.get(node)["w"], Format):
            site = "its weight has several formats"
        if isinstance(site, str):
            step = "nothing; its result is as without the correction"
            notes.append(Note(fqn, f"not corrected: {site}", step, source_line(node) or "", minor=True))
        else:
            found[node] = site
    return found, notes


def _means(program: Program, batches: Sequence[Sequence[Any]], names: Collection[str]) -> dict[str, Tensor]:
    """The mean input [K] of each linear in the float model, f64."""
    lane = Lane(program, batches, rounded=False)
    found = {}
    for node in [n for n in program.nodes if graph.schema_name(n) == "aten::linear" and graph.fqn_of(n) in names]:
        lane.advance(program.position[node])
        found[graph.fqn_of(node)] = _mean(lane, node)
    return found


def _mean(lane: Lane, node: fx.Node) -> Tensor:
    rows = [x.reshape(-1, x.shape[-1]) for x in _inputs(lane, node)]
    total = torch.stack([part.to(torch.float64).sum(0) for part in rows]).sum(0)
    return total / max(1, sum(len(part) for part in rows))


def _inputs(lane: Lane, node: fx.Node) -> list[Tensor]:
    """What a linear reads in each batch, without padding, rounded where the lane rounds inputs."""
    x, fmt = node.args[0], annotation.get(node).get("x")
    assert isinstance(x, fx.Node)
    found = [lane.value(batch, x) for batch in range(len(lane.values))]
    if lane.rounded and isinstance(fmt, Format):
        found = [lane.program.round_input(graph.fqn_of(node), value, fmt) for value in found]
    return [lane.rows(batch, x, value) for batch, value in enumerate(found)]


def _replace(lane: Lane, linear: Linear, plan: Plan) -> None:
    """Let the lane compute with the rounded weight."""
    whole = _float(lane, linear)
    parts = [
        rounded.pack(plan.tensors, part.take(whole), part.format, plan.recipe.rounding, name=part.name)
        for part in linear.parts
    ]
    lane.weights.update(dict.fromkeys(linear.readers, linear.join([p.dequantize(whole.dtype) for p in parts])))


def _float(lane: Lane, linear: Linear) -> Tensor:
    operand = linear.node.args[0 if linear.table else 1]
    assert isinstance(operand, fx.Node)
    weight: Tensor = lane.program.look(operand, {})
    return weight


def _correct(lane: Lane, linear: Linear, site: bias_correction.Site, plan: Plan, wanted: dict[str, Tensor]) -> None:
    node, recipe = linear.node, plan.recipe
    lane.advance(lane.program.position[node])
    full = _float(lane, linear)
    told = plan.sensitivities.setdefault(TOLD, {}).setdefault(site.linear, {})
    if recipe.low_rank:
        seen = Hessian(full.shape[-1])
        for x in _inputs(lane, node):
            seen.add(x)
        order = torch.arange(full.shape[-1])
        root, _ = factor(seen.whole(), order, _DAMPENING, site.linear)
        error = full.float() - lane.weights[node].float()
        a, b = low_rank.factors(error, root, recipe.low_rank)
        a, b = a.to(full.dtype), b.to(full.dtype)
        told["low_rank"] = 1 - _energy(error - b.float() @ a.float(), root) / max(_energy(error, root), 1e-30)
        lane.weights.update(dict.fromkeys(linear.readers, lane.weights[node] + b @ a))
        record = low_rank.Site(site.linear).to_record()
        _record(plan, record, {"factor": a, "second": b})
    if recipe.bias_correction:
        mean = _mean(lane, node)
        shift = full.to(torch.float64) @ wanted[site.linear] - lane.weights[node].to(torch.float64) @ mean
        told["shift"] = float(shift.square().mean().sqrt())
        _record(plan, site.to_record(), {"factor": shift.to(torch.float32)})
        held = bias_correction.Site(site.linear, site.bias or f"{site.linear}.bias".lstrip("."))
        bias_correction.apply(lane.program.gm, held, shift)
        lane.program.forget()


def _energy(error: Tensor, root: Tensor) -> float:
    return float((error @ root).square().sum())


def _record(plan: Plan, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        record[key] = f"rewrite/{len(plan.rewrites)}/{key}"
        plan.tensors[record[key]] = tensor
    plan.rewrites.append(record)


def apply_to(module: nn.Module, plan: Plan) -> None:
    """Apply the plan's corrections alone, to a graph that has its rewrites."""
    for record in plan.rewrites:
        if record["name"] in (low_rank.Site.NAME, bias_correction.Site.NAME):
            apply_record(module, record, plan.tensors)
