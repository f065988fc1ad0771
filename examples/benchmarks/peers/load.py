"""How busy other processes keep the processors: what a table of times must say, since it changes them."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


class Load:
    """Sums processor time over stretches that `begin` and `end` enclose. Without /proc it knows nothing."""

    def __init__(self) -> None:
        self.seconds = self.others = 0.0
        self._started: tuple[float, float, float] | None = None

    def begin(self, process: int) -> None:
        """A stretch starts; what `process` (an id) uses from here on is not others'."""
        self._started = self._now(process)

    def end(self, process: int) -> None:
        """The stretch that began last is over; one whose process is gone does not count."""
        now, started = self._now(process), self._started
        if now is None or started is None:
            return
        elapsed, busy, own = (b - a for a, b in zip(started, now, strict=True))
        self.seconds += elapsed
        self.others += max(0.0, busy - own)

    @property
    def cores(self) -> float | None:
        """Processors that other processes kept busy, on average; None where nothing was seen."""
        return self.others / self.seconds if self.seconds else None

    def __str__(self) -> str:
        if self.cores is None:
            return "what other processes did meanwhile is not known here"
        return f"meanwhile other processes kept {self.cores:.1f} of {os.cpu_count()} processors busy"

    def _now(self, process: int) -> tuple[float, float, float] | None:
        """(seconds since the start of all processors, busy seconds of all of them, those of `process`)."""
        try:
            numbers = [int(n) for n in (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
            fields = (
                (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
            )
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        idle = numbers[3] + numbers[4]
        total = sum(numbers)
        return total / tick / (os.cpu_count() or 1), (total - idle) / tick, (int(fields[11]) + int(fields[12])) / tick
