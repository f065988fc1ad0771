"""Bits for keys and values of each head of a model's cache, under the bytes of a uniform one: predict, solve, refine.

    cache_bits=3    k=u3/g32/f16 v=u3/g32/f16 in every head
    ->
    model.layers.0.self_attn: k=[u4/g32/f16,u3/g32/f16] v=u2/g32/f16

Groups are those of the uniform format, whose scales cost the same at any number of bits: as many bytes are as many bits
on average. What a head loses is told by Quant-Fisher (`qfx.analysis.caches`) of the errors that the cache itself makes,
and assignments are then measured; what is measured is no worse than the uniform cache on the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from qfx.allocation.problem import Assignment, Choice, Problem
from qfx.allocation.refine import refine
from qfx.allocation.solve import solve
from qfx.analysis.attentions import find
from qfx.analysis.caches import Cache, CacheScores, caches
from qfx.analysis.gradients import gather
from qfx.analysis.losses import General
from qfx.analysis.measured import Measure, main_output, positions, some
from qfx.analysis.weights import Weights
from qfx.errors import Note, UnsupportedError, explain
from qfx.format import Format
from qfx.kv.formats import CacheFormat
from qfx.kv.plans import Cached, read
from qfx.names import is_within
from qfx.passes.calibrate import progress_bar
from qfx.plan import Plan

TOLD = "cache"  # in Plan.sensitivities
CANDIDATES = tuple(f"u{bits}/g32/f16" for bits in (2, 3, 4, 5, 6))
_PLAIN = (Format("f16"),)
_TOKENS = 1024  # of which bytes are counted; none of them left as it is
_SCORED, _MEASURED = 16384, 8192  # positions of the data
_REFINE = 48  # assignments that are measured


def allocate_caches(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, outputs: Sequence[str] = (),
    progress: bool = True,
) -> list[Note]:  # fmt: skip
    """Replace the formats of those caches of `plan` that a rule for the target "cache" gave theirs.

    gm: the prepared float graph. batches: its inputs. outputs: names of its outputs. A cache that a rule for its name
    gave a format keeps that. `plan.sensitivities["cache"]` tells bytes, what was predicted and measured, and each
    head's score. Returns notes about caches that stay uniform, as all do of texts too short for a cache to store a
    token in its formats. Raises UnsupportedError where no cache could have bits by heads.
    """
    bits = plan.recipe.cache_bits
    assert bits is not None
    own, notes = _units(gm, plan)
    if not own:
        reasons = "\n    ".join(map(str, notes)) or "no rule for 'cache' gives a cache of the model its format"
        raise UnsupportedError(
            explain("no cache can have bits by heads", found=reasons, next_step="leave cache_bits out")
        )
    formats = [Format.parse(text) for text in CANDIDATES]
    units = [cache for group in own.values() for cache in group]
    scores = _scores(gm, some(batches, _SCORED), outputs, units, formats)
    if not any(score for row in scores.values() for score in row.values()):
        uniform = _everywhere((cache.unit.name for cache in units), bits)
        _write(plan, own, uniform)
        return [*notes, *_unread(plan, own, next(iter(uniform.values())))]
    choices = {
        cache.unit.name: [
            Choice(cache.unit.name, fmt, _nbytes(cache, fmt), scores[cache.unit.name][str(fmt)]) for fmt in formats
        ]
        for cache in units
    }
    problem = Problem(choices)
    budget = math.floor(sum(_uniform(cache, bits) for cache in units) + 1e-6)
    chosen, told = _chosen(gm, problem, budget, some(batches, _MEASURED), outputs, units, bits, progress=progress)
    _write(plan, own, chosen)
    plan.sensitivities[TOLD] = {
        "bits": bits, "bytes": problem.value(chosen)[0], "budget": budget, **told,
        "units": {n: {"format": str(f), "score": scores[n][str(f)]} for n, f in chosen.items()},
    }  # fmt: skip
    return notes


def _chosen(
    gm: fx.GraphModule, problem: Problem, budget: int, batches: Sequence[Sequence[Any]], outputs: Sequence[str],
    units: Sequence[Cache], bits: float, *, progress: bool,
) -> tuple[Assignment, dict[str, Any]]:  # fmt: skip
    """The best assignment that was measured, and what is told of it."""
    measure = Measure(gm, batches, units=[], caches=units, outputs=outputs)
    solution = solve(problem, budget)
    with progress_bar(progress) as bar:
        task = bar.add_task("bits of the cache", total=_REFINE)
        found = refine(
            measure, problem, solution.assignment, budget, evaluations=_REFINE, advance=lambda: bar.advance(task)
        )
    uniform = _everywhere(problem.choices, bits)
    flat = measure.kld(uniform)
    assert found.after is not None
    chosen, loss = (found.assignment, found.after) if found.after <= flat else (uniform, flat)
    predicted = problem.value(chosen)[1]
    return chosen, {"predicted": predicted, "measured": loss, "uniform": flat, "what": measure.what}


def _scores(
    gm: fx.GraphModule, batches: Sequence[Sequence[Any]], outputs: Sequence[str], units: Sequence[Cache],
    formats: Sequence[Format],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """unit -> format -> Quant-Fisher of the model's own distribution."""
    scores = CacheScores(units, formats)
    program = scores.program(gm)
    name, main = main_output(gm, outputs)
    objective = General(0, name == "logits", [positions(program, batch) for batch in batches])
    found = gather(Weights(gm, []), program, batches, [main], objective, values=scores.hooks)
    return scores.scores(objective.factor, found.weight)


