"""Needles in a haystack: the texts hold what they say, a small model learns to look it up, coarse caches lose it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import qfx
from examples import needle
from examples.needle import Stage, Task

SMALL = needle.SMALL
LENGTH, NEEDLES = 24, 4


def texts(count: int = 16, seed: int = 5) -> tuple[Tensor, Tensor]:
    return SMALL.texts(count, LENGTH, NEEDLES, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    found = needle.untrained(SMALL)
    assert needle.train(found, SMALL, [Stage(80, 32, LENGTH, NEEDLES)]) > 0.9
    return found


@pytest.mark.parametrize("task", [SMALL, Task()])
def test_questions_are_those_of_the_needles(task: Task) -> None:
    ids, places = task.texts(8, 64, 7, torch.Generator().manual_seed(1))
    assert ids.shape == (8, 64) and places.shape == (8, 7)
    assert int(ids.max()) < task.vocabulary and int(ids.min()) >= 0 and bool((ids[:, 0] == 0).all())
    hay = 1 + task.keys * task.values
    for row, where in zip(ids, places, strict=True):
        codes = row[where] - 1
        assert bool(((codes >= 0) & (codes < task.keys * task.values)).all())
        assert row[50::2].tolist() == (hay + task.hay + codes // task.values).tolist()
        assert row[51::2].tolist() == (hay + task.hay + task.keys + codes % task.values).tolist()
        assert len(set((codes // task.values).tolist())) == 7, "a key each"
        rest = [int(t) for i, t in enumerate(row[1:50], 1) if i not in set(where.tolist())]
        assert all(hay <= t < hay + task.hay for t in rest)


@pytest.mark.parametrize(("length", "needles"), [(32, 9), (32, 0), (10, 5)])
def test_texts_that_cannot_be_are_refused(length: int, needles: int) -> None:
    with pytest.raises(ValueError, match=rf"needles in a text of {length} tokens and 8 keys, found {needles}"):
        SMALL.texts(1, length, needles, torch.Generator())


def test_answers_follow_the_questions() -> None:
    ids, _ = texts(2)
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), SMALL.vocabulary).float()
    found, wanted = needle.answers(logits, ids, NEEDLES)
    assert torch.equal(found.argmax(-1), wanted) and torch.equal(wanted, ids[:, -NEEDLES * 2 + 1 :: 2])


@torch.no_grad()
def test_reading_in_parts_gives_what_reading_at_once_gives(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "CHUNK", 7)
    ids, _ = texts()
    found, wanted = needle.answers(model(ids).logits, ids, NEEDLES)
    cache = DynamicCache()
    assert torch.equal(needle.retrieved(model, ids, NEEDLES, cache), found.argmax(-1) == wanted)
    assert cache.get_seq_length() == LENGTH


class Forgetful(DynamicCache):  # type: ignore[misc]
    """All values come back as zeros."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys, values * 0


def test_the_answers_come_from_the_cache(model: Any) -> None:
    ids, _ = texts()
    caches = {"float": DynamicCache(), "i8": needle.new_cache(model, "i8"), "none": Forgetful()}
    right = {name: float(needle.retrieved(model, ids, NEEDLES, c).double().mean()) for name, c in caches.items()}
    assert right["float"] > 0.9 and abs(right["i8"] - right["float"]) < 0.03
    assert right["none"] < 0.4


def test_measured_by_depth_and_length(model: Any) -> None:
    caches = {"float": None, "i4": {"k": "i4", "v": "i4"}}
    found = needle.measured(model, SMALL, [20, LENGTH], texts=8, needles=4, caches=caches)
    assert {name: list(row) for name, row in found.items()} == {"float": [20, LENGTH], "i4": [20, LENGTH]}
    assert all(len(each) == needle.BINS for row in found.values() for each in row.values())
    assert needle.mean(found["float"][LENGTH]) > 0.8
    again = needle.measured(model, SMALL, [20], texts=8, needles=4, caches={"float": None})
    assert again["float"][20] == pytest.approx(found["float"][20], nan_ok=True), "the texts depend on the seed alone"


def test_the_table_says_the_worst_depth() -> None:
    found = {"float": {64: [1.0] * 8}, "i2": {64: [1.0, 0.25, math.nan, *[1.0] * 5]}}
    table = needle.shown(found, SMALL)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["float", "i2"] and cells[1] == ["100.0%", "89.3%"]
    assert cells[2] == ["100.0% at 0.06 of 64", "25.0% at 0.19 of 64"]


def test_stages_are_told_and_repeat() -> None:
    said: list[tuple[Stage, float, float]] = []
    stages = [Stage(2, 4, 32, 4), Stage(1, 2, 48, 4)]
    models = [needle.untrained(SMALL) for _ in range(2)]
    for one in models:
        needle.train(one, SMALL, stages, on_stage=lambda *what: said.append(what))
    assert [stage for stage, _, _ in said] == stages * 2 and said[:2] == said[2:]
    first, second = (one.state_dict() for one in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not models[0].training


def test_caches_are_of_the_formats_named(model: Any) -> None:
    for name, kv in needle.CACHES.items():
        cache = needle.new_cache(model, kv)
        assert isinstance(cache, DynamicCache if name == "float" else qfx.QuantizedCache)


@pytest.mark.slow
def test_the_map_is_drawn(tmp_path: Path) -> None:
    needle.plot(tmp_path / "map.png", {name: {64: [0.5] * 8, 128: [1.0] * 8} for name in ("float", "i4", "i2")})
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "map.png"
    command = [sys.executable, str(Path(needle.__file__)), "--quick", "--threads", "1"]
    command += ["--json", str(numbers), "--plot", str(picture)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert list(found) == list(needle.CACHES) and "k4v2" in said and picture.exists()
    assert needle.mean(found["float"]["96"]) > 0.7
    assert needle.mean(found["i8"]["96"]) > needle.mean(found["float"]["96"]) - 0.03
