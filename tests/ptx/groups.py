"""Lanes that have parted: who goes on, and who waits for whom."""

from __future__ import annotations

from tests.ptx.faults import FaultError
from tests.ptx.values import Array


class ApartError(Exception):
    """Threads of a group that do something together are not all there yet."""


class Groups:
    """Lanes that wait at an instruction, by its index. blocked: those that wait for others to come there."""

    def __init__(self) -> None:
        self.waiting: dict[int, Array] = {}
        self.blocked: set[int] = set()

    def wait(self, at: int, lanes: Array, *, blocked: bool = False) -> None:
        """Let lanes wait at an instruction; whoever is blocked there goes on with them."""
        self.waiting[at] = self.waiting[at] | lanes if at in self.waiting else lanes
        (self.blocked.add if blocked else self.blocked.discard)(at)

    def next(self, at: int, lanes: Array) -> tuple[int, Array]:
        """Who goes on, of those that wait and `lanes` at `at`: those that are behind. Who meets goes together."""
        if at in self.waiting:
            lanes = lanes | self.waiting.pop(at)
            self.blocked.discard(at)
        first = min((i for i in self.waiting if i not in self.blocked), default=at)
        if first >= at:
            return at, lanes
        self.waiting[at] = lanes
        return first, self.waiting.pop(first)

    def leave(self) -> tuple[int, Array]:
        """The same, of those that wait alone. Raises FaultError where all of them wait for others."""
        free = [i for i in self.waiting if i not in self.blocked]
        if not free:
            raise FaultError(
                "threads wait for others that do not come: a barrier or an instruction of a warp in a branch"
            )
        return min(free), self.waiting.pop(min(free))
