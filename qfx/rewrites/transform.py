"""The exact rewrites of a recipe, found on the graph, applied to it and recorded in the plan."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from qfx import annotation, graph, run
from qfx.calibration.sample import Sample
from qfx.errors import Note
from qfx.format import Format
from qfx.kv.plans import read
from qfx.names import is_within
from qfx.passes import awq, smooth, smooth_k, up_down, v_o
from qfx.passes.calibrate import observed
from qfx.passes.observe import Make
from qfx.passes.rewrites import MODULES
from qfx.plan import Plan
from qfx.recipe import DATA_REWRITES
from qfx.rewrites import combine, rotations
from qfx.rewrites.permute import permute
from qfx.rewrites.rotations import apply_site


def transform(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, undivided: Collection[str] = (),
    progress: bool = True,
) -> list[Note]:  # fmt: skip
    """Apply the rewrites of `plan.recipe` to `gm` and record them in `plan`.

    Their order is always the same (`combine.ORDER`).

    batches: the graph's inputs, for rewrites that choose factors by what they see. undivided: linears whose input the
    live model cannot divide or rotate. Returns what could not be rewritten.
    """
    notes: list[Note] = []
    for name in combine.in_order(plan.recipe.rewrites):
        if name in combine.ROTATIONS:
            notes += rotations.rewrite(gm, plan, name, undivided)
        elif name == "awq":
            notes += _awq(gm, plan, batches, progress=progress)
        elif name == "smooth-k":
            notes += _smooth_k(gm, plan, batches, progress=progress)
        elif name == "permute-heads":
            notes += permute(gm, plan)
        elif name in DATA_REWRITES:
            notes += _smooth(gm, plan, name, batches, undivided, progress=progress)
        else:
            notes += _exact(gm, plan, name)
        run.settle(gm)
    return notes


def _smooth(
    gm: fx.GraphModule,
    plan: Plan,
    name: str,
    batches: Sequence[Sequence[Any]],
    undivided: Collection[str],
    *,
    progress: bool,
) -> list[Note]:
    """A rewrite that chooses factors by what the linears see."""
    recipe = plan.recipe
    stats, notes = _samples(gm, batches, smooth.watch, progress=progress)
    choose = functools.partial(
        smooth.choose, alpha=recipe.smooth_alpha, observer=recipe.observer, percentile=recipe.percentile
    )
    done = _done(plan)
    if name == "smooth":
        chosen, refusals = smooth.smooth(gm, stats, skip=done, fold_only=undivided, chooser=choose)
    else:
        chosen, refusals = importlib.import_module(MODULES[name]).smooth(gm, stats, skip=done, chooser=choose)
    for site, factor in chosen:
        apply_site(gm, plan, site, factor)
        if isinstance(site, smooth.Site):
            for fqn, vector in smooth.explicit_factors(site, factor).items():
                plan.tensors[f"{fqn}/smooth"] = vector
    return notes + refusals


def _smooth_k(gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool) -> list[Note]:
    """Factors of key channels, by the keys and queries that attention reads."""
    recipe = plan.recipe
    stats, notes = observed(gm, batches, smooth_k.watch, roles=smooth_k.roles, progress=progress)
    chosen, refusals = smooth_k.smooth(
        gm, stats, alpha=recipe.smooth_alpha, observer=recipe.observer, percentile=recipe.percentile,
        formats=functools.partial(_of_keys, {one.layer.fqn: one.format.keys for one in read(plan.caches)}),
    )  # fmt: skip
    for site, factor in chosen:
        apply_site(gm, plan, site, factor)
    return notes + refusals


def _of_keys(cached: Mapping[str, Sequence[Format]], node: fx.Node) -> Format | None:
    """How an attention's keys are rounded, there or in its cache: of several formats that with the fewest bits, where
    there are some, of those that have a scale for each token."""
    found = [*annotation.each(annotation.get(node).get("k") or ())]
    name = graph.fqn_of(node)
    found += [fmt for fqn, formats in cached.items() if is_within(name, fqn) for fmt in formats]
    coarse = [fmt for fmt in found if not fmt.is_plain]
    return min(coarse, key=lambda fmt: (fmt.group is not None, fmt.bits), default=None)


def _awq(gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool) -> list[Note]:
    """Activation-aware factors, in the order of the rewrites that take them."""
    stats, notes = _samples(gm, batches, awq.watch, progress=progress)
    choose = functools.partial(awq.choose, searched=plan.recipe.rounding in ("mse", "gptq"))
    chosen: list[tuple[Any, Any]]
    for rewrite in (v_o, up_down):
        chosen, _ = rewrite.smooth(gm, stats, chooser=choose)  # whoever is refused may have a norm below
        for site, factor in chosen:
            apply_site(gm, plan, site, factor)
    chosen, refusals = smooth.smooth(gm, stats, skip=_done(plan), fold_only=stats, chooser=choose)
    for site, factor in chosen:
        apply_site(gm, plan, site, factor)
    return notes + refusals


def _samples(
    gm: fx.GraphModule, batches: Sequence[Sequence[Any]], watch: Make, *, progress: bool
) -> tuple[dict[str, Sample], list[Note]]:
    """FQN of a linear -> a sample of its input."""
    observers, notes = observed(gm, batches, watch, progress=progress)
    return {fqn: o for (fqn, _), o in observers.items() if isinstance(o, Sample)}, notes


def _done(plan: Plan) -> set[str]:
    """Linears whose inputs another weight scales already."""
    scaled = [record for record in plan.rewrites if record["name"] in ("v-o", "up-down")]
    return {record[key]["name"] for record in scaled for key in ("o", "down") if key in record}


def _exact(gm: fx.GraphModule, plan: Plan, name: str) -> list[Note]:
    """A rewrite that needs no data: every site it finds."""
    module = importlib.import_module(MODULES[name])
    sites, refusals = module.find(gm)
    for site in sites:
        apply_site(gm, plan, site)
    return list(refusals)
