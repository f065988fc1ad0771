"""Attention over codes equals attention over the values that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.kv import attend as module
from qfx.kv import native
from qfx.kv.attend import View, attend, scores, weighted
from qfx.kv.formats import cache_formats
from qfx.kv.store import Store

FORMATS: tuple[Any, ...] = (
    "i8", "i4", "i3", "i2", "fp8", "f16", "i4/tok", "u5/g8/f16", "nf4/g16",
    {"k": "i8", "v": "u4/g8/f16", "residual": 0, "sinks": 0},
    {"k": "u2/g8/f16", "v": "i6/g12/f16", "residual": 3, "sinks": 2},
    {"k": ["i8", "i4", "i8"], "v": ["i4", "i4", "i4"]},
)  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(kv: Any, tokens: int = 150, *, batch: int = 2, heads: int = 3, width: int = 24, **how: Any) -> View:
    """A view of `tokens` tokens that came in two calls, of which the last, of 5, is in float."""
    keys, values = (random(batch, heads, tokens, width, seed=s, **how) + 0.5 for s in (1, 2))
    store = Store(cache_formats(kv, 1)[0], keys[:, :, :-5], values[:, :, :-5], where="layer 0")
    store.append(keys[:, :, :-5], values[:, :, :-5])
    return store.append(keys[:, :, -5:], values[:, :, -5:])


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of attention: by kernels, or by torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "attend", lambda *_: None)
    return str(request.param)


def reference(q: Tensor, view: View, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    repeats = q.shape[1] // view.shape(0)[1]
    keys, values = (view.dense(role).float().repeat_interleave(repeats, 1) for role in (0, 1))
    mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(q.float(), keys, values, mask, is_causal=causal, scale=0.3)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= tolerance


@pytest.mark.parametrize("kv", FORMATS, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_is_that_over_the_values(kv: Any, queries: int, way: str) -> None:
    view, q = filled(kv), random(2, 6, queries, 24)
    assert close(attend(q, view, None, 0.3), reference(q, view))


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_scores_and_sums_apart(kv: Any) -> None:
    view, q = filled(kv), random(2, 6, 4, 24)
    keys, values = (view.dense(role).repeat_interleave(2, 1) for role in (0, 1))
    found = scores(q, view)
    assert close(found, q @ keys.transpose(2, 3), 2e-4)
    p = torch.softmax(found, -1)
    kept = p.clone()
    assert close(weighted(p, view), p @ values)
    assert torch.equal(p, kept)


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_many_queries_take_other_products(kv: Any) -> None:
    view, q = filled(kv), random(2, 9, 40, 24)
    assert close(attend(q, view, None, 0.3), reference(q, view))


@pytest.mark.parametrize("kv", ["i8", "i4", FORMATS[-1]], ids=str)
@pytest.mark.parametrize("shape", [None, (2, 1, 70, 150), (2, 6, 70, 150), (1, 1, 1, 150)], ids=str)
def test_part_of_a_long_prompt_reads_head_by_head(kv: Any, shape: tuple[int, ...] | None) -> None:
    view, q = filled(kv), random(2, 6, 70, 24)
    mask = None if shape is None else random(*shape, seed=5) > -0.5
    if mask is not None and len(mask[0, 0]) > 1:
        mask[:, :, 3] = False
    assert close(attend(q, view, mask, 0.3), reference(q, view, mask))
    if mask is not None:
        bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        assert close(attend(q, view, bias, 0.3), reference(q, view, mask))
    early = torch.ones(70, 150).tril().bool()
    assert close(attend(q, view, mask, 0.3, causal=True), reference(q, view, early if mask is None else mask & early))
    window = view.narrow(40, 150)
    assert close(attend(q, window, None, 0.3), reference(q, window))
    half = filled(kv, dtype=torch.bfloat16)
    assert close(attend(q.bfloat16(), half, mask, 0.3), reference(q, half, mask), 0.05)


MASKS = {
    "keys alone": (1, 1, 1, 150), "queries and keys": (5, 150), "for each sequence": (2, 1, 5, 150),
    "for each head": (1, 6, 5, 150), "three axes": (6, 5, 150), "all": (2, 6, 5, 150), "queries": (1, 1, 5, 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kv", ["i8", FORMATS[-1]], ids=str)
def test_masks(shape: tuple[int, ...], additive: bool, kv: Any, way: str) -> None:
    view, q = filled(kv), random(2, 6, 5, 24)
    mask = random(*shape, seed=5) > -0.5
    given_mask = torch.where(mask, random(*shape, seed=6), float("-inf")) if additive else mask
    assert close(attend(q, view, given_mask, 0.3), reference(q, view, given_mask))


def test_causal_starts_at_the_upper_left() -> None:
    view, q = filled("i8", 6), random(2, 3, 6, 24)
    assert close(attend(q, view, None, 0.3, causal=True), reference(q, view, causal=True))
    mask = random(6, 6, seed=3) > -1
    both = mask & torch.ones(6, 6).tril().bool()
    assert close(attend(q, view, mask, 0.3, causal=True), reference(q, view, both))
    bias = random(6, 6, seed=3)
    assert close(
        attend(q, view, bias, 0.3, causal=True),
        reference(q, view, bias.masked_fill(~torch.ones(6, 6).tril().bool(), -1e9)),
    )


@pytest.mark.parametrize("kv", ["i8", {"k": "i4", "v": "i8", "residual": 0, "sinks": 0}])
def test_a_view_of_no_tokens_gives_zero(kv: Any, way: str) -> None:
    view, q = filled(kv).narrow(0, 0), random(2, 6, 5, 24)
    assert torch.equal(attend(q, view, None, 0.3), torch.zeros(2, 6, 5, 24))
    assert scores(q, view).shape == (2, 6, 5, 0)
    assert torch.equal(weighted(scores(q, view), view), torch.zeros(2, 6, 5, 24))


def test_rows_without_any_token_give_zero(way: str) -> None:
    view, q = filled("i8"), random(2, 6, 5, 24)
    mask = torch.ones(5, 150, dtype=torch.bool)
    mask[2] = False
    for given_mask in (mask, torch.zeros(5, 150).masked_fill(~mask, float("-inf"))):
        out = attend(q, view, given_mask, 0.3)
        assert torch.equal(out[:, :, 2], torch.zeros(2, 6, 24)) and out[:, :, 1].abs().max() > 0


@pytest.mark.parametrize("kv", ["i8", "i4", "i3", FORMATS[-1]], ids=str)
def test_small_tiles_and_blocks_change_nothing(kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view, q = filled(kv), random(2, 6, 5, 24)
    mask = random(2, 1, 5, 150, seed=5) > -0.5
    monkeypatch.setattr(native, "attend", lambda *_: None)
    whole = attend(q, view, mask, 0.3)
    causal = attend(q, view, None, 0.3, causal=True)
    monkeypatch.setattr(module, "TILE", 1)
    monkeypatch.setattr(module, "SCORES", 2 * 2 * 6 * 150)
    assert close(attend(q, view, mask, 0.3), whole)
    assert close(attend(q, view, None, 0.3, causal=True), causal)


def test_no_float_copy_of_the_history_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that attention makes is smaller than the keys of the history."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)
                        and t.is_floating_point() and "view" not in str(func) and t._base is None)  # fmt: skip
            return out

    monkeypatch.setattr(module, "TILE", 1 << 15)
    monkeypatch.setattr(native, "attend", lambda *_: None)
    for kv in ("i8", "i4", "i2"):
        view, q = filled(kv, 4096, batch=1, width=64), random(1, 6, 1, 64)
        history = 3 * 4096 * 64
        made.clear()
        with torch.no_grad(), Sizes():  # type: ignore[no-untyped-call]
            attend(q, view, None, 0.3)
            scores(q, view)
        assert 0 < max(made) < history / 8
        with Sizes():  # type: ignore[no-untyped-call]
            view.dense(0)
        assert max(made) >= history, "the way of counting sees a copy"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["i8", "i4", FORMATS[-1]], ids=str)
def test_half_precision(dtype: torch.dtype, kv: Any) -> None:
    view, q = filled(kv, dtype=dtype), random(2, 6, 5, 24, dtype=dtype)
    mask = torch.zeros(5, 150, dtype=dtype)
    out = attend(q, view, mask, 0.3)
    assert out.dtype == scores(q, view).dtype == dtype
    assert close(out, reference(q, view, mask), 0.02)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), kv=st.sampled_from(FORMATS))
def test_any_part_of_the_tokens(data: st.DataObject, kv: Any) -> None:
    view = filled(kv, 90)
    start = data.draw(st.integers(0, 89))
    end = data.draw(st.integers(start + 1, 90))
    part, q = view.narrow(start, end), random(2, 6, 2, 24)
    assert len(part) == end - start
    for role in (0, 1):
        assert torch.equal(part.dense(role), view.dense(role)[:, :, start:end])
    assert close(attend(q, part, None, 0.3), reference(q, part))
    again = data.draw(st.integers(0, end - start - 1))
    assert torch.equal(part.narrow(again, end - start).dense(0), view.dense(0)[:, :, start + again : end])


def test_gradients_of_masked_shapes_are_refused_by_torch() -> None:
    view, q = filled("i8"), random(2, 6, 5, 24)
    with pytest.raises(RuntimeError, match="must match|expand"):
        attend(q, view, torch.ones(5, 149, dtype=torch.bool), 0.3)
