from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qfx.ops.floats  # noqa: F401  (registers qfx::attention)
from qfx.analysis.split import is_stored, split
from qfx.kv.formats import CacheFormat

T, D = 23, 8
FORMAT = CacheFormat.from_json({"k": "u4/g4/f16", "v": "i4", "residual": 3, "sinks": 2})


def made(*, heads: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, T, D, generator=random) for _ in range(3))
    return q, k, v, torch.randn(k.shape, generator=random), torch.randn(v.shape, generator=random)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor], seen: Tensor | None = None) -> Tensor:
    """Token by token, as a cache would be read."""
    rows = []
    for i in range(T):
        stored = FORMAT.stored(i)
        at = slice(FORMAT.sinks, FORMAT.sinks + stored)
        keys, values = k[:, :, : i + 1].clone(), v[:, :, : i + 1].clone()
        keys[:, :, at], values[:, :, at] = far[0][:, :, at], far[1][:, :, at]
        scores = q[:, :, i : i + 1] @ keys.transpose(-1, -2) / D**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[i, : i + 1], -torch.inf)
        rows.append(scores.softmax(-1) @ values)
    return torch.cat(rows, 2)


def test_which_keys_are_read_from_the_codes() -> None:
    found = is_stored(FORMAT, T, torch.device("cpu"))
    assert found[8].nonzero().flatten().tolist() == []  # 8 - 2 - 3 = 3 tokens are no group of 4
    assert found[9].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert found[T - 1].nonzero().flatten().tolist() == list(range(2, 18))
    assert not found.triu().any()  # never the token itself


@pytest.mark.parametrize("mask", ["causal", "bool", "float", "window"])
def test_it_is_attention_one_token_at_a_time(mask: str) -> None:
    q, k, v, *far = made()
    before = torch.ones(T, T, dtype=torch.bool).tril()
    seen = before & ~before.tril(-9) if mask == "window" else before
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "is_causal": mask == "causal"}
    if mask in ("bool", "window"):
        given["attn_mask"] = seen
    elif mask == "float":
        given["attn_mask"] = torch.zeros(T, T).masked_fill(~seen, -torch.inf)
    found = split(given, (far[0], far[1]), FORMAT)
    assert found is not None
    wanted = one_by_one(q, k, v, (far[0], far[1]), seen)
    torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(**found), wanted)


def test_the_other_operator_takes_it_too() -> None:
    q, k, v, *far = made()
    given = {"q": q, "k": k, "v": v, "mask": None, "sinks": None, "scale": D**-0.5, "causal": True, "softcap": 0.0}
    found = split(given, (far[0], far[1]), FORMAT)
    assert found is not None
    result = torch.ops.qfx.attention.default(*found.values())
    torch.testing.assert_close(result, one_by_one(q, k, v, (far[0], far[1])))


def test_the_same_codes_as_values_change_nothing() -> None:
    q, k, v, *_ = made()
    given = {"query": q, "key": k, "value": v, "is_causal": True}
    found = split(given, (k, v), FORMAT)
    assert found is not None
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(**found), attend(q, k, v, is_causal=True))


def test_attention_over_other_tokens_is_left_alone() -> None:
    q, k, v, *far = made()
    assert split({"query": q[:, :, :3], "key": k, "value": v}, (far[0], far[1]), FORMAT) is None
