"""CacheFormat: what is taken, what it says back, its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.format import Format
from qfx.kv.formats import SHORT, CacheFormat, cache_formats, planes_of, scales_of_token, zero_dtype


def one(kv: Any) -> CacheFormat:
    return cache_formats(kv, 1)[0]


@pytest.mark.parametrize("name", SHORT)
def test_short_names(name: str) -> None:
    got = one(name)
    assert got.keys == got.values == (Format.parse(SHORT[name]),)
    assert (got.residual, got.sinks) == ((32, 0) if name in ("i8", "fp8") else (16, 4))
    assert one({"k": name, "v": name}) == one(SHORT[name]) == one(Format.parse(SHORT[name])) == got


def test_residual_and_sinks_are_as_said() -> None:
    got = one({"k": "u4/g32/f16", "v": "i8", "residual": 0, "sinks": 7})
    assert (got.residual, got.sinks) == (0, 7)
    assert one({"k": "i8", "v": "u2/g32/f16"}).sinks == 4, "one of them below 8 bits is enough"
    assert (one("f16").residual, one("f16").sinks) == (0, 0)


def test_one_for_each_layer_or_one_for_all() -> None:
    assert cache_formats("i8", 3) == [one("i8")] * 3
    assert cache_formats(["i8", {"k": "i4", "v": "i2"}], 2) == [one("i8"), one({"k": "i4", "v": "i2"})]
    assert cache_formats([one("i4")], 1) == [one("i4")]
    with pytest.raises(ValueError, match="expected: 3, one for each layer"):
        cache_formats(["i8", "i8"], 3)


def test_heads() -> None:
    got = one({"k": ["i8", "i4"], "v": "i4"})
    assert got.heads == 2
    assert [str(fmt) for fmt in got.of_head(1)] == ["u4/g32/f16", "u4/g32/f16"]
    assert [str(fmt) for fmt in got.of_head(0)] == ["i8/tok/f16", "u4/g32/f16"]
    assert one("i8").heads is None
    assert one("i8").of_head(5) == one("i8").of_head(0)
    with pytest.raises(ValueError, match=r"(?s)layer 3 has formats for other heads.*expected: 4 heads.*found: 2"):
        got.check_heads(4, "layer 3")


@pytest.mark.parametrize(
    "kv",
    ["i8", "i2", {"k": ["u4/g16/f16", "u3/g64/bf16"], "v": ["nf4/g32", "i8/tok"], "residual": 5, "sinks": 0}, "f16"],
)
def test_json(kv: Any) -> None:
    text = json.dumps(one(kv).to_json())
    assert CacheFormat.from_json(json.loads(text)) == one(kv)


def test_text() -> None:
    assert str(one("i8")) == "k=i8/tok/f16 v=i8/tok/f16 residual=32"
    assert str(one("f16")) == "k=f16 v=f16"
    assert str(one({"k": ["i8", "i4"], "v": "i2"})) == "k=[i8/tok/f16,u4/g32/f16] v=u2/g32/f16 residual=16 sinks=4"


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("i9", "bad format 'i9'"),
        ("i7", "one fixed scale would need data"),
        ("i8/ch", "one fixed scale would need data"),
        ("i8/head", "one fixed scale would need data"),
        ("i8/b4x4", "blocks do not grow"),
        ("i4/g16/e4m3", "the whole tensor at once"),
        ("nf4/g64/dq", "the whole tensor at once"),
        ("i4/g32/dyn", "/dyn says nothing"),
        (4, "the format of a cache"),
        ({"k": "i8"}, "none for values"),
        ({"k": "i8", "v": "i8", "sink": 4}, "unknown key 'sink'.*did you mean 'sinks'"),
        ({"k": "i8", "v": "i8", "residual": -1}, "residual of a cache"),
        ({"k": "i8", "v": "i8", "sinks": 1.5}, "sinks of a cache"),
        ({"k": "i8", "v": "i8", "sinks": True}, "sinks of a cache"),
        ({"k": [], "v": "i8"}, "one format at least"),
        ({"k": {"a": 1}, "v": "i8"}, "a list of one for each head"),
        ({"k": ["i8", "i8"], "v": ["i8", "i8", "i8"]}, "2 for keys, 3 for values"),
    ],
)
def test_refused(kv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        one(kv)


def test_bytes_by_hand() -> None:
    assert one("i8").nbytes(2, 64, 100) == 2 * 2 * (68 * (64 + 2) + 32 * 128)
    assert one("f16").nbytes(2, 64, 100, batch=3) == 3 * 100 * 2 * 2 * 64 * 2
    # 100 tokens: 4 sinks, 2 groups of 32, 16 + 16 float; of keys 1.5 + 3 bytes a channel and group, of values a token
    keys = 64 * 16 + 2 * 32 * 3
    values = 64 * (16 + 3)
    assert one("i4").nbytes(1, 32, 100) == keys + values + 36 * 64 * 2
    assert one("i4").nbytes(1, 32, 100, dtype=torch.float32) == keys + values + 36 * 64 * 4
    assert one({"k": ["i8", "f16"], "v": "f16", "residual": 0}).nbytes(2, (64, 32), 10) == 10 * (66 + 128 + 2 * 64)


def test_bytes_against_half_precision() -> None:
    half = one("f16").nbytes(3, 64, 8192)
    assert one("i8").nbytes(3, 64, 8192) <= 0.55 * half
    assert one("i4").nbytes(3, 64, 8192) <= 0.32 * half
    assert one("i2").nbytes(3, 64, 8192) <= 0.2 * half


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 500),
    kv=st.sampled_from(["i8", "i4", "i3", {"k": ["i8", "u4/g16/f16"], "v": ["u2/g8", "f16"], "residual": 3}]),
)
def test_symbolic_bytes_are_those_of_numbers(tokens: int, kv: Any) -> None:
    length = sympy.Symbol("T", integer=True, nonnegative=True)
    expression = one(kv).nbytes(2, 40, length, batch=2)
    assert int(expression.subs(length, tokens)) == one(kv).nbytes(2, 40, tokens, batch=2)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 300), residual=st.integers(0, 40), sinks=st.integers(0, 9))
def test_what_is_stored_ends_a_group_and_leaves_the_residual(tokens: int, residual: int, sinks: int) -> None:
    got = one({"k": ["u4/g24", "u4/g16"], "v": "i8", "residual": residual, "sinks": sinks})
    stored = got.stored(tokens)
    assert got.step == 48 and stored % 48 == 0 and stored >= 0
    assert stored == 0 or tokens - stored >= residual + sinks
    assert tokens - stored - residual - sinks < 48


def test_parts_of_a_row() -> None:
    assert [planes_of(Format.parse(text)) for text in ("u2/g32", "u3/g32", "nf4/g32", "i5/tok", "i8/tok", "f16")] == [
        *(4, 8, 2, 8, 1, 1)
    ]
    assert scales_of_token(Format.parse("u3/g32"), 80) == 3
    assert scales_of_token(Format.parse("i8/tok"), 80) == 1
    assert scales_of_token(Format.parse("f16"), 80) == 0
    assert zero_dtype(Format.parse("u8/tok")) == torch.int16
