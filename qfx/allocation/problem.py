"""What is to be chosen: formats of units, with their bytes and predicted loss, and what they have to agree on.

Groups are units that get one format together: those of a tie, every other unit by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from qfx.analysis.units import Unit
from qfx.errors import explain
from qfx.format import Format

Assignment = dict[str, Format]  # unit -> format


class Measured(Protocol):
    """A `Measure`, or a `TaskMeasure`: what tells the loss of an assignment."""

    what: str

    @property
    def evaluations(self) -> int: ...

    def kld(self, assignment: Assignment) -> float: ...

    def anchor(self, assignment: Assignment) -> None: ...


@dataclass(frozen=True)
class Choice:
    """A format that a unit may have. bytes: in storage, scales and padding counted. score: predicted loss."""

    unit: str
    format: Format
    bytes: int
    score: float


@dataclass(frozen=True)
class Tile:
    """Of the units of a weight, the number that has any one format is a multiple of `multiple`."""

    units: tuple[str, ...]
    multiple: int


@dataclass(frozen=True)
class Problem:
    """Choices by unit; what binds units together.

    ties: units that have one format. classes: most different numbers of bits in a layer; None: any. layers: unit ->
    layer, for `classes`; units of the layer "" are free. tiles: see `Tile`. Raises ValueError for a unit without a
    choice, choices that are no numbers, unknown units in ties, and ties without a common format.
    """

    choices: Mapping[str, Sequence[Choice]]
    ties: Sequence[Sequence[str]] = ()
    classes: int | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    tiles: Sequence[Tile] = ()

    def __post_init__(self) -> None:
        for unit, choices in self.choices.items():
            if not choices:
                raise ValueError(f"unit {unit!r} has no format to choose from")
            for choice in choices:
                if not np.isfinite(choice.score) or choice.bytes < 0:
                    what = f"{choice.score} and {choice.bytes} bytes"
                    raise ValueError(f"format '{choice.format}' of unit {unit!r} has the score {what}")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes is the most numbers of bits in a layer, 1 or more, found {self.classes}")
        bound = [name for group in (*self.ties, *(tile.units for tile in self.tiles)) for name in group]
        if unknown := next((name for name in bound if name not in self.choices), None):
            raise ValueError(f"there is no unit {unknown!r} to be tied")

    @cached_property
    def groups(self) -> list[Group]:
        """Units that get one format together, with the choices that all of them have, in the order of the units."""
        above = {name: name for name in self.choices}

        def top(name: str) -> str:
            while above[name] != name:
                above[name] = above[above[name]]
                name = above[name]
            return name

        for tie in self.ties:
            for name in tie[1:]:
                above[top(name)] = top(tie[0])
        members: dict[str, list[str]] = {}
        for name in self.choices:
            members.setdefault(top(name), []).append(name)
        return [self._group(tuple(names)) for names in members.values()]

    @property
    def least(self) -> int:
        """The fewest bytes: the smallest choice of every group."""
        return sum(int(group.bytes.min()) for group in self.groups)

    def _group(self, names: tuple[str, ...]) -> Group:
        of = [{choice.format: choice for choice in self.choices[name]} for name in names]
        common = [fmt for fmt in of[0] if all(fmt in own for own in of)]
        if not common:
            formats = "; ".join(f"{name}: {', '.join(map(str, own))}" for name, own in zip(names, of, strict=True))
            raise ValueError(
                explain("units that are tied have no format in common", expected="one that all may have", found=formats)
            )
        size = [sum(own[fmt].bytes for own in of) for fmt in common]
        score = [sum(own[fmt].score for own in of) for fmt in common]
        layers = {self.layers.get(name, "") for name in names}
        return Group(names, tuple(common), np.array(size), np.array(score), layers.pop() if len(layers) == 1 else "")

    def value(self, assignment: Mapping[str, Format]) -> tuple[int, float]:
        """(bytes, sum of scores) of an assignment. KeyError where a unit or its format is not of this problem."""
        chosen = [{c.format: c for c in choices}[assignment[name]] for name, choices in self.choices.items()]
        return sum(choice.bytes for choice in chosen), sum(choice.score for choice in chosen)

    def violations(self, assignment: Mapping[str, Format]) -> list[str]:
        """What an assignment does not keep, in words; empty where it is fine."""
        found = [
            f"{', '.join(tie)} are tied and differ" for tie in self.ties if len({assignment[name] for name in tie}) > 1
        ]
        for layer in dict.fromkeys(self.layers.values()) if self.classes is not None else ():
            own = [n for n in self.choices if self.layers.get(n) == layer] if layer else []
            if len(bits := {assignment[name].bits for name in own}) > (self.classes or 0):
                found.append(f"{layer} has {len(bits)} numbers of bits, {self.classes} are allowed")
        for tile in self.tiles:
            for fmt in dict.fromkeys(assignment[name] for name in tile.units):
                count = sum(assignment[name] == fmt for name in tile.units)
                if count % tile.multiple:
                    found.append(f"{count} units of {tile.units[0]}, ... are {fmt}: no multiple of {tile.multiple}")
        return found


@dataclass(frozen=True)
class Group:
    """Units of one format. formats; bytes, int [F], and score, f64 [F], of all of them together, by format."""

    units: tuple[str, ...]
    formats: tuple[Format, ...]
    bytes: np.ndarray
    score: np.ndarray
    layer: str = ""

    def only(self, keep: np.ndarray) -> Group:
        """With some of its choices: bool [F]."""
        formats = tuple(fmt for fmt, kept in zip(self.formats, keep, strict=True) if kept)
        return Group(self.units, formats, self.bytes[keep], self.score[keep], self.layer)


def ties_of(units: Iterable[Unit], kinds: Iterable[str]) -> list[tuple[str, ...]]:
    """Ties between the units of each attention.

    kinds: "qkv" ties all rows of q, k and v (one fused kernel of one format); "groups" ties the Q rows, and the O
    columns, of the query heads that share a KV head. Raises ValueError for other kinds.
    """
    wanted = set(kinds)
    if bad := wanted - {"qkv", "groups"}:
        raise ValueError(f"ties are 'qkv' and 'groups', found {bad.pop()!r}")
    heads: dict[str, dict[str, list[Unit]]] = {}
    for unit in units:
        if unit.attention is not None and unit.head is not None:
            heads.setdefault(unit.attention, {}).setdefault(unit.kind, []).append(unit)
    found: list[tuple[str, ...]] = []
    for roles in heads.values():
        if "qkv" in wanted:
            found.append(tuple(unit.name for role in "qkv" for unit in roles.get(role, ())))
        kv = max((len(roles.get(role, ())) for role in "kv"), default=0)
        for role in "qo" if "groups" in wanted and kv else "":
            own = sorted(roles.get(role, ()), key=lambda unit: unit.head or 0)
            shared = len(own) // kv if kv else 0
            found += [tuple(u.name for u in own[at : at + shared]) for at in range(0, len(own), shared or 1)]
    return [tie for tie in found if len(tie) > 1]