def _units(gm: fx.GraphModule, plan: Plan) -> tuple[dict[str, list[Cache]], list[Note]]:
    """Name of a cache -> its units, keys first; of those that a rule for the kind alone gave their format."""
    known = {attention.name: attention for attention in find(gm)[0]}
    own, notes = {}, []
    for name, one in _by_name(plan).items():
        if one.layer.cross or one.is_plain or plan.recipe.names_cache(name):
            continue
        found = [a for key, a in known.items() if is_within(key, name)]
        if len(found) == 1 and found[0].kv_heads == one.layer.heads:
            own[name] = caches(found, one.format)
        else:
            reason = f"its heads are not found in the graph: its cache has {one.format} in all of them"
            notes.append(Note(name, reason, "give it formats by a rule for its name"))
    return own, notes


def _by_name(plan: Plan) -> dict[str, Cached]:
    return {one.layer.fqn: one for one in read(plan.caches)}


def _nbytes(cache: Cache, fmt: Format) -> int:
    """Bytes of _TOKENS tokens of one head's keys or values."""
    (width,) = cache.unit.shape
    keys = cache.argument == 1
    own = CacheFormat((fmt,), _PLAIN) if keys else CacheFormat(_PLAIN, (fmt,))
    return int(own.nbytes(1, (width, 0) if keys else (0, width), _TOKENS))


def _uniform(cache: Cache, bits: float) -> float:
    """Bytes at this number of bits, between those of the whole numbers around it."""
    low, high = (_nbytes(cache, Format.parse(f"u{number}/g32/f16")) for number in (math.floor(bits), math.ceil(bits)))
    return low + (high - low) * (bits - math.floor(bits))


def _everywhere(names: Iterable[str], bits: float) -> Assignment:
    """One format for all, of no more bits."""
    return dict.fromkeys(names, Format.parse(f"u{math.floor(bits)}/g32/f16"))


def _unread(plan: Plan, own: Iterable[str], given: Format) -> list[Note]:
    """What is said of caches from whose codes the data's queries read no token."""
    known = _by_name(plan)
    least = max(fmt.sinks + fmt.residual + fmt.step for fmt in (known[name].format for name in own))
    reason = f"no query of the data comes so late that it reads the cache in few bits: it has {given} in all heads"
    return [Note(name, reason, f"give texts of more than {least} tokens, better many times as long") for name in own]


def _write(plan: Plan, own: Mapping[str, Sequence[Cache]], chosen: Assignment) -> None:
    for name, one in _by_name(plan).items():
        if name in own:
            keys, values = (
                tuple(chosen[cache.unit.name] for cache in own[name] if cache.argument == argument)
                for argument in (1, 2)
            )
            fmt = replace(one.format, keys=_short(keys), values=_short(values))
            plan.caches[name] = Cached(one.layer, fmt).to_json()


def _short(formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """One format where all are the same."""
    return formats[:1] if len(set(formats)) == 1 else formats
