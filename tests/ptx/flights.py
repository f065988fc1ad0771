"""What was asked for and is not done yet: groups of copies or products, and waits for all but the last of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.values import Array


@dataclass(frozen=True)
class Flight:
    """Parts of one instruction: the warp of each, which group of that warp it belongs to, and what else is known."""

    rows: Array
    groups: Array
    parts: tuple[Array, ...]

    def chosen(self, which: Array) -> Flight:
        """Some of the parts."""
        return Flight(self.rows[which], self.groups[which], tuple(part[which] for part in self.parts))


class Flights:
    """land(rows, *parts): called at the last moment, which is the wait."""

    def __init__(self, warps: int, land: Callable[..., None]) -> None:
        self.committed = np.zeros(warps, np.int64)
        self.waiting: list[Flight] = []
        self.land = land

    def start(self, rows: Array, *parts: Array) -> None:
        """What an instruction asks for; it belongs to the groups that the next `commit` closes."""
        self.waiting.append(Flight(rows, self.committed[rows], parts))

    def commit(self, rows: Array) -> None:
        """Close the groups of some warps."""
        self.committed[rows] += 1

    def wait(self, rows: Array, left: int) -> None:
        """Land what belongs to all groups of some warps but the last `left`."""
        limit = np.zeros(len(self.committed), np.int64)
        limit[rows] = self.committed[rows] - left
        kept = []
        for flight in self.waiting:
            done = flight.groups < limit[flight.rows]
            if done.all():
                self.land(flight.rows, *flight.parts)
                continue
            if done.any():
                landing = flight.chosen(done)
                self.land(landing.rows, *landing.parts)
            kept.append(flight.chosen(~done))
        self.waiting = kept
