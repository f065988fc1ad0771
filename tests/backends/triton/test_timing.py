"""Timing: medians over replays, copies past the cache, memory that is poisoned."""

from __future__ import annotations

import math

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
