"""Rows of a report whose nodes differ in numbers of their names alone, as one: `model.layers.0-5.mlp.up_proj`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from qfx.reporting.rows import Row


@dataclass(frozen=True)
class Folded:
    """name: of one node, or of several with the numbers in which they differ as ranges. rows: of all of them."""

    name: str
    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them as they are stored."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def sqnr_db(self) -> float | None:
        """The least SQNR that was measured of them, in dB."""
        return min((row.sqnr_db for row in self.rows if row.sqnr_db is not None), default=None)


def fold(rows: Iterable[Row], same: Callable[[Row], Hashable]) -> list[Folded]:
    """Rows of which `same` is the same, and the names but for their numbers, are one, at the place of the first.

    The ranges name the nodes of the group and no others: nodes of layers 0-3 and experts 0-7 are folded where all 32
    are there, else each stands by itself.
    """
    groups: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        words = tuple("" if part.isdecimal() else part for part in row.node.split("."))
        groups.setdefault((words, same(row)), []).append(row)
    found: list[Folded] = []
    for group in groups.values():
        name = _name([row.node for row in group])
        found += [Folded(row.node, (row,)) for row in group] if name is None else [Folded(name, tuple(group))]
    return found


def _name(nodes: Sequence[str]) -> str | None:
    """One name for all of them; None where the ranges would name others, too."""
    columns = [list(dict.fromkeys(parts)) for parts in zip(*(node.split(".") for node in nodes), strict=True)]
    if math.prod(map(len, columns)) != len(nodes):
        return None
    return ".".join(part[0] if len(part) == 1 else _ranges(sorted(map(int, part))) for part in columns)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
