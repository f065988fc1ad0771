"""float_attention: what torch's attention gives, and qfx::attention where torch has none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import float_attention as under_test
from qfx.backends.triton import launch
from qfx.backends.triton.device import H200
from qfx.backends.triton.float_attention import candidates, float_attention, heuristic, spans_of
from qfx.backends.triton.timing import relative_error
from qfx.ops.floats import attention as reference
from tests.backends.triton.cases import BF16_STEP, DEVICE, meta


def operands(
    heads: tuple[int, int], tokens: int, *, queries: int = 1, batch: int = 1, widths: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v, as heads lie behind a projection: one token's side by side."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads[0], widths[0]), (tokens, heads[1], widths[0]), (tokens, heads[1], widths[1]))
    q, k, v = (torch.randn(batch, *s, generator=g).to(DEVICE, dtype).transpose(1, 2) for s in shapes)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """The op with the mask's spans."""
    spans = None if mask is None or mask.shape[-1] == 1 else spans_of(mask)
    given = {"sinks": None, "scale": 0.2, "causal": False, "softcap": 0.0, **more}
    return float_attention(q, k, v, mask, spans, **given)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """The same in f64."""
    given = {"sinks": None, "scale": 0.2, "causal": False, "softcap": 0.0, **more}
    return reference(q.float(), k.float(), v.float(), mask, **given)


def filled(tokens: int, count: int) -> Tensor:
    """The mask of a cache of fixed length, [1, 1, 1, tokens]."""
    return (torch.arange(tokens, device=DEVICE) < count)[None, None, None]


def splits_of(q: Tensor, k: Tensor, v: Tensor) -> int:
    """How many a launch has on an H200."""
    like = [torch.empty_like(x, device="meta") for x in (q, k, v)]
    with launch.recorded(H200) as launches:
        float_attention(like[0], like[1], like[2], None, None, None, 0.2, False, 0.0)
    return launches[0].grid[1]


def few(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """So many splits, where there are as many blocks."""
    old = under_test._config
    monkeypatch.setattr(under_test, "_config", lambda *a: {**old(*a), "SPLITS": splits})


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
def test_a_cache_of_fixed_length(heads: tuple[int, int], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, splits)
    q, k, v = operands(heads, 400, batch=2)
    for count in (1, 130, 400):
        mask = filled(400, count)
        wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True)
        assert relative_error(attend(q, k, v, mask), wanted) < 1e-5
        assert relative_error(attend(q, k, v, filled(400, count - 1)), wanted) > 1e-4


def test_nothing_behind_the_newest_token_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, 1)
    q, k, v = operands((4, 2), 600)
    mask = filled(600, 150)
    wanted = attend(q, k, v, mask)
    block = heuristic(32, 2, torch.float32)["BLOCK_R"]
    end = -(-150 // block) * block
    k[:, :, end:], v[:, :, end:] = torch.nan, torch.nan
    assert torch.equal(attend(q, k, v, mask), wanted)
    assert not float_attention(q, k, v, mask, None, None, 0.2, False, 0.0).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 300), many=st.integers(1, 7), groups=st.integers(1, 3), queries=st.integers(1, 9),
    widths=st.tuples(st.sampled_from((16, 40, 64)), st.sampled_from((8, 64, 72))), batch=st.integers(1, 3),
    kind=st.sampled_from((None, "bool", "batch", "additive", "head", "rows", "flat", "one", "causal")),
    more=st.booleans(), splits=st.sampled_from((1, 2, 5)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size_and_mask(
    tokens: int, many: int, groups: int, queries: int, widths: tuple[int, int], batch: int, kind: str | None,
    more: bool, splits: int, seed: int,
) -> None:  # fmt: skip
    heads = many * groups
    q, k, v = operands((heads, groups), tokens, queries=queries, batch=batch, widths=widths, seed=seed)
    g = torch.Generator().manual_seed(seed)
    masks: dict[str | None, Tensor] = {
        "bool": torch.rand(1, 1, queries, tokens, generator=g) < 0.6,
        "batch": torch.rand(batch, 1, 1, tokens, generator=g) < 0.3,
        "additive": torch.where(torch.rand(batch, 1, 1, tokens, generator=g) < 0.5, 0.5, -torch.inf),
        "head": torch.randn(1, heads, 1, tokens, generator=g),
        "rows": torch.rand(batch, heads, queries, tokens, generator=g) < 0.7,
        "flat": torch.rand(queries, tokens, generator=g) < 0.5,
        "one": torch.ones(batch, 1, 1, 1, dtype=torch.bool),
    }
    mask = masks.get(kind)
    mask = None if mask is None else mask.to(DEVICE)
    given: dict[str, Any] = {"causal": kind == "causal"}
    if more:
        given |= {"sinks": torch.randn(heads, generator=g).to(DEVICE), "softcap": 3.0}
    with pytest.MonkeyPatch.context() as patch:
        few(patch, splits)
        found = attend(q, k, v, mask, **given)
    wanted = expected(q, k, v, mask, **given)
    assert relative_error(found, wanted) < 1e-5 or float((found - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3e-3), (torch.bfloat16, 2 * BF16_STEP)])
