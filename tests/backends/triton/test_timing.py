"""Timing: medians over replays, copies past the cache, memory that is poisoned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from qfx.backends.triton import timing
from tests.backends.triton.cases import DEVICE


class Fake:
    """A stopwatch that says what it is told, and counts."""

    def __init__(self, *times: float) -> None:
        self.times, self.runs = list(times), 0

    def captured(self, work: timing.Call) -> timing.Call:
        return work

    def elapsed(self, run: timing.Call) -> float:
        run()
        self.runs += 1
        return self.times[min(self.runs, len(self.times)) - 1]


def test_the_median_of_replays_by_call_and_each_copy_in_turn() -> None:
    seen: list[int] = []
    watch = Fake(9.0, 1.0, 1.0, 2.0, 30.0, 2.0, 3.0)
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    assert timing.seconds(calls, watch) == 2.0 / 21  # 7 turns of three calls; 2 runs before, 5 that count
    assert watch.runs == 7 and seen == [0, 1, 2] * 7 * 7


class Seen:
    """What torch.cuda is asked for, in order, as (name, current device)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.asked = 0, list[tuple[str, int]]()
        for name in ("synchronize", "CUDAGraph", "Event", "Stream"):
            monkeypatch.setattr(torch.cuda, name, self.thing(name))
        monkeypatch.setattr(torch.cuda, "current_stream", self.thing("current_stream"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, self.within(name))
        timing._stream.cache_clear()

    def note(self, name: str) -> None:
        self.asked.append((name, self.current))

    def thing(self, name: str) -> Any:
        def made(*_: Any, **__: Any) -> Any:
            self.note(name)
            return MagicMock(elapsed_time=lambda _: 2e3)

        return made

    def within(self, name: str) -> Any:
        def entered(*_: Any, stream: Any = None) -> Any:
            assert name == "stream" or stream is not None, "torch's own stream to capture on is one for all devices"
            self.note(name)
            return nullcontext()

        return entered

    @contextmanager
    def device(self, device: torch.device | None) -> Iterator[None]:
        before, self.current = self.current, self.current if device is None else device.index
        yield
        self.current = before


@pytest.mark.parametrize("index", [None, 1])
def test_graphs_are_made_and_timed_on_the_device_of_the_work(
    monkeypatch: pytest.MonkeyPatch, index: int | None
) -> None:
    seen = Seen(monkeypatch)
    watch = timing.CudaGraphs(None if index is None else torch.device("cuda", index))
    run = watch.captured(lambda: seen.note("work"))
    assert watch.elapsed(run) == 2.0
    names = [name for name, _ in seen.asked]
    assert names.count("work") == 2 and names.index("graph") < len(names) - 1 - names[::-1].index("work")
    assert {current for _, current in seen.asked} == {index or 0} and seen.current == 0
    watch.captured(lambda: None)
    assert [name for name, _ in seen.asked].count("Stream") == 1
    timing._stream.cache_clear()


def test_short_work_is_replayed_more_often_but_not_for_ever() -> None:
    watch = Fake(1e-2)
    timing.seconds([lambda: None], watch, budget=0.2)
    assert watch.runs == 2 + 20
    watch = Fake(1e-9)
    timing.seconds([lambda: None], watch)
    assert watch.runs == 2 + 100


@pytest.mark.parametrize(("read", "cache", "count"), [(10, 0, 1), (100, 50, 1), (99, 50, 2), (1, 1000, 64), (0, 8, 16)])
def test_copies_pass_twice_the_cache(read: int, cache: int, count: int) -> None:
    assert timing.copies(read, cache) == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_memory_is_poisoned_and_the_setting_is_put_back(dtype: torch.dtype) -> None:
    with timing.poisoned():
        assert torch.empty(100, dtype=dtype, device=DEVICE).isnan().all()
        assert torch.empty(100, dtype=torch.float8_e4m3fn, device=DEVICE).to(torch.float32).isnan().all()
        assert (torch.empty(100, dtype=torch.int8, device=DEVICE) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_settings_are_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), timing.poisoned():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors() -> None:
    x = torch.tensor([3.0, 4.0], device=DEVICE)
    assert timing.relative_error(x, x) == 0
    assert timing.relative_error(x.to(torch.float16) + 1, x) == pytest.approx(math.sqrt(2) / 5)
    assert math.isnan(timing.relative_error(x * math.nan, x))
    assert timing.relative_error(x, x * 0) == 5
    assert timing.relative_error(x[:0], x[:0]) == 0


def test_a_device_that_answers_is_not_lost() -> None:
    assert not timing.is_lost(torch.device(DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_copy_takes_about_as_long_as_its_bytes_do() -> None:
    x, y = (torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    took = timing.seconds([lambda: y.copy_(x)])
    assert 2 * x.nbytes / 20e12 < took < 2 * x.nbytes / 0.2e12
    assert timing.cache_bytes(x.device) > 1 << 20
