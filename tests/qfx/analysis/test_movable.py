"""qfx.analysis.movable: what moves with heads, and what fixes their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qfx.analysis import attentions
from qfx.analysis.movable import Along, movable
from qfx.passes.permute_heads import Moved, Site, apply
from tests.graphs import Function
from tests.rewriting import Case, zoo

HEADS, DIM, TOKENS = 4, 8, 5
WIDTH = HEADS * DIM
REVERSED = (3, 2, 1, 0)

Forward = Callable[[Any, Tensor], Any]


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    out: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return out


def join(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def case(forward: Forward, **further: Any) -> Case:
    """Projections q, k, v, o in f64, and what a test adds."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(16, WIDTH) for name in "qkv"} | {"o": nn.Linear(WIDTH, 16)}
    model = Function(forward, **{**layers, **further}).double()
    return Case(model, (torch.randn(2, TOKENS, 16, dtype=torch.float64),), {})


def found(one: Case) -> list[Along] | str:
    (attention,) = attentions.find(one.copies()[0])[0]
    return movable(attention)


def reverse(one: Case, moved: list[Along]) -> Site:
    parts = (Moved(a.weight, a.bias, a.axis, a.starts, a.width, REVERSED[-len(a.starts) :]) for a in moved)
    return Site("a", tuple(parts))


def exact(one: Case) -> list[Along]:
    """What moves along; the order turned round, graph and live model compute the same."""
    moved = found(one)
    assert not isinstance(moved, str), moved
    for module in one.copies():
        apply(module, reverse(one, moved))
        assert one.error(module) < 1e-14
    return moved


def needed(one: Case, name: str) -> None:
    """Negative control: it matters that this tensor moves along."""
    moved = found(one)
    assert not isinstance(moved, str)
    rest = [a for a in moved if a.weight != name]
    assert len(rest) == len(moved) - 1
    gm, _ = one.copies()
    apply(gm, reverse(one, rest))
    assert one.error(gm) > 1e-3


def plain(own: Any, x: Tensor) -> Any:
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)))))


def test_the_projections_move() -> None:
    moved = exact(case(plain))
    starts = tuple(range(0, WIDTH, DIM))
    assert moved == [
        Along("query", "q.weight", "q.bias", 0, starts, DIM),
        Along("kv", "k.weight", "k.bias", 0, starts, DIM),
        Along("kv", "v.weight", "v.bias", 0, starts, DIM),
        Along("query", "o.weight", None, 1, starts, DIM),
    ]


def biased(own: Any, x: Tensor) -> Any:
    """ALiBi with slopes that are a buffer, or any parameter."""
    far = torch.arange(TOKENS, device=x.device).double()
    bias = own.slopes[:, None, None] * (far[None] - far[:, None]).abs()
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=bias.unsqueeze(0))))


def test_slopes_move_along() -> None:
    one = case(biased, slopes=torch.tensor([0.5, -0.25, 2.0, 1.0]))
    assert exact(one)[-1] == Along("query", "slopes", None, 0, (0, 1, 2, 3), 1)
    needed(one, "slopes")


def with_table(own: Any, x: Tensor) -> Any:
    """A bias looked up for each distance, as in T5."""
    at = torch.arange(TOKENS, device=x.device)
    table = own.table((at[None] - at[:, None]).abs())
    bias = table.permute(2, 0, 1).unsqueeze(0).expand(2, -1, -1, -1)
    hidden = (at[None] > at[:, None]).double() * -3.0
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=bias * 4.0 + hidden)))


def test_tables_of_position_biases_move_along() -> None:
    one = case(with_table, table=nn.Embedding(TOKENS, HEADS))
    assert exact(one)[-1] == Along("query", "table.weight", None, 1, (0, 1, 2, 3), 1)
    needed(one, "table.weight")


