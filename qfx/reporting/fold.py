"""Rows of a report whose nodes differ in numbers of their names alone, as one: `model.layers.0-5.mlp.up_proj`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from qfx.reporting.rows import Row

_Found = tuple[tuple[str, ...], list[int]]  # the parts of a name, the indices of those it stands for


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
    """Rows of which `same` is the same, and the names but for their numbers, are one, at the place of the first."""
    groups: dict[Hashable, list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(same(row), []).append((place, row))
    found: list[tuple[int, Folded]] = []
    for group in groups.values():
        for name, members in ranges([row.node for _, row in group]):
            found.append((group[members[0]][0], Folded(name, tuple(group[i][1] for i in members))))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def ranges(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Names with the numbers in which they differ as ranges, each with the indices of those it stands for, and for no
    others: where expert 7 of layer 3 is missing, layers 0-2 and layer 3 stand apart."""
    found: list[_Found] = [(tuple(name.split(".")), [i]) for i, name in enumerate(names)]
    for column in reversed(range(max((len(parts) for parts, _ in found), default=0))):
        alike: dict[tuple[str | None, ...], list[_Found]] = {}
        for parts, members in found:
            numbered = column < len(parts) and parts[column].isdecimal()
            key = (*parts[:column], None, *parts[column + 1 :]) if numbered else parts
            alike.setdefault(key, []).append((parts, members))
        found = [one for group in alike.values() for one in _merged(group, column)]
    return [(".".join(parts), members) for parts, members in found]


def _merged(group: list[_Found], column: int) -> list[_Found]:
    """Names that differ in one number as one; as they are where a number stands there twice."""
    numbers = {parts[column : column + 1] for parts, _ in group}
    if len(group) == 1 or len(numbers) != len(group):
        return group
    parts, members = group[0][0], [i for _, own in group for i in own]
    return [((*parts[:column], _ranges(sorted(int(number) for (number,) in numbers)), *parts[column + 1 :]), members)]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
