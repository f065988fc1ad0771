"""How long the GPU takes for calls of ops: a CUDA graph of them is replayed between two events.

Calls that read the same weights again would find them in the L2 cache; so there are copies of what is read, enough to
pass twice its size, and the calls take turns. What measures can be another than the GPU, see `Stopwatch`.
"""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qfx.errors import first_line

_CALLS = 20  # in a graph, at least: what an event costs is then small beside them
_REPLAYS = (5, 100)
_MOST_COPIES = 64

Call = Callable[[], object]


class Stopwatch(Protocol):
    """What measures. The GPU is `CudaGraphs`."""

    def captured(self, work: Call) -> Call:
        """`work` in a form that can be run again and again."""

    def elapsed(self, run: Call) -> float:
        """Seconds that one run of what `captured` gave takes."""


@dataclass(frozen=True)
class CudaGraphs:
    """Work is captured in a CUDA graph; events on the device say when its replay begins and ends.

    device: where the work runs, None for the current one. A stream of another would capture nothing of it.
    """

    device: torch.device | None = None

    def captured(self, work: Call) -> Call:
        """The replay of a graph of the work, which ran once before: kernels are compiled, libraries have their memory.

        Raises RuntimeError where the work waits for the GPU, which a graph cannot hold.
        """
        with torch.cuda.device(self.device):
            aside = _stream(torch.cuda.current_device())
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                work()
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=aside):  # torch's own would be one for all devices
                work()
            return captured.replay

    def elapsed(self, run: Call) -> float:
        """Seconds between an event before the run and one behind it."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One of a device to warm up and to capture on: libraries keep memory for each that they ever ran on."""
    return torch.cuda.Stream(device)


def seconds(calls: Sequence[Call], on: Stopwatch | None = None, *, budget: float = 0.2) -> float:
    """Seconds that one of `calls` takes, the median of replays of a graph in which they take turns.

    calls: the same work on copies of its weights (see `copies`). on: left out, CUDA graphs on the current device.
    budget: about how many seconds of replays there are, within 5 to 100 of them.
    """
    assert calls, "nothing to measure"
    watch = CudaGraphs() if on is None else on
    turns = math.ceil(_CALLS / len(calls))

    def work() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    run = watch.captured(work)
    first = min(watch.elapsed(run) for _ in range(2))  # they bring clocks up
    least, most = _REPLAYS
    replays = min(max(int(budget / max(first, 1e-9)), least), most)
    return statistics.median(watch.elapsed(run) for _ in range(replays)) / (turns * len(calls))


def copies(read: int, cache: int) -> int:
    """How many copies of `read` bytes pass twice the bytes of a cache, at most 64."""
    return min(max(math.ceil(2 * cache / max(read, 1)), 1), _MOST_COPIES)


def cache_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU; 0 of what is none."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def said(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def is_lost(device: torch.device) -> bool:
    """Whether a GPU runs nothing of this process any more, as after an access to memory that is not there."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return float(torch.ones(1, device=device).sum()) != 1.0
    except RuntimeError:
        return True


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it memory that an op allocates holds NaN, or the greatest integer, until it is written.

    An element that a kernel forgets can then not be right by what lay there before.
    """
    on, only_warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)  # of cuBLAS
            yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(on, warn_only=only_warn)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in f64 (Frobenius); not finite where `found` is not; 0 for no elements."""
    a, b = found.to(torch.float64), expected.to(torch.float64)
    size = torch.linalg.vector_norm(b)
    wrong = torch.linalg.vector_norm(a - b)
    return float(wrong / size) if float(size) else float(wrong)
