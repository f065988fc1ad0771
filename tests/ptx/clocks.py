"""Who is ordered after whom: up to which step of the other warps each warp knows, by barriers, fences and waits."""

from __future__ import annotations

import numpy as np

from tests.ptx.values import Array

OWN = 2**30 - 2  # above every clock: a warp is ordered after itself
LANDED = 2**30  # and above: the phase of a barrier in memory at which a copy was there
FLYING = 2**31 - 1  # above all: neither waited for by anyone


class Clocks:
    """Vector clocks of warps.

    now: the clock of each warp, which goes on whenever others may learn of it. seen: [warps, units] up to which clock
    of a warp of its program it is ordered after that, and after which phases of barriers in memory. fenced: up to which
    clock the asynchronous proxy sees what those wrote, too. floor: what it has seen of the warp of which it saw least.
    """

    def __init__(self, warps: int, each: int, phases: int) -> None:
        self.each = each
        self.row = np.arange(warps)
        self.own = (self.row % each).astype(np.int32)
        self.now = np.ones(warps, np.int32)
        self.seen = np.zeros((warps, each + phases), np.int32)
        self.fenced = np.zeros((warps, each + phases), np.int32)
        self.far = np.zeros((warps, 0), np.int32)  # what is known of other programs' warps, see GlobalRaces
        self.seen[self.row, self.own] = OWN
        self.floor, self.fenced_floor = np.zeros(warps, np.int32), np.zeros(warps, np.int32)
        if each == 1:
            self._settle(self.row)

    def meet(self, rows: Array) -> None:
        """[groups, warps] warps of one program that wait for each other at a barrier."""
        members = self.own[rows]
        top = self.now[rows].max(1, keepdims=True)
        for table in (self.seen, self.fenced):
            known = table[rows].max(1)
            if table is self.seen:
                np.put_along_axis(known, members, np.broadcast_to(top, members.shape), 1)
            table[rows] = known[:, None]
        if self.far.shape[1]:
            self.far[rows] = self.far[rows].max(1)[:, None]
        self.seen[rows, members] = OWN
        self._tick(rows)
        self.now[rows] = top + 1
        self._settle(rows)

    def fence(self, rows: Array) -> None:
        """From now on the asynchronous proxy sees what the warps, and those that they are ordered after, wrote."""
        self.fenced[rows] = np.maximum(self.fenced[rows], self._told(rows))
        self._tick(rows)
        self._settle(rows)

    def release(self, row: int) -> Array:
        """What a warp tells whoever waits: its seen and fenced clocks, [2, units]."""
        told = np.stack([self._told(np.asarray([row]))[0], self.fenced[row]])
        self._tick(np.asarray([row]))
        return told

    def acquire(self, rows: Array, told: Array) -> None:
        """Warps that have waited learn of what was told."""
        self.seen[rows] = np.maximum(self.seen[rows], told[0])
        self.fenced[rows] = np.maximum(self.fenced[rows], told[1])
        self._settle(rows)

    def _tick(self, rows: Array) -> None:
        self.now = self.now.copy()  # whoever holds the earlier one holds the clocks of then
        self.now[rows] += 1

    def _told(self, rows: Array) -> Array:
        known: Array = self.seen[rows]
        known[np.arange(len(rows)), self.own[rows]] = self.now[rows]
        return known

    def _settle(self, rows: Array) -> None:
        self.floor[rows] = self.seen[rows][..., : self.each].min(-1)
        self.fenced_floor[rows] = self.fenced[rows][..., : self.each].min(-1)
