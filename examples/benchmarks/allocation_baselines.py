"""What a planned mix is held against: ways to give formats to weights that need no scores, at most of so many bytes.

Each family is a list of candidates, filled up to the budget; the benchmark takes the best on the calibration text, so
that a baseline is the best of its kind. Names of weights are those of a Llama.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from qfx.allocation import assign
from qfx.analysis.units import Unit, by_weight, shape_of
from qfx.annotation import Formats, Outliers
from qfx.format import Format
from qfx.interop.gguf_types import more_bits
from qfx.live import segments

Assignment = dict[str, Format]  # unit name -> format
Name = TypeVar("Name")
KEPT = Format("f16")  # of columns apart
GROUPS = (16, 32, 64)
NEAR = 0.8  # candidates that use less of the budget before they are filled up are left out
MOST = 12  # candidates of one family


def affine(bits: int, group: int) -> Format:
    """Unsigned with zero points, scales in 16 bits; 8 bits are symmetric."""
    return Format.parse(f"{'i8' if bits > 6 else f'u{bits}'}/g{group}/f16")


UNIFORM = tuple(affine(b, g) for b in (2, 3, 4, 5, 6, 8) for g in GROUPS)


class Weights:
    """The units of a model, cut by heads, and the bytes of what an assignment stores."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit.name: unit for unit in units}
        self.of = by_weight(units)
        self.elements = sum(unit.elements for unit in units)
        self.layers = len({unit.layer for unit in units if unit.layer})
        self.order = sorted(self.of, key=lambda fqn: hashlib.sha256(fqn.encode()).digest())

    def shape(self, fqn: str) -> tuple[int, ...]:
        """Of the whole weight."""
        return shape_of(self.of[fqn])

    def formats(self, assignment: Mapping[str, Format]) -> dict[str, Formats]:
        """FQN -> the formats of its units, as annotations say them; one where all are equal."""
        return assign.formats_of(self.units.values(), assignment)

    def whole(self, choose: Callable[[str], Format]) -> Assignment:
        """One format for each weight, by its name."""
        return {unit.name: choose(unit.fqn) for unit in self.units.values()}

    def nbytes(self, assignment: Mapping[str, Format]) -> int:
        """As stored: codes, scales, zero points, padding of the segments of all weights."""
        return sum(self.stored(fqn, formats) for fqn, formats in self.formats(assignment).items())

    def stored(self, fqn: str, formats: Formats) -> int:
        """Bytes of one weight."""
        return segments.nbytes(formats, self.shape(fqn), fqn)

    def filled(self, assignment: Assignment, budget: int) -> Assignment:
        """With one more bit, or smaller groups, for weights in the order of a hash of their names while bytes last."""
        found, left = dict(assignment), budget - self.nbytes(assignment)
        for fqn in self.order:
            own = self.of[fqn]
            before = self.stored(fqn, self.formats(found)[fqn])
            for fmt in _richer(found[own[0].name]):
                more = self.stored(fqn, fmt) - before
                if 0 < more <= left:
                    found.update(dict.fromkeys((unit.name for unit in own), fmt))
                    left -= more
                    break
        return found


def _richer(fmt: Format) -> list[Format]:
    group = fmt.group or GROUPS[-1]
    more = {6: 8}.get(fmt.bits, fmt.bits + 1)
    wider = [affine(more, group)] if more <= 8 else []
    return wider + [affine(fmt.bits, g) for g in reversed(GROUPS) if g < group]


def _near(weights: Weights, found: Iterable[Assignment], budget: int) -> list[Assignment]:
    """The candidates that fit and use most of the budget, filled up."""
    sized = sorted(((weights.nbytes(a), i, a) for i, a in enumerate(found)), reverse=True)
    fitting = [(size, a) for size, _, a in sized if size <= budget]
    near = [a for size, a in fitting if size >= NEAR * budget] or [a for _, a in fitting[:1]]
    return [weights.filled(a, budget) for a in near[:MOST]]


def uniform(weights: Weights, budget: int) -> list[Assignment]:
    """One format for everything."""
    every = [weights.whole(lambda _, fmt=fmt: fmt) for fmt in UNIFORM]  # type: ignore[misc]
    return [a for a in every if weights.nbytes(a) <= budget]


def uniform_filled(weights: Weights, budget: int) -> list[Assignment]:
    """One format, and one bit more (or smaller groups) for weights drawn by a hash until the bytes are used."""
    return _near(weights, uniform(weights, budget), budget)


def by_type(weights: Weights, budget: int) -> list[Assignment]:
    """Attention and the table in at least as many bits as the MLP: a recipe by layer type."""
    bits = (2, 3, 4, 5, 6, 8)

    def recipe(attention: int, mlp: int, table: int, group: int) -> Assignment:
        def choose(fqn: str) -> Format:
            kind = attention if ".self_attn." in fqn else mlp if ".mlp." in fqn else table
            return affine(kind, group)

        return weights.whole(choose)

    found = [
        recipe(attention, mlp, table, group)
        for mlp, attention, table, group in itertools.product(bits, bits, bits, (32, 64))
        if attention >= mlp and table >= mlp and attention + table > 2 * mlp
    ]
    return _near(weights, found, budget)


