"""cache_attention: what qfx::cache_attention gives over the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import cache_layout
from qfx.backends.triton.cache_attention import cache_attention, candidates, heuristic
from qfx.backends.triton.device import H200, INTERPRETER, Device
from qfx.backends.triton.timing import relative_error
from qfx.kv.formats import CacheFormat, cache_formats
from qfx.kv.packed_ops import allocate, cache_append, spec_of
from qfx.kv.packed_ops import cache_attention as reference
from tests.backends.triton.cases import BF16_STEP, DEVICE

KINDS: tuple[Any, ...] = (
    "i8", "i4", "i3", "i2", "fp8", {"k": "i4", "v": "i2"}, {"k": "i8", "v": "i4"}, {"k": "i3", "v": "u4/tok"},
    {"k": ["i8", "i3"], "v": ["i3", "i4"], "residual": 5, "sinks": 0}, {"k": "f16", "v": "i4"},
    {"k": "u8/g16", "v": "u8/tok"}, {"k": "i4/tok/e8m0", "v": "i4/g8/bf16"}, {"k": "f8e5m2/g16", "v": "f8e4m3/g16"},
    {"k": "i8/g32/f16", "v": "i8/g24"}, {"k": "u6/g24", "v": "i5/tok"}, {"k": "u4/tok", "v": "i2/g8"},
)  # fmt: skip
MIXES = (  # what each holds, others hold as well
    {"k": "i4", "v": "i2"}, {"k": "i8", "v": "i4"}, {"k": "i3", "v": "u4/tok"}, {"k": "u8/g16", "v": "u8/tok"},
    {"k": "i8/g32/f16", "v": "i8/g24"}, {"k": "u4/tok", "v": "i2/g8"},
)  # fmt: skip
EVERY = [pytest.param(kv, marks=pytest.mark.slow if kv in MIXES else []) for kv in KINDS]


def filled(
    kv: Any, tokens: tuple[int, ...], *, batch: int = 1, groups: int = 2, widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32, length: int = 200, seed: int = 0,
) -> tuple[list[Tensor], str, Tensor]:  # fmt: skip
    """Memory after appends of so many tokens, its spec, and the number of tokens."""
    g = torch.Generator().manual_seed(seed)
    fmt: CacheFormat = cache_formats(kv, 1)[0]
    like = [torch.empty(batch, groups, 0, w, dtype=dtype) for w in widths]
    memory, spec = allocate(fmt, like[0], like[1], length), spec_of(fmt, like[0], like[1], length)
    seen = 0
    for count in tokens:
        k, v = (torch.randn(batch, groups, count, w, generator=g).to(dtype) for w in widths)
        cache_append(memory, k + 2 * torch.randn(widths[0], generator=g).to(dtype), v, torch.tensor(seen), spec)
        seen += count
    return [t.to(DEVICE) for t in memory], spec, torch.tensor(seen, device=DEVICE)


@pytest.mark.parametrize("kv", EVERY, ids=str)
def test_every_format(kv: Any) -> None:
    memory, spec, length = filled(kv, (90, 30, 1), widths=(40, 24), length=130)
    q = torch.randn(1, 2, 1, 40, device=DEVICE)
    expected = reference(q, memory, length, None, 0.2, False, spec)
    assert relative_error(cache_attention(q, memory, length, None, 0.2, False, spec), expected) < 1e-5
    stored = next(t for t in memory[5:] if t.dtype in (torch.int8, torch.uint8))
    stored[:, :, :20] = 1 if stored.dtype == torch.uint8 else -stored[:, :, :20]
    assert relative_error(cache_attention(q, memory, length, None, 0.2, False, spec), expected) > 1e-3


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(0, 150), rest=st.integers(0, 32), many=st.integers(1, 8), width=st.sampled_from((64, 80, 128)),
    queries=st.sampled_from((1, 1, 2, 7)), kv=st.sampled_from(("i8", "i4", {"k": "i4", "v": "i2"}, "fp8")),
    mask=st.sampled_from((None, "bool", "additive", "rows", "one")), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_length_heads_and_mask(
    tokens: int, rest: int, many: int, width: int, queries: int, kv: Any, mask: str | None, causal: bool, seed: int
) -> None:  # fmt: skip
    sizes = tuple(n for n in (tokens, rest) if n)
    memory, spec, length = filled(kv, sizes, groups=1, batch=2, widths=(width, width), seed=seed)
    torch.manual_seed(seed)
    q = torch.randn(2, queries, many, width).transpose(1, 2).to(DEVICE)
    seen = {
        None: None,
        "bool": torch.rand(2, 1, 1, 200) < 0.7,
        "additive": torch.where(torch.rand(1, 1, queries, 200) < 0.5, 0.0, -2.0),
        "rows": torch.rand(2, many, queries, 200) < 0.7,
        "one": torch.ones(2, 1, 1, 1, dtype=torch.bool),
    }[mask]
    seen = None if seen is None else seen.to(DEVICE)
    expected = reference(q, memory, length, seen, width**-0.5, causal, spec)
    found = cache_attention(q, memory, length, seen, width**-0.5, causal, spec)
    assert relative_error(found, expected) < 1e-5 or float((found - expected).abs().max()) < 1e-6


def test_many_rows_and_heads_of_several_formats() -> None:
    memory, spec, length = filled({"k": ["i8", "i4"], "v": "i4"}, (100, 20), widths=(16, 16))
    q = torch.randn(1, 18, 8, 16, device=DEVICE)
    mask = torch.rand(1, 18, 8, 200, device=DEVICE) < 0.5
    arguments = (q, memory, length, mask, 0.125, True, spec)
    assert relative_error(cache_attention(*arguments), reference(*arguments)) < 1e-5
    assert relative_error(cache_attention(q, memory, length, ~mask, *arguments[4:]), reference(*arguments)) > 0.1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3e-3), (torch.bfloat16, 2 * BF16_STEP)])
@pytest.mark.parametrize("kv", KINDS if DEVICE == "cuda" else ["i8", "i4"], ids=str)
def test_halves(kv: Any, dtype: torch.dtype, most: float) -> None:
    memory, spec, length = filled(kv, (100, 20), dtype=dtype)
    q = torch.randn(1, 4, 1, 64, dtype=dtype, device=DEVICE)
    expected = reference(q, memory, length, None, 0.125, False, spec)
    assert relative_error(cache_attention(q, memory, length, None, 0.125, False, spec), expected) < most


@pytest.mark.parametrize("least", [-float("inf"), torch.finfo(torch.float32).min], ids=["inf", "min"])
def test_rows_that_see_nothing(least: float) -> None:
    memory, spec, length = filled("i4", (90,), batch=2)
    mask = torch.zeros(2, 1, 1, 200, device=DEVICE)
    mask[1] = least
    q = torch.randn(2, 4, 1, 64, device=DEVICE)
    expected = reference(q, memory, length, mask, 0.125, False, spec)
    found = cache_attention(q, memory, length, mask, 0.125, False, spec)
    assert relative_error(found, expected) < 1e-5
    assert bool((found[1] == 0).all()) == (least == -float("inf"))


@pytest.mark.parametrize("size", [1e-5, 3e4])
def test_values_of_any_size(size: float) -> None:
    """Weights times the scales of values stay within f16, whatever the scales are."""
    memory, spec, length = filled({"k": "i8/tok", "v": "i8/tok"}, (100,))
    memory[4].mul_(size)
    memory[8].mul_(size)
    q = torch.randn(1, 4, 1, 64, device=DEVICE)
    expected = reference(q, memory, length, None, 0.125, False, spec)
    assert relative_error(cache_attention(q, memory, length, None, 0.125, False, spec), expected) < 1e-5


def test_the_op_is_registered() -> None:
    memory, spec, length = filled("i4", (60,))
    q = torch.randn(1, 4, 1, 64, device=DEVICE)
    arguments = (q, memory, length, None, 0.125, False, spec)
    assert torch.equal(torch.ops.qfx_triton.cache_attention(*arguments), cache_attention(*arguments))
    empty = cache_attention(q[:, :, :0], *arguments[1:])
    assert empty.shape == (1, 4, 0, 64)


@pytest.mark.parametrize(
    ("kv", "width", "reason"),
    [
        ("nf4/g32", 64, "looked up in a table"),
        ({"k": "i8", "v": "u4/tok/c90"}, 64, "90 percent"),
        ({"k": "i3/g12", "v": "i4"}, 64, "groups of 12 tokens, of which 8 share bytes"),
        ("i4", 320, "heads of 320 channels"),
    ],
    ids=str,
)
def test_refusals(kv: Any, width: int, reason: str) -> None:
    memory, spec, length = filled(kv, (), widths=(width, width), length=24)
    found = cache_layout.reason_against(spec, H200)
    assert found is not None and reason in found
    assert "shared memory" in str(cache_layout.reason_against(spec, Device("small", (8, 6), 28, 49152)))
    with pytest.raises(ValueError, match=reason):
        cache_attention(torch.zeros(1, 2, 1, width, device=DEVICE), memory, length, None, 1.0, False, spec)


def test_queries_that_do_not_fit() -> None:
    memory, spec, length = filled("i4", ())
    with pytest.raises(
        ValueError, match=r"(?s)how many tokens a cache holds.*one number, int64.*found: \[\], torch.int32"
    ):
        cache_attention(torch.zeros(1, 2, 1, 64, device=DEVICE), memory, length.int(), None, 1.0, False, spec)
    for q in (
        torch.zeros(1, 3, 1, 64),
        torch.zeros(2, 2, 1, 64),
        torch.zeros(1, 2, 64),
        torch.zeros(1, 2, 1, 64).double(),
    ):
        with pytest.raises(ValueError, match=r"(?s)queries do not fit the cache.*a multiple of 2, queries, 64"):
            cache_attention(q.to(DEVICE), memory, length, None, 1.0, False, spec)


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_no_configuration_is_measured_twice(kv: Any) -> None:
    for widths, rows, dtype in (((64, 64), 1, torch.float16), ((192, 128), 40, torch.float32)):
        layout = cache_layout.of(filled(kv, (), widths=widths)[1])
        found = candidates(INTERPRETER, layout, rows, 1, dtype)
        assert found[0] == heuristic(INTERPRETER, layout, rows, 1, dtype)
        assert 3 < len(found) == len({tuple(sorted(one.items())) for one in found}) <= 20
