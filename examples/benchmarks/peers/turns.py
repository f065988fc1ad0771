"""Several calls in one process, timed by turns: what else the machine does slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int, each: int = 1) -> dict[str, float]:
    """Median seconds of each call. All take a turn of `each` calls in each round; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(each):
                call()
            if turn:
                times[name].append((time.perf_counter() - started) / each)
    return {name: median(values) for name, values in times.items()}