def with_index(own: Any, x: Tensor) -> Any:
    """A bias looked up by index, as in Swin."""
    at = torch.arange(TOKENS, device=x.device)
    bias = own.table[(at[None] - at[:, None]).abs().flatten()].view(TOKENS, TOKENS, HEADS).permute(2, 0, 1)
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=bias[None])))


def test_indexed_tables_move_along() -> None:
    one = case(with_index, table=torch.randn(TOKENS, HEADS))
    assert exact(one)[-1].weight == "table"
    needed(one, "table")


@pytest.mark.slow
def test_sinks_move_along() -> None:
    one = zoo("gpt_oss")
    for attention in attentions.find(one.copies()[0])[0]:
        moved = movable(attention)
        assert not isinstance(moved, str)
        assert moved[-1].weight.endswith("sinks") and moved[-1].starts == (0, 1, 2, 3) and moved[-1].width == 1
        assert [a.of for a in moved] == ["query", "kv", "kv", "query", "query"]


def test_a_mask_that_is_the_same_for_all_heads_needs_nothing() -> None:
    def forward(own: Any, x: Tensor) -> Any:
        mask = torch.zeros(2, 1, TOKENS, TOKENS, dtype=x.dtype) + own.shared
        return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=mask)))

    assert len(exact(case(forward, shared=torch.randn(TOKENS, TOKENS)))) == 4


def norm_of_each(own: Any, x: Tensor) -> Any:
    q, k = own.qn(split(own.q(x))), own.kn(split(own.k(x)))
    return own.o(join(sdpa(q, k, split(own.v(x)))))


def test_norms_of_each_head_stay() -> None:
    assert len(exact(case(norm_of_each, qn=nn.RMSNorm(DIM), kn=nn.LayerNorm(DIM)))) == 4


def over_all(own: Any, x: Tensor) -> Any:
    """Norms over all heads (OLMo 2), a gain, and a bias of its own."""
    q, k = split(own.qn(own.q(x)) * own.gain), split(own.kn(own.k(x)) * 0.5)
    return own.o(join(sdpa(q, k, split(own.v(x) + own.shift))))


def test_norms_gains_and_shifts_of_all_heads_move_along() -> None:
    further: dict[str, Any] = {"qn": nn.RMSNorm(WIDTH), "kn": nn.LayerNorm(WIDTH)}
    further |= {name: torch.rand(WIDTH) + 0.5 for name in ("gain", "shift")}
    for norm in (further["qn"], further["kn"]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    one = case(over_all, **further)
    names = {"qn.weight": "query", "kn.weight": "kv", "kn.bias": "kv", "gain": "query", "shift": "kv"}
    assert {a.weight: a.of for a in exact(one)[4:]} == names
    for name in names:
        if name != "kn.bias":  # the same for all keys: it drops out of the softmax
            needed(one, name)


def partly_turned(own: Any, x: Tensor) -> Any:
    """A rotary embedding of half of each head (GPT-NeoX)."""
    turn = torch.arange(TOKENS, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype).repeat(2)

    def turned(value: Tensor) -> Tensor:
        some, rest = value[..., : DIM // 2], value[..., DIM // 2 :]
        a, b = some.chunk(2, -1)
        return torch.cat((some * turn.cos() + torch.cat((-b, a), -1) * turn.sin(), rest), -1)

    return own.o(join(sdpa(turned(split(own.q(x))), turned(split(own.k(x))), split(own.v(x)))))


def test_partial_rotary_embeddings() -> None:
    assert len(exact(case(partly_turned))) == 4


def one_key(own: Any, x: Tensor) -> Any:
    """One KV head among the rows of a fused projection, picked by a constant index (Falcon)."""
    fused = own.q(x).unflatten(-1, (HEADS, DIM))
    q, k, v = fused[:, :, :-2].transpose(1, 2), *(fused[:, :, [i]].transpose(1, 2) for i in (-2, -1))
    return own.back(join(sdpa(q, k, v, enable_gqa=True)))


def test_heads_that_are_picked_by_index() -> None:
    one = case(one_key, back=nn.Linear((HEADS - 2) * DIM, 16))
    moved = found(one)
    assert not isinstance(moved, str), moved
    assert [(a.weight, a.starts) for a in moved] == [
        ("q.weight", (0, 8)), ("q.weight", (16,)), ("q.weight", (24,)), ("back.weight", (0, 8))
    ]  # fmt: skip
    swap = Site("a", tuple(Moved(a.weight, a.bias, a.axis, a.starts, a.width, (1, 0)[-len(a.starts) :]) for a in moved))
    for module in one.copies():
        apply(module, dataclasses.replace(swap, moved=tuple(p for p in swap.moved if len(p.starts) > 1)))
        assert one.error(module) < 1e-14


# Refusals


def shared(own: Any, x: Tensor) -> Any:
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.k(x)))))


