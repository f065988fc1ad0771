"""Who has read each cell of a tensor's memory, so that a write can be held against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.values import Array

_NOBODY, _MANY, _WARPS = -1, -2, -3  # in place of a warp's number; _WARPS - p: several warps of program p


class Readers:
    """reader: of each cell a warp of the launch or one of the above. at: the highest of the readers' clocks.

    listed: all reads, for cells whose readers are of several programs; kept where programs may be ordered.
    """

    def __init__(self, cells: int, each: int, keep: bool) -> None:
        self.each, self.keep = each, keep
        self.reader = np.full(cells, _NOBODY, np.int32)
        self.at = np.zeros(cells, np.int32)
        self.listed: list[tuple[Array, Array, Array]] = []

    def enter(self, cells: Array, warps: Array, clocks: Array) -> None:
        """Warps have read cells at clocks of theirs."""
        if self.keep:
            self.listed.append((cells, warps, clocks))
        before = self.reader[cells]
        self.reader[cells] = np.where(before == _NOBODY, warps, self._joined(before, warps))
        after = self.reader[cells]
        program = warps // self.each
        twice = self._joined(after, warps) != after  # others read the same in this very instruction
        if twice.any():
            joined = self._joined(after, warps)
            for which in (twice & (joined != _MANY), twice & (joined == _MANY)):
                self.reader[cells[which]] = joined[which]
            several = twice & (self.reader[cells] < 0) & (self.reader[cells] != _WARPS - program)
            self.reader[cells[several]] = _MANY
        np.maximum.at(self.at, cells, clocks)

    def unordered(
        self, cells: Array, warps: Array, knows: Callable[[Array, Array, Array], Array]
    ) -> tuple[Array, Array]:
        """(which of the cells were read by someone whom `warps` are not ordered after, a reader of each, or -1).

        knows(which, warps, clocks): whether the writers of `cells[which]` are ordered after clocks of warps.
        """
        found, by = np.zeros(len(cells), bool), np.full(len(cells), -1)
        reader = self.reader[cells]
        (which,) = np.nonzero((reader >= 0) & (reader != warps))
        found[which] = ~knows(which, reader[which], self.at[cells[which]])
        by[which] = reader[which]
        (which,) = np.nonzero(reader <= _WARPS)
        for warp in range(self.each if len(which) else 0):
            other = (_WARPS - reader[which]) * self.each + warp
            lost = ~knows(which, other, self.at[cells[which]]) & (other != warps[which])
            found[which] |= lost
            by[which[lost]] = other[lost]
        (which,) = np.nonzero(reader == _MANY)
        if len(which):
            self._of_many(cells, which, warps, knows, found, by)
        return found, by

    def _of_many(
        self,
        cells: Array,
        which: Array,
        warps: Array,
        knows: Callable[[Array, Array, Array], Array],
        found: Array,
        by: Array,
    ) -> None:
        if not self.keep:
            found[which] = True
            return
        order = which[np.argsort(cells[which], kind="stable")]
        sought = cells[order]
        for read, others, clocks in self.listed:
            place = np.minimum(np.searchsorted(sought, read), len(sought) - 1)
            hit = sought[place] == read
            writer = order[place[hit]]
            lost = ~knows(writer, others[hit], clocks[hit]) & (others[hit] != warps[writer])
            found[writer[lost]] = True
            by[writer[lost]] = others[hit][lost]

    def _joined(self, reader: Array, warps: Array) -> Array:
        """Readers with one more each."""
        program = warps // self.each
        same = np.where(reader >= 0, reader // self.each == program, reader == _WARPS - program)
        return np.where(reader == warps, warps, np.where(same, _WARPS - program, _MANY)).astype(np.int32)