def k_mix(weights: Weights, budget: int) -> list[Assignment]:
    """As llama.cpp's Q4_K_M: v and down in more bits in some layers, the output table (here the input's, too) in more
    everywhere. Two bits more as there, or one where the budget is small; the table has 6 or 8 bits, as many as v, or as
    the rest where there are no bytes for that."""

    def mix(base: int, lift: int, table: int, group: int) -> Assignment:
        def choose(fqn: str) -> Format:
            layer = re.search(r"\.(\d+)\.", fqn)
            if layer is None:
                return affine(table, group)
            better = fqn.endswith(("v_proj", "down_proj")) and more_bits(int(layer[1]), weights.layers)
            return affine(base + lift if better else base, group)

        return weights.whole(choose)

    found = [
        mix(base, lift, table, group)
        for base in (2, 3, 4, 5, 6)
        for lift in (1, 2)
        for table in sorted({base, base + lift, 6, 8})
        for group in (32, 64)
        if table >= base
    ]
    return _near(weights, found, budget)


def shuffled(weights: Weights, planned: Assignment, seed: int) -> Assignment:
    """The planned formats, drawn anew among the units of one shape: the same bytes."""
    generator = random.Random(seed)

    def drawn(names: Sequence[Name], _: Callable[[Name], float]) -> list[Name]:
        return generator.sample(names, len(names))

    return _exchanged(weights, planned, drawn)


def inverted(weights: Weights, planned: Assignment, losses: Mapping[str, float]) -> Assignment:
    """Among the units of one shape, who is predicted to lose most gets least. losses: of units in one format."""

    def loss(name: str) -> float:
        return sum(losses[unit.name] for unit in weights.of[name]) if name in weights.of else losses[name]

    def turned(names: Sequence[Name], size: Callable[[Name], float]) -> list[Name]:
        given = dict(zip(sorted(names, key=lambda name: loss(str(name))), sorted(names, key=size)[::-1], strict=True))
        return [given[name] for name in names]

    return _exchanged(weights, planned, turned)


def _exchanged(
    weights: Weights, planned: Assignment, order: Callable[[Sequence[Any], Callable[[Any], float]], list[Any]]
) -> Assignment:
    """Each unit with the format of another one. order: (names, bytes by name) -> whose formats they get.

    Units of rows take those of any unit of their shape. Columns of one format are stored together, so that what they
    take depends on who stands beside them: whole weights exchange their formats, then the columns within each.
    """

    def size(name: str) -> float:
        return weights.units[name].nbytes(planned[name])

    found: Assignment = {}
    alike: dict[object, list[str]] = defaultdict(list)
    columns: dict[object, list[str]] = defaultdict(list)
    for fqn, own in weights.of.items():
        if own[0].axis == 1:
            columns[len(own), own[0].shape].append(fqn)
        else:
            alike[own[0].shape].extend(unit.name for unit in own)
    for names in alike.values():
        found.update({name: planned[other] for name, other in zip(names, order(names, size), strict=True)})
    for fqns in columns.values():
        given = order(fqns, lambda fqn: sum(size(unit.name) for unit in weights.of[fqn]))
        for fqn, other in zip(fqns, given, strict=True):
            others = [unit.name for unit in weights.of[other]]
            sources = order(others, size)
            found.update({u.name: planned[source] for u, source in zip(weights.of[fqn], sources, strict=True)})
    return found


def outlier_columns(
    weights: Weights, budget: int, base: Format, model: nn.Module, energy: Mapping[str, Tensor]
) -> dict[str, Formats] | None:
    """`base` for everything, and the most driven columns of the linears in 16 bits, as many as the bytes allow.

    energy: FQN -> mean squares of the input channels. A column counts by these times its squared norm, per row. None
    where not even `base` fits.
    """
    ranked: list[tuple[float, str, int]] = []
    for fqn, squares in energy.items():
        weight = model.get_submodule(fqn).weight
        assert isinstance(weight, Tensor)
        score = squares * weight.detach().float().square().mean(0)
        ranked += [(float(value), fqn, column) for column, value in enumerate(score)]
    ranked.sort(reverse=True)

    def with_columns(count: int) -> dict[str, Formats]:
        kept: dict[str, list[int]] = defaultdict(list)
        for _, fqn, column in ranked[:count]:
            kept[fqn].append(column)
        return {fqn: Outliers(base, KEPT, tuple(sorted(kept[fqn]))) if fqn in kept else base for fqn in weights.of}

    def size(count: int) -> int:
        return sum(weights.stored(fqn, formats) for fqn, formats in with_columns(count).items())

    if size(0) > budget:
        return None
    low, high = 0, len(ranked)
    while low < high:  # the greatest number that fits; padding makes the bytes grow in steps, never fall by much
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return with_columns(low)