def gated(own: Any, x: Tensor) -> Any:
    v = own.v(x)
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(v)))), v.exp()


def returned(own: Any, x: Tensor) -> Any:
    k = split(own.k(x))
    return own.o(join(sdpa(split(own.q(x)), k, split(own.v(x))))), k


def constant(own: Any, x: Tensor) -> Any:
    slopes = torch.tensor([0.5, -0.25, 2.0, 1.0], dtype=x.dtype)[None, :, None, None]
    bias = slopes * torch.ones(1, 1, TOKENS, TOKENS, dtype=x.dtype)
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=bias)))


def computed(own: Any, x: Tensor) -> Any:
    bias = split(own.back(x)).mean(-1, keepdim=True) @ torch.ones(1, TOKENS, dtype=x.dtype)
    return own.o(join(sdpa(split(own.q(x)), split(own.k(x)), split(own.v(x)), attn_mask=bias)))


def halves(own: Any, x: Tensor) -> Any:
    q = own.middle(own.q(x).unflatten(-1, (2, -1))).flatten(-2)
    return own.o(join(sdpa(split(q), split(own.k(x)), split(own.v(x)))))


def read_twice(own: Any, x: Tensor) -> Any:
    return biased(own, x), own.slopes * 2


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (gated, "%exp reads its heads, too"),
        (returned, "%output reads its heads, too"),
        (constant, "its mask differs by head, a constant made in the forward"),
        (computed, "its mask differs by head, computed by %matmul"),
        (read_twice, "its mask differs by head, by slopes, which %mul_1 reads, too"),
        (lambda own, x: (plain(own, x), x @ own.q.weight.t().exp()), "its weight q.weight is also used by %exp"),
        (lambda own, x: plain(own, own.back(plain(own, x))), "also used by"),
        (halves, "does not treat its heads alike"),
        (shared, "two roles share channels of k.weight"),
    ],
)
def test_refusals(forward: Forward, reason: str) -> None:
    one = case(forward, slopes=torch.randn(HEADS), back=nn.Linear(16, 16), middle=nn.RMSNorm(WIDTH // 2))
    attention = attentions.find(one.copies()[0])[0][0]
    said = movable(attention)
    assert isinstance(said, str) and reason in said, said


def test_roles_without_a_linear_are_named() -> None:
    one = case(lambda own, x: own.o(join(sdpa(split(own.q(x)).tanh(), split(own.k(x)), split(own.v(x)).tanh()))))
    assert found(one) == "the heads of q and v are not known"


@pytest.mark.slow
def test_a_table_that_two_layers_read() -> None:
    """T5 computes its position bias once: the order of one layer's heads is that of all of them."""
    for attention in attentions.find(zoo("t5").copies()[0])[0][:2]:
        said = movable(attention)
        assert isinstance(said, str) and "relative_attention_bias.weight, which %" in said


@pytest.mark.slow
def test_slopes_that_the_forward_computes() -> None:
    said = movable(attentions.find(zoo("bloom").copies()[0])[0][0])
    assert isinstance(said, str) and said.startswith("its mask differs by head, computed by %")
