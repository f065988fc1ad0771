from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfx.analysis.attentions import Projection, find, projections
from tests.qfx.analysis.models import captured, of_zoo
from tests.zoo import ZOO

DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe", "gpt_oss")
HEAD = 16


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_every_model_of_the_zoo_tells_its_heads(name: str) -> None:
    """MHA, GQA, MQA, cross-attention, packed qkv, partial RoPE, scaled queries, norms before the split."""
    gm, _, _ = of_zoo(name)
    found, notes = find(gm)
    assert found and not notes
    for attention in found:
        roles = dict(projections(attention))
        assert list(roles) == ["q", "k", "v", "o"]
        assert attention.kv_heads == (2 if name in DECODERS else 1 if name == "falcon" else 4)
        for role, projection in roles.items():
            assert projection.cuts
            count = attention.heads if role in "qo" else attention.kv_heads
            assert len(set(projection.starts)) == count, (role, projection)


def test_grouped_queries() -> None:
    gm, _, _ = of_zoo("llama")
    (first, _), notes = find(gm)
    name = "model.layers.0.self_attn"
    assert not notes and first.groups == (0, 0, 1, 1) and first.heads == 4 and first.kv_heads == 2
    assert first.q == Projection(f"{name}.q_proj", (0, 16, 32, 48), HEAD, 64)
    assert first.k == Projection(f"{name}.k_proj", (0, 16), HEAD, 32)
    assert first.o == Projection(f"{name}.o_proj", (0, 16, 32, 48), HEAD, 64)


PACKED = {  # rows of q, k and v, and of all: side by side; head by head; side by side with fewer key heads
    "gpt2": ((0, 16, 32, 48), (64, 80, 96, 112), (128, 144, 160, 176), 192),
    "gpt_neox": ((0, 48, 96, 144), (16, 64, 112, 160), (32, 80, 128, 176), 192),
    "phi3": ((0, 16, 32, 48), (64, 80), (96, 112), 128),
}


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow), "phi3"])
def test_one_matrix_for_q_k_and_v(name: str) -> None:
    (first, *_), notes = find(of_zoo(name)[0])
    assert not notes
    *rows, size = PACKED[name]
    for projection, starts in zip((first.q, first.k, first.v), rows, strict=True):
        assert projection is not None
        assert (projection.starts, projection.width, projection.size) == (starts, HEAD, size)
    assert len({p.fqn for p in (first.q, first.k, first.v) if p is not None}) == 1


def test_one_key_head_picked_by_an_index() -> None:
    """Falcon reads its only key and value head as rows 4 and 5 of its fused projection."""
    (first, *_), _ = find(of_zoo("falcon")[0])
    assert first.k is not None and first.v is not None
    assert (set(first.k.starts), set(first.v.starts), first.k.size) == ({64}, {80}, 96)


@pytest.mark.slow
def test_cross_attention_reads_keys_of_the_encoder() -> None:
    found, _ = find(of_zoo("t5")[0])
    cross = [a for a in found if a.k is not None and "EncDecAttention" in a.k.fqn]
    assert len(cross) == 2 and all(a.q is not None and "EncDecAttention" in a.q.fqn for a in cross)


class Attention(nn.Module):
    """Two heads of 8; `change` may touch q [B, 2, T, 8], `after` the result [B, T, 16]."""

    def __init__(self, change: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.change, self.after = change, after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.change(q) * self.gain, k, v)
        return self.o(self.after(y.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("change", "after", "role", "reason"),
    [
        (torch.tanh, same, "q", "it does not come straight from a linear"),
        (lambda q: q + q.flip(1), same, "q", "it does not come straight from a linear"),
        (lambda q: torch.cat([q[..., 4:], q[..., :4]], -1).flip(-1), same, "q", "straight from a linear"),
        (lambda q: q.transpose(1, 2).reshape(2, 5, 8, 2).permute(0, 3, 1, 2), same, "q", "do not lie together"),
        (same, torch.relu, "o", "its result is not read by one linear alone"),
        (same, lambda y: y.view(2, 5, 2, 8).transpose(2, 3).flatten(2), "o", "do not lie together"),
    ],
)
def test_what_cannot_be_told_has_a_reason(
    change: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], role: str, reason: str
) -> None:
    gm, _, _ = captured(Attention(change, after).eval(), [{"x": torch.randn(2, 5, 16)}])
    ((found,), notes) = find(gm)
    assert getattr(found, role) is None
    assert [n for n in notes if f"{role!r} cannot be split by heads" in n.reason and reason in n.reason], notes
    assert {name for name, _ in projections(found)} == set("qkvo") - {role}


def test_scales_and_halves_of_a_head_are_passed_through() -> None:
    """Negative control of the refusals above: a gain, a number, and halves put back in another order."""
    gm, _, _ = captured(
        Attention(lambda q: torch.cat([q[..., 4:] * 2, q[..., :4] / 3], -1), same).eval(),
        [{"x": torch.randn(2, 5, 16)}],
    )
    ((found,), notes) = find(gm)
    assert not notes and found.q == Projection("q", (0, 8), 8, 16)


def test_parts_that_are_not_equal_do_not_cut() -> None:
    assert Projection("p", (0, 16), 16, 32).cuts
    assert not Projection("p", (8, 24), 16, 48).cuts, "a head begins inside a part"
    assert not Projection("p", (0, 16), 16, 40).cuts, "the last part would be shorter"