@pytest.mark.parametrize("width", [64, 128])
def test_halves(dtype: torch.dtype, most: float, width: int) -> None:
    q, k, v = operands((8, 2), 300, widths=(width, width), dtype=dtype)
    mask = filled(300, 220)
    found = attend(q, k, v, mask, scale=width**-0.5)
    assert found.dtype == dtype
    assert relative_error(found, expected(q, k, v, mask, scale=width**-0.5)) < most


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_see_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, splits)
    q, k, v = operands((4, 2), 200, batch=2)
    mask = filled(200, 90).repeat(2, 1, 1, 1)
    mask[1] = False
    found = attend(q, k, v, mask)
    assert relative_error(found, expected(q, k, v, mask)) < 1e-5
    assert not found[1].any()


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_of_the_least_number_counts_all_alike(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, splits)
    q, k, v = operands((4, 2), 200, batch=2)
    mask = torch.zeros(2, 1, 1, 200, device=DEVICE)
    mask[1] = torch.finfo(torch.float32).min
    found = attend(q, k, v, mask)
    torch.testing.assert_close(found[1], v[1].mean(1, keepdim=True).repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


def test_spans() -> None:
    mask = torch.zeros(2, 1, 1, 5000, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 7:4999], mask[0, ..., 50] = True, False
    assert spans_of(mask).tolist() == [[7, 4999], [5000, 0]]
    rows = torch.full((3, 20), -torch.inf, device=DEVICE)
    rows[0, 4], rows[2, 11] = -1e38, 0.0
    assert spans_of(rows).tolist() == [[4, 12]]
    heads = torch.zeros(1, 4, 1, 9, dtype=torch.bool, device=DEVICE)
    heads[0, 2, 0, 8] = True
    assert spans_of(heads).tolist() == [[8, 9]]
    assert spans_of(mask[:, :, :, ::2]).tolist() == [[4, 2500], [2500, 0]]


@pytest.mark.parametrize("shape", [(2, 1, 1, 0), (2, 4, 3, 0), (0,), (3, 0)], ids=str)
def test_spans_of_no_keys(shape: tuple[int, ...]) -> None:
    found = spans_of(torch.ones(shape, dtype=torch.bool, device=DEVICE))
    assert found.tolist() == [[0, 0]] * (shape[0] if len(shape) == 4 else 1)


def test_no_keys_and_no_rows() -> None:
    q, k, v = operands((4, 2), 0)
    assert attend(q, k, v).eq(0).all()
    q, k, v = operands((4, 2), 10, queries=0)
    assert attend(q, k, v).shape == (1, 4, 0, 32)


def test_splits_fill_the_gpu() -> None:
    assert splits_of(*operands((32, 32), 4096, widths=(128, 128), dtype=torch.bfloat16)) == 8
    assert splits_of(*operands((32, 8), 512, widths=(128, 128), dtype=torch.bfloat16)) == 8
    assert splits_of(*operands((32, 32), 512, batch=16, widths=(128, 128), dtype=torch.bfloat16)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_every_candidate_gives_the_same(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands((rows, 1), 150, widths=(16, 16), dtype=dtype)
    mask = filled(150, 140)
    wanted = expected(q, k, v, mask)
    for config in candidates(16, rows, dtype):
        monkeypatch.setattr(under_test, "heuristic", lambda *_, c=config: c)
        assert relative_error(attend(q, k, v, mask), wanted) < (3e-3 if dtype == torch.float16 else 1e-5), config


def test_refusals() -> None:
    q, k, v = operands((4, 2), 20)
    wrong: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, str]] = [
        ((q[0], k[0], v[0]), None, "operands do not fit"),
        ((q, k.half(), v), None, "operands do not fit"),
        ((q, k[..., :16], v), None, "keys do not fit"),
        ((q, k, v[:, :, :9]), None, "values do not fit"),
        ((q[:, :3], k, v), None, "heads do not fit"),
        ((q, k, v), filled(19, 4), "the mask do not fit"),
    ]
    for operands_, mask, said in wrong:
        with pytest.raises(ValueError, match=re.escape(f"float_attention: {said}")):
            float_attention(*operands_, mask, None, None, 0.2, False, 0.0)
    wide = [meta(1, 2, 3, 300) for _ in range(3)]
    with launch.recorded(H200), pytest.raises(ValueError, match="at most 256 channels"):
        float_attention(wide[0], wide[1], wide[2], None, None, None, 0.2, False, 0.0)
