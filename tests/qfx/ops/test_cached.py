"""qfx.ops.cached: how a cache is stored, and what attention over it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.ops.cached import PROMPT, decode, encode, stored_width
from tests.seeded import randn

op = torch.ops.qfx.quantized_cached_attention
FORMATS = [Format.parse("i8/ch"), Format.parse("i4/ch")]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([8, 4]), groups=st.integers(1, 3), tokens=st.integers(0, 4), half=st.integers(1, 5),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_stored_values_are_half_a_step_away_at_most(bits: int, groups: int, tokens: int, half: int, seed: int) -> None:
    fmt = Format.parse(f"i{bits}/ch")
    x, scale = randn(2, groups, tokens, 2 * half, seed=seed), randn(1, groups, 1, 2 * half, seed=seed + 1).abs() + 0.1
    x = x.clamp(-fmt.qmax * scale, fmt.qmax * scale)
    stored = encode(x, scale, fmt)
    assert stored.shape == (2, groups, tokens, stored_width(fmt, 2 * half))
    assert stored.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert bool(((decode(stored, scale, fmt) - x).abs() <= scale * 0.5001).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_beyond_the_range_saturate(fmt: Format) -> None:
    x = torch.tensor([[[[1e9, -1e9]]]])
    middle = 1 << (fmt.bits - 1)
    assert decode(encode(x, torch.ones(1, 1, 1, 2), fmt), torch.ones(1, 1, 1, 2), fmt).tolist() == [
        [[[middle - 1.0, -float(middle)]]]
    ]


def test_two_codes_in_a_byte_the_first_low() -> None:
    x = torch.tensor([[[[1.0, -2.0, 7.0, -8.0]]]])
    assert encode(x, torch.ones(1, 1, 1, 4), FORMATS[1]).tolist() == [[[[9 | 6 << 4, 15 | 0 << 4]]]]


def operands(old: int, new: int, fmt: Format) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v, past_k, past_v, k_scale, v_scale, and the same caches in float."""
    q, k, v = randn(2, 4, new, 8), randn(2, 2, new, 8, seed=1), randn(2, 2, new, 8, seed=2)
    steps = [randn(1, 2, 1, 8, seed=s).abs() * 0.05 + 2.5 / fmt.qmax for s in (3, 4)]
    stored = [encode(randn(2, 2, old, 8, seed=s), step, fmt) for s, step in zip((5, 6), steps, strict=True)]
    pasts = [decode(past, step, fmt) for past, step in zip(stored, steps, strict=True)]
    return (q, k, v, *stored, *steps), (q, k, v, *pasts)


def ran(old: int, new: int, fmt: Format) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The operator's results, and those of the float operator on the dequantized cache."""
    given, plain = operands(old, new, fmt)
    mask = torch.ones(new, old + new, dtype=torch.bool).tril(old)
    rest = (mask, None, 0.3, False, 0.0)
    return op(*given, *rest, str(fmt), str(fmt)), torch.ops.qfx.cached_attention(*plain, *rest)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 5), (3, PROMPT)])
def test_a_prompt_attends_in_float(old: int, new: int, fmt: Format) -> None:
    found, plain = ran(old, new, fmt)
    assert torch.allclose(found[0], plain[0], atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("old", "new"), [(6, 1), (3, PROMPT - 1)])
def test_few_tokens_are_read_as_stored(old: int, new: int, fmt: Format) -> None:
    found, plain = ran(old, new, fmt)
    assert not torch.allclose(found[0], plain[0], atol=1e-6)
    (q, _, _, _, _, *steps), _ = operands(old, new, fmt)
    keys, values = (decode(grown, step, fmt) for grown, step in zip(found[1:], steps, strict=True))
    mask = torch.ones(new, old + new, dtype=torch.bool).tril(old)
    assert torch.allclose(found[0], torch.ops.qfx.attention(q, keys, values, mask, None, 0.3, False, 0.0), atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_was_stored_stays(fmt: Format) -> None:
    given, _ = operands(4, 2, fmt)
    _, keys, values = op(*given, None, None, 0.3, False, 0.0, str(fmt), str(fmt))
    assert torch.equal(keys[:, :, :4], given[3])
    assert torch.equal(values[:, :, :4], given[4])
    assert torch.equal(keys[:, :, 4:], encode(given[1], given[5], fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fake_results_are_like_real_ones(fmt: Format) -> None:
    given, _ = operands(4, 2, fmt)
    torch.library.opcheck(
        op.default,
        (*given, None, None, 0.3, False, 0.0, str(fmt), str(fmt)),
        test_utils=("test_schema", "test_faketensor"),
    )
