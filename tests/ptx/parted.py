"""Threads of one warp that have parted: nothing orders their accesses before `bar.warp.sync`, or a barrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import FaultError
from tests.ptx.values import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Machine


class Parted:
    """Accesses of shared memory by parts of warps since these last waited for each other: (lanes, offsets, stores)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.since: list[tuple[Array, Array, bool]] = []
        self.mask: Array | None = None  # the last one, and the lanes whose warps it parts
        self.split: Array | None = None

    def _split(self) -> Array | None:
        mask = self.machine.mask
        if mask is not self.mask:
            self.mask, self.split = mask, None
            whole = np.ones((1, 32), bool) if mask is None else mask.reshape(-1, 32)
            if (found := whole.any(1) & ~whole.all(1)).any():
                self.split = found.repeat(32)
        return self.split

    def access(self, at: Array, size: int, *, stores: bool) -> None:
        """The active threads access `size` bytes at offsets."""
        split = self._split()
        if split is None and not self.since:
            return
        lanes = np.arange(self.machine.lanes) if self.machine.active is None else np.nonzero(self.machine.active)[0]
        if len(lanes) != len(at):
            return  # matrices of whole warps
        touched = at[:, None] + np.arange(size)
        for others, before, stored in self.since:
            if stored or stores:
                self._refuse(lanes, touched, others, before)
        if split is not None:
            apart = split[lanes]
            self.since.append((lanes[apart], touched[apart], stores))

    def meet(self, rows: Array) -> None:
        """Warps are whole again."""
        self.since = [
            (lanes[apart], touched[apart], stored)
            for lanes, touched, stored in self.since
            if (apart := ~np.isin(lanes // 32, rows)).any()
        ]

    def _refuse(self, lanes: Array, touched: Array, others: Array, before: Array) -> None:
        width = touched.shape[1]
        place = {int(byte): int(other) for other, row in zip(others, before, strict=True) for byte in row}
        for lane, byte in zip(np.repeat(lanes, width), touched.reshape(-1), strict=True):
            other = place.get(int(byte), int(lane))
            if other != lane and other // 32 == lane // 32:
                raise FaultError(
                    f"lanes {other % 32} and {lane % 32} of a warp that has parted access shared address "
                    f"{int(byte) % self.machine.shared.size:#x}, one of them by a store: no bar.warp.sync between"
                )
