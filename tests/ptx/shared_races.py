"""Races in shared memory: accesses of two warps, one of them a write, that nothing orders; what was not waited for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.clocks import FLYING, LANDED, Clocks
from tests.ptx.faults import FaultError
from tests.ptx.values import Array

_CHUNK = 16  # bytes: what products read at once
_UNITS = 64  # at most: warps of a program and barriers in memory


class SharedRaces:
    """Of each cell of `grain` bytes the last write and reads, by the warps' clocks.

    written: the clock, or from LANDED on the phase of a barrier. where: the line in the PTX and the warp or barrier.
    read_at: [cells, warps] clocks. taken: [chunks, groups of 4 warps] clocks of products' reads.

    Most accesses are of memory that no one has touched since the last barrier of all: `stored` and `loaded` tell of
    each chunk the epoch, between two of those, of the last write and read; reads of an epoch are but listed until a
    write needs them.

    copies_fenced: whether products are refused what cp.async wrote without a fence, as they are what warps store.
    copies: the lines of those.
    """

    def __init__(self, clocks: Clocks, size: int, total: int, grain: int, line: Callable[[], int]) -> None:
        self.clocks, self.size, self.grain, self.line = clocks, size, grain, line
        self.written = np.zeros(total // grain, np.int32)
        self.where = np.zeros(total // grain, np.int32)
        self.read_at = np.zeros((total // grain, clocks.each), np.int32)
        self.taken = np.zeros((total // _CHUNK, -(-clocks.each // 4)), np.int32)
        self.has_taken = False
        self.copies_fenced = True
        self.copies = set[int]()
        self.epoch = 1
        self.stored, self.loaded = np.zeros(total // _CHUNK, np.int32), np.zeros(total // _CHUNK, np.int32)
        self.listed: list[tuple[Array, int, Array, Array]] = []

    def meet(self) -> None:
        """All warps of all programs have waited for each other: what they did until now is ordered."""
        self.epoch += 1
        self.listed = []

    def reads(self, at: Array, size: int, rows: Array) -> None:
        """Threads of warps `rows` read `size` bytes at offsets."""
        chunks = at >> 4
        fresh = self.stored[chunks] >= self.epoch
        if fresh.any():
            cells, every = self._cells(at[fresh], size, rows[fresh])
            late = self.written[cells] > self.clocks.floor[every]
            if late.any():
                self._refuse_unseen(cells[late], every[late], "reads")
        self.loaded[chunks] = self.epoch
        self.listed.append((at, size, rows, self.clocks.now))

    def writes(self, at: Array, size: int, rows: Array, *, flying: bool = False) -> None:
        """The same for writes; flying: by a copy that is not there before it is waited for."""
        chunks = at >> 4
        if self.has_taken:
            self._refuse_taken(at, rows)
        cells, every = self._cells(at, size, rows)
        before = self.stored[chunks]
        if (before >= self.epoch).any():
            late = self.written[cells] > self.clocks.floor[every]
            if late.any():
                self._refuse_unseen(cells[late], every[late], "overwrites")
        if (self.loaded[chunks] >= self.epoch).any():
            self._refuse_read(cells, every)
        beside = size < _CHUNK and (before == FLYING)  # other bytes of the chunk may be in flight
        self.stored[chunks] = FLYING if flying else np.where(beside, FLYING, self.epoch)
        self.written[cells] = FLYING if flying else self.clocks.now[every]
        self.where[cells] = self.line() * _UNITS + self.clocks.own[every]
        if flying:
            self.copies.add(self.line())

    def landed(self, at: Array, size: int, rows: Array) -> None:
        """Copies of the warps themselves have been waited for by them."""
        cells, rows = self._cells(at, size, rows)
        self.written[cells] = self.clocks.now[rows]
        flying = self.written.reshape(-1, _CHUNK // self.grain)[at >> 4].max(1) == FLYING
        self.stored[at >> 4] = np.where(flying, FLYING, self.epoch)

    def boxed(self, at: Array, row: int, *, unit: int, phase: int | None = None) -> None:
        """A copy by a descriptor to chunks is asked for by a warp or, with a phase of barrier `unit`, is there."""
        unit += self.clocks.each
        cells, rows = self._cells(at, _CHUNK, np.full(len(at), row))
        if phase is not None:
            self.written[cells] = LANDED + phase
            return
        self.writes(at, _CHUNK, rows[: len(at)], flying=True)
        self.where[cells] = self.line() * _UNITS + unit

    def products_read(self, chunks: Array, rows: Array) -> None:
        """Products of four warps from `rows` on read chunks (both [n]), and are not waited for."""
        cells = (chunks[:, None] * (_CHUNK // self.grain) + np.arange(_CHUNK // self.grain)).reshape(-1)
        every = np.repeat(rows, _CHUNK // self.grain)
        floor = np.minimum(self.clocks.floor, self.clocks.fenced_floor).reshape(-1, 4).min(1)
        late = self.written[cells] > floor[every // 4]
        for warp in range(4 if late.any() else 0):
            self._refuse_unseen(cells[late], every[late] + warp, "multiplies")
            self._refuse_unfenced(cells[late], every[late] + warp)
        self.has_taken = True
        self.taken[chunks, self.clocks.own[rows] // 4] = FLYING

    def products_done(self, rows: Array, chunks: Array) -> None:
        """Products of four warps from `rows` on have been waited for."""
        self.taken[chunks, self.clocks.own[rows] // 4] = self.clocks.now.reshape(-1, 4).max(1)[rows // 4]

    def products_still(self, rows: Array, chunks: Array) -> None:
        """Of those that read the same chunks some have not been."""
        self.taken[chunks, self.clocks.own[rows] // 4] = FLYING

    def _cells(self, at: Array, size: int, rows: Array) -> tuple[Array, Array]:
        count = size // self.grain
        if count == 1:
            return at // self.grain, rows
        cells: Array = (at // self.grain)[:, None] + np.arange(count)
        return cells.reshape(-1), np.repeat(rows, count)

    def _refuse_unseen(self, cells: Array, rows: Array, does: str) -> None:
        """Raise FaultError where a write is not one that the warp is ordered after."""
        stamps, unit = self.written[cells], self.where[cells] % _UNITS
        known = self.clocks.seen[rows, unit]
        lost = np.where(stamps >= LANDED, stamps - LANDED, stamps) > known
        if not lost.any():
            return
        i = int(lost.argmax())
        by, line = int(unit[i]), int(self.where[cells[i]]) // _UNITS
        flying = stamps[i] >= LANDED
        lacks = "no barrier between" if not flying else "no wait for that copy"
        if by >= self.clocks.each:
            who, lacks = "a copy by a descriptor", "no wait at its barrier"
        else:
            who = f"a copy of warp {by}" if flying else f"warp {by}"
        raise FaultError(f"{self._who(rows[i])} {does} {self._place(cells[i])} that {who} wrote (line {line}): {lacks}")

    def _refuse_unfenced(self, cells: Array, rows: Array) -> None:
        stamps, unit = self.written[cells], self.where[cells] % _UNITS
        lost = (stamps > self.clocks.fenced[rows, unit]) & (unit < self.clocks.each)
        if not self.copies_fenced:
            lost &= ~np.isin(self.where[cells] // _UNITS, list(self.copies))
        if lost.any():
            i = int(lost.argmax())
            raise FaultError(
                f"a product of {self._who(rows[i])} reads {self._place(cells[i])} that warp {int(unit[i])} wrote "
                f"(line {int(self.where[cells[i]]) // _UNITS}): no fence.proxy.async between"
            )

    def _refuse_read(self, cells: Array, rows: Array) -> None:
        """Raise FaultError where another warp may still read what is written now."""
        for at, size, readers, now in self.listed:
            read, every = self._cells(at, size, readers)
            self.read_at[read, self.clocks.own[every]] = now[every]
        self.listed = []
        earlier = self.read_at[cells]
        if not (earlier > self.clocks.floor[rows][:, None]).any():
            return
        lost = earlier > self.clocks.seen[rows, : self.clocks.each]
        if lost.any():
            i, by = divmod(int(lost.argmax()), self.clocks.each)
            raise FaultError(
                f"{self._who(rows[i])} overwrites {self._place(cells[i])} that warp {by} has read: no barrier between"
            )

    def _refuse_taken(self, at: Array, rows: Array) -> None:
        """The same of products."""
        earlier = self.taken[at // _CHUNK]
        if not (earlier > self.clocks.floor[rows][:, None]).any():
            return
        for group in range(earlier.shape[1]):
            members = self.clocks.seen[rows, 4 * group : 4 * group + 4]
            lost = earlier[:, group] > members.min(1)
            if lost.any():
                i = int(lost.argmax())
                lacks = "no wgmma.wait_group" if earlier[i, group] == FLYING else "no barrier after its wait"
                raise FaultError(
                    f"{self._who(rows[i])} overwrites {self._place(at[i] // self.grain)} that a product of warps "
                    f"{4 * group} to {4 * group + 3} reads: {lacks}"
                )

    def _who(self, row: int) -> str:
        return f"warp {int(row) % self.clocks.each}"

    def _place(self, cell: int) -> str:
        return f"shared address {int(cell) * self.grain % self.size:#x}"
