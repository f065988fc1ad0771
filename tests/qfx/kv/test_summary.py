from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import qfx
from qfx.kv.formats import RESIDUAL, RESIDUAL_8, SINKS, CacheFormat
from qfx.kv.plans import Cached, CacheLayer
from qfx.kv.summary import CacheSummary, named, summary
from tests.qfx.kv import models

FORMATS = st.sampled_from(["i8", "i4", "u3/g16/f16", "f16", "f8e4m3/tok/f16"])

LOW = f"residual={RESIDUAL} sinks={SINKS}"  # below 8 bits


@st.composite
def summaries(draw: st.DrawFn) -> CacheSummary:
    found = []
    for index in range(draw(st.integers(1, 3))):
        layer = CacheLayer(f"l{index}", index, 2, (8, 16), window=draw(st.sampled_from([None, None, 24])))
        extra = {"residual": draw(st.integers(0, 40)), "sinks": draw(st.integers(0, 5))}
        found.append(Cached(layer, CacheFormat.from_json({"k": draw(FORMATS), "v": draw(FORMATS), **extra})))
    return CacheSummary(tuple(found), torch.float32)


@given(summaries(), st.integers(1, 4), st.integers(20_000, 400_000))
@settings(max_examples=60, deadline=None)
def test_the_context_that_is_told_has_room_at_every_length(told: CacheSummary, batch: int, memory: int) -> None:
    if all(one.layer.window for one in told.caches):
        with pytest.raises(ValueError, match="every layer of the cache has a window"):
            told.max_context(memory, batch)
        return
    try:
        most = told.max_context(memory, batch)
    except ValueError as error:
        assert "bytes are too few" in str(error)  # noqa: PT017
        return
    assert all(told.nbytes(n, batch) <= memory for n in range(max(1, most - 70), most + 1))
    dense = math.ceil(memory / batch / told.bytes_per_token) + 1  # if no token were in float
    assert most < dense and told.nbytes(dense, batch) > memory


@given(summaries(), st.integers(1, 300), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_symbols_give_the_numbers(told: CacheSummary, context: int, batch: int) -> None:
    tokens, rows, memory = sympy.symbols("context batch memory", integer=True, positive=True)
    found = told.nbytes(tokens, rows)
    assert found.subs({tokens: context, rows: batch}) == told.nbytes(context, batch)
    if not all(one.layer.window for one in told.caches):
        most = told.max_context(memory, rows).subs({memory: 10**7, rows: batch})
        assert most == told.max_context(10**7, batch)


def test_bytes_of_a_token() -> None:
    layer = CacheLayer("a", 0, 2, (32, 32))
    one = Cached(layer, CacheFormat.from_json({"k": "i8", "v": "i8"}))
    assert one.token_bytes == 2 * 2 * (32 + 2)
    kivi = Cached(layer, CacheFormat.from_json({"k": "i4", "v": "i2"}))
    assert kivi.token_bytes == 2 * ((16 + 32 * 3 / 32) + (8 + 3))
    assert CacheSummary((one, kivi)).bytes_per_token == one.token_bytes + kivi.token_bytes
    assert CacheSummary((one,)).ratio == pytest.approx(34 / 64)


def test_too_little_memory_names_what_would_do() -> None:
    fmt = CacheFormat.from_json({"k": "i8", "v": "i8", "residual": 0})
    told = CacheSummary((Cached(CacheLayer("a", 0, 2, (32, 32)), fmt),))
    with pytest.raises(ValueError, match=r"100 bytes are too few for a cache of 1 sequences\n.*at least 136"):
        told.max_context(100)
    assert told.max_context(136) == 1 and told.max_context(2 * 136 * 9, 2) == 9


def report_of(recipe: Any, kind: str = "llama") -> qfx.Report:
    return qfx.report(qfx.quantize(models.build(kind), recipe))


def test_the_report_has_a_row_for_each_layer() -> None:
    found = report_of("kv-k4v2")
    assert found.cache is not None
    assert [row.node for row in found.cache.rows] == list(models.NAMES)
    assert {row.asked for row in found.cache.rows} == {f"k=u4/g32/f16 v=u2/g32/f16 {LOW}"}
    assert found.totals["cache_bytes_per_token"] == 2 * 60 and found.totals["cache_ratio"] == pytest.approx(60 / 256)
    fields = json.loads(found.to_json())
    assert fields["caches"][1]["node"] == models.NAMES[1] and fields["caches"][1]["ratio"] == pytest.approx(60 / 256)
    weights = found.totals["bytes_after"]
    assert found.cache.nbytes(found.max_context(weights + 10**6)) <= 10**6
    text = io.StringIO()
    found.show(Console(file=text, width=120), all_rows=False)
    assert "model.layers.0.self_attn and 1 more" in text.getvalue()
    assert "cache: 120 bytes a token, 0.234 of f16; 8,192 tokens of a sequence take" in text.getvalue()


def test_windows_do_not_grow() -> None:
    found = report_of("kv8", "gemma2").cache
    assert found is not None and found.rows[0].window == 16
    assert found.bytes_per_token == 136
    assert found.nbytes(1000) == 136 * (1000 - RESIDUAL_8) + 512 * (RESIDUAL_8 + 16), "the window is shorter"
    assert [len(rows) for _, rows in named(found.rows)] == [1, 1]


def test_without_a_quantized_cache_nothing_is_told() -> None:
    assert summary(models.build()) is None
    found = qfx.Report(())
    assert found.cache is None and "cache_ratio" not in found.totals and "caches" not in json.loads(found.to_json())
    with pytest.raises(ValueError, match="the model has no quantized cache"):
        found.max_context(10**9)
