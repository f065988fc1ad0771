"""Races in global memory: accesses of two programs, or of two warps of one, a write among them, that nothing orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.clocks import Clocks
from tests.ptx.faults import FaultError
from tests.ptx.readers import Readers
from tests.ptx.values import Array

_MOST_LISTED = 1 << 23  # bytes of reads of a tensor that are kept before they are entered


class Region:
    """The memory of a tensor, in cells of `grain` bytes. What no one stores to has none: reads are but listed."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start - start % 16, end
        self.listed: list[tuple[Array, int, Array, Array, bool]] = []
        self.bytes = 0
        self.open = False

    def begin(self, grain: int, each: int, keep: bool) -> None:
        """From now on each access is held against the earlier ones."""
        count = -(-(self.end - self.start) // 16) * (16 // grain)
        self.grain, self.open = grain, True
        self.writer = np.full(count, -1, np.int32)
        self.written, self.line = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.plain, self.strong = Readers(count, each, keep), Readers(count, each, keep)
        for at, size, warps, clocks, strong in self.listed:
            cells, expand = self.cells(at, size)
            (self.strong if strong else self.plain).enter(cells, expand(warps), expand(clocks))
        self.listed = []

    def cells(self, at: Array, size: int) -> tuple[Array, Callable[[Array], Array]]:
        """The cells of accesses at offsets, and a function that gives what is known of each access to its cells."""
        first = (at - self.start) // self.grain
        count = size // self.grain
        if count <= 1:
            return first, lambda x: x
        return (first[:, None] + np.arange(count)).reshape(-1), lambda x: np.repeat(x, count)


class GlobalRaces:
    """The accesses of one launch. far: [warps, warps of the launch] what warps know of those of other programs."""

    def __init__(self, spans: list[tuple[int, int]], content: Array) -> None:
        self.regions = [Region(*span) for span in sorted(spans)]
        self.starts = np.asarray([r.start for r in self.regions])
        self.content = content
        self.told: dict[int, Array] = {}
        self.atomic_lines: set[int] = set()

    def enter(self, clocks: Clocks, warps: Array, grain: int, line: Callable[[], int], total: int) -> None:
        """Programs begin whose warps are `warps` of the launch's `total`. total: 0 where nothing orders programs."""
        self.clocks, self.warps, self.grain, self.line, self.total = clocks, warps, grain, line, total
        clocks.far = np.zeros((len(warps), total), np.int32)

    def reads(self, at: Array, size: int, rows: Array, *, strong: bool = False) -> None:
        """Threads of warps `rows` read `size` bytes at offsets. strong: atomic operations may go on meanwhile."""
        for region, which in self._regions(at):
            self._read(region, at[which], size, rows[which], strong)

    def _read(self, region: Region, at: Array, size: int, rows: Array, strong: bool) -> None:
        if not region.open:
            region.listed.append((at, size, self.warps[rows], self.clocks.now[rows], strong))
            region.bytes += at.nbytes * 2
            if region.bytes > _MOST_LISTED:
                region.begin(self.grain, self.clocks.each, self.total > 0)
            return
        cells, expand = region.cells(at, size)
        rows = expand(rows)
        (late,) = np.nonzero((region.writer[cells] >= 0) & (region.writer[cells] != self.warps[rows]))
        if len(late):
            self._refuse(region, cells[late], rows[late], "reads", strong=strong)
        (region.strong if strong else region.plain).enter(cells, self.warps[rows], self.clocks.now[rows])

    def writes(self, at: Array, words: Array, rows: Array, *, atomic: bool = False) -> None:
        """Threads of warps `rows` are about to store [threads, count] words at offsets."""
        for region, which in self._regions(at):
            if not region.open:
                region.begin(self.grain, self.clocks.each, self.total > 0)
            self._write(region, at[which], words[which], rows[which], atomic)

    def _write(self, region: Region, at: Array, words: Array, rows: Array, atomic: bool) -> None:
        size = words.shape[1] * words.itemsize
        cells, expand = region.cells(at, size)
        rows, warps = expand(rows), expand(self.warps[rows])
        other = (region.writer[cells] >= 0) & (region.writer[cells] != warps)
        if other.any():
            new = np.ascontiguousarray(words).view(np.uint8).reshape(-1, region.grain)
            first = region.start // region.grain
            same = (self.content.reshape(-1, region.grain)[cells + first] == new).all(1)
            (late,) = np.nonzero(other & ~same) if not atomic else np.nonzero(other)
            self._refuse(region, cells[late], rows[late], "overwrites", strong=atomic)

        def knows(which: Array, others: Array, clocks: Array) -> Array:
            return self._knows(rows[which], others, clocks)

        for readers in (region.plain,) if atomic else (region.plain, region.strong):
            lost, by = readers.unordered(cells, warps, knows)
            if lost.any():
                i = int(lost.argmax())
                who = self._who(int(by[i])) if by[i] >= 0 else "another program"
                raise FaultError(
                    f"{self._who(int(warps[i]))} overwrites {self._place(region, cells[i])} that {who} reads: "
                    "nothing orders the two"
                )
        region.writer[cells], region.written[cells] = warps, self.clocks.now[rows]
        region.line[cells] = self.line()
        if atomic:
            self.atomic_lines.add(self.line())

    def meet_at(self, address: int, row: int) -> None:
        """A warp has done an atomic operation that tells and learns (`acq_rel`) at an address."""
        clocks, warp = self.clocks, int(self.warps[row])
        told = np.maximum(self.told.get(address, 0), clocks.far[row])
        clocks.far[row] = told
        first = warp - warp % clocks.each
        own = clocks.release(row)[0, : clocks.each]
        self.told[address] = told.copy()
        self.told[address][first : first + clocks.each] = own

    def _regions(self, at: Array) -> list[tuple[Region, Any]]:
        """The tensors of accesses, and which of these are in each."""
        if not len(at):
            return []
        low = int(np.searchsorted(self.starts, at.min(), "right")) - 1
        if at.max() < self.regions[low].end:
            return [(self.regions[low], slice(None))]
        of = np.searchsorted(self.starts, at, "right") - 1
        return [(self.regions[i], of == i) for i in np.unique(of)]

    def _knows(self, rows: Array, warps: Array, clocks: Array) -> Array:
        """Whether warps `rows` are ordered after clocks of warps of the launch."""
        near = self.warps[rows] // self.clocks.each == warps // self.clocks.each
        known = np.where(near, self.clocks.seen[rows, warps % self.clocks.each], 0)
        if self.total:
            known = np.where(near, known, self.clocks.far[rows, warps])
        return np.asarray(known >= clocks)

    def _refuse(self, region: Region, cells: Array, rows: Array, does: str, *, strong: bool) -> None:
        """Raise FaultError where a write is not one that the warp is ordered after. strong: except atomic ones."""
        lost = ~self._knows(rows, region.writer[cells], region.written[cells])
        if strong and self.atomic_lines:
            lost &= ~np.isin(region.line[cells], list(self.atomic_lines))
        if lost.any():
            i = int(lost.argmax())
            raise FaultError(
                f"{self._who(int(self.warps[rows[i]]))} {does} {self._place(region, cells[i])} that "
                f"{self._who(int(region.writer[cells[i]]))} wrote (line {region.line[cells[i]]}): "
                "nothing orders the two"
            )

    def _who(self, warp: int) -> str:
        return f"warp {warp % self.clocks.each} of program {warp // self.clocks.each}"

    def _place(self, region: Region, cell: int) -> str:
        return f"global offset {int(cell) * region.grain} of a tensor"
