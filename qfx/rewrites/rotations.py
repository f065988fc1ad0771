"""The rotations of a recipe on a graph: what they need first, in which blocks they go, and what a plan records."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

from torch import fx

from qfx import annotation, graph, run
from qfx.errors import Note
from qfx.format import Format
from qfx.passes import _sites as sites
from qfx.passes import _stream as streams
from qfx.passes import centre, rotate, rotate_down, rotate_heads, rotate_qk, untie
from qfx.passes.rewrites import MODULES, apply_record
from qfx.plan import Plan
from qfx.rewrites import combine, rotation

_BY_CHANNEL = {"awq", "smooth"}


def rewrite(gm: fx.GraphModule, plan: Plan, name: str, fixed: Collection[str] = ()) -> list[Note]:
    """Apply one of `combine.ROTATIONS` to `gm` and record it in `plan`.

    fixed: linears whose input the live model cannot rotate. Returns what could not be rotated, and what is rotated by a
    random matrix since no Hadamard matrix of its size is known.
    """
    block = _block(gm, plan)
    if name == "rotate":
        return _rotate(gm, plan, block, fixed)
    if name == "rotate-down":
        found, notes = rotate_down.find(gm, seed=plan.recipe.rotation_seed, block=block, fixed=fixed)
        quantized = {graph.fqn_of(n) for n in gm.graph.nodes if sites.is_linear(n) and "w" in annotation.get(n)}
        wanted = [site for site in found if site.linears[0].name in quantized]
        return _applied(gm, plan, wanted) + [note for note in notes if note.node in quantized]
    qk, notes = rotate_qk.find(gm, seed=plan.recipe.rotation_seed)
    rounded = {graph.fqn_of(n) for n in gm.graph.nodes if not {"q", "k"}.isdisjoint(annotation.get(n))}
    plain = [site.attention for site in qk if site.attention not in rounded]
    if plain and plan.fingerprint:
        reason = "'rotate-qk' is left out of live models where attention runs in float: it would change nothing"
        notes.append(Note(plain[0], reason, "nothing; compiled and exported graphs have it", minor=True))
    return _applied(gm, plan, qk) + notes


def apply_site(gm: fx.GraphModule, plan: Plan, site: Any, factor: Any = None) -> None:
    """Record a site of any rewrite, with the factor that was chosen for it, and apply it."""
    record = site.to_record()
    if factor is not None:
        record["factor"] = f"rewrite/{len(plan.rewrites)}/factor"
        plan.tensors[record["factor"]] = factor
    plan.rewrites.append(record)
    apply_record(gm, record, plan.tensors)


def _rotate(gm: fx.GraphModule, plan: Plan, block: int | None, fixed: Collection[str]) -> list[Note]:
    """R1 where there is a stream to rotate, and R2. What R1 needs is done only where it can be had."""
    seed, apart = plan.recipe.rotation_seed, list[Note]()
    notes = _impossible(gm)
    if notes is None:
        tied = _tied(gm, plan, fixed)
        shared = [site for site in untie.find(gm)[0] if site.linear not in tied]  # none where 'untie' is asked
        apart = [_apart(gm, site) for site in shared if _one_format(gm, site.table)]
        for name in combine.IMPLIED["rotate"]:
            if name not in plan.recipe.rewrites:
                for site in importlib.import_module(MODULES[name]).find(gm)[0]:
                    if not (isinstance(site, untie.Site) and site.linear in tied):
                        apply_site(gm, plan, site)
        _applied(gm, plan, centre.find(gm)[0])
        run.settle(gm)
        found, notes = rotate.find(gm, seed=seed, block=block, tied=tied)
        notes = _applied(gm, plan, found) + notes
    heads, refusals = rotate_heads.find(gm, seed=seed, block=block)
    first = {note.reason: note for note in reversed(notes)}  # the same reason at every norm is one note
    return [*apart, *first.values(), *_applied(gm, plan, heads), *refusals]


def _tied(gm: fx.GraphModule, plan: Plan, fixed: Collection[str]) -> set[str]:
    """Linears that go on sharing the embedding's table: both have one format, so that it is stored once.

    Others get a weight of their own: those that stay in float or have another format than the table (untying then costs
    no bytes, and saves two products a token), whose input the live model cannot rotate, and those whose input channels
    the recipe treats one by one, which a shared weight does not allow.
    """
    if plan.recipe.outliers is not None or not _BY_CHANNEL.isdisjoint(plan.recipe.rewrites):
        return set()
    wanted = {site.linear for site in untie.find(gm)[0] if _one_format(gm, site.table)} - set(fixed)
    trial = graph.copy(gm)
    for site in untie.find(trial)[0]:
        if site.linear not in wanted:
            untie.apply(trial, site)
    found = streams.find(trial, folded=False, tied=wanted)[0]
    return {graph.fqn_of(head) for stream in found if stream.centred for head in stream.heads}


def _apart(gm: fx.GraphModule, site: untie.Site) -> Note:
    """On a linear whose weight could have been stored once, with the table, but for the rotation."""
    count = graph.get_tensor(gm, site.table).numel()
    reason = (
        f"it shares the table {site.table} in one format, and gets a weight of its own ({count:,} values) for the "
        "rotation: it can share a rotated table where it is all that an RMS norm feeds, and no input channel is scaled"
    )
    return Note(site.linear, reason, "nothing, if the bytes are there; or leave 'rotate' out of the recipe", minor=True)


def _one_format(gm: fx.GraphModule, table: str) -> bool:
    """Whether all that read a table have it in one format."""
    readers = [node for node in gm.graph.nodes if getattr(graph.weight_of(node), "target", None) == table]
    formats = [annotation.get(node).get("w") for node in readers]
    return isinstance(formats[0], Format) and all(fmt == formats[0] for fmt in formats)


def _impossible(gm: fx.GraphModule) -> list[Note] | None:
    """Why no residual stream could be rotated even if tables were untied and norms folded; None where one can be."""
    trial = graph.copy(gm)
    for site in untie.find(trial)[0]:
        untie.apply(trial, site)
    found, notes = streams.find(trial, folded=False)
    if any(stream.centred for stream in found):
        return None
    possible, reasons = centre.find(trial)
    if possible:
        return None
    missing = Note("residual stream", "no residual stream was found to rotate", "leave 'rotate' out of the recipe")
    return list(dict.fromkeys([*notes, *reasons])) or [missing]


def _applied(gm: fx.GraphModule, plan: Plan, found: Collection[Any]) -> list[Note]:
    """Apply sites; a note where a size has no Hadamard matrix."""
    notes: dict[int, Note] = {}
    for site in found:
        apply_site(gm, plan, site)
        block: int = getattr(site, "block", 1)
        if (order := rotation.random_order(block)) > 1:
            reason = f"no Hadamard matrix of order {block} is known here: a factor of order {order} is random"
            step = "nothing: the function is the same; rotation_block sets smaller blocks"
            notes[block] = Note("rotation", reason, step, minor=True)
    run.settle(gm)
    return list(notes.values())


def _block(gm: fx.GraphModule, plan: Plan) -> int | None:
    """How many channels a rotation mixes; None is all. In FP4 a group keeps its outliers to itself (MXFP4, NVFP4)."""
    asked = plan.recipe.rotation_block
    if asked != "auto":
        return asked
    formats = [
        fmt
        for node in gm.graph.nodes
        if node.op == "call_function" and sites.is_linear(node)
        for given in annotation.get(node).values()
        for fmt in annotation.each(given)
    ]
    groups = {fmt.group for fmt in formats if _is_fp4(fmt)}
    return groups.pop() if len(groups) == 1 else None


def _is_fp4(fmt: Format) -> bool:
    return fmt.type == "f4e2m1" and bool(fmt.group)
