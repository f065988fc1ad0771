"""qfx.passes.smooth_k: one factor for each pair of key channels, undone in the queries."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

from qfx import graph
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.passes import _sites as sites_of
from qfx.passes import smooth_k
from qfx.passes.calibrate import observed
from qfx.passes.smooth_k import Site
from tests.graphs import Function, text
from tests.rewriting import Case, check, cleaned, positive, zoo
from tests.zoo import randomize

HEADS, KV, DIM, TOKENS, WIDTH = 4, 2, 8, 6, 16
ROPE = ("halves", "neighbours", "part", "none", "norms", "wide norms", "unit norms", "fused", "written")


def rotated(x: Tensor, neighbours: bool = False) -> Tensor:
    """RoPE of [B, H, T, D], spelled out as models do."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(half, dtype=x.dtype)
    if neighbours:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        wide = angles.repeat_interleave(2, -1)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        wide = torch.cat((angles, angles), -1)
    return x * wide.cos() + turned * wide.sin()


class Unit(nn.Module):
    """Gemma's norm: the gain is 1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


def split(x: Tensor) -> Tensor:
    parted: Tensor = x.unflatten(-1, (-1, DIM))
    return parted.transpose(1, 2)


def written(x: Tensor) -> Tensor:
    """The second half of each head rotated, both halves written into an empty tensor (DeepSeek)."""
    found = x.new_empty(x.shape)
    found[..., :4] = x[..., :4]
    found[..., 4:] = rotated(x[..., 4:])
    return found


def forward(own: Any, x: Tensor) -> Any:
    if own.rope == "fused":
        q, k, v = own.qkv(x).split([HEADS * DIM, KV * DIM, KV * DIM], -1)
    else:
        q, k, v = own.q(x), own.k(x), own.v(x)
    if own.rope == "wide norms":
        q, k = own.q_norm(q), own.k_norm(k)
    q, k, v = split(q), split(k), split(v)
    if own.rope in ("norms", "unit norms"):
        q, k = own.q_norm(q), own.k_norm(k)
    if own.rope == "part":
        q, k = (torch.cat((rotated(t[..., :4]), t[..., 4:]), -1) for t in (q, k))
    elif own.rope == "written":
        q, k = written(q), written(k)
    elif own.rope != "none":
        q, k = (rotated(t, own.rope == "neighbours") for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
    return own.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def layers(rope: str) -> dict[str, nn.Module]:
    wide, narrow = HEADS * DIM, KV * DIM
    made: dict[str, nn.Module] = {"o": nn.Linear(wide, WIDTH)}
    if rope == "fused":
        return {**made, "qkv": nn.Linear(WIDTH, wide + 2 * narrow)}
    made |= {"q": nn.Linear(WIDTH, wide), "k": nn.Linear(WIDTH, narrow), "v": nn.Linear(WIDTH, narrow)}
    kind: Any = {"norms": nn.RMSNorm, "wide norms": nn.LayerNorm, "unit norms": Unit}.get(rope)
    if kind is not None:
        sizes = (wide, narrow) if rope == "wide norms" else (DIM, DIM)
        made |= {"q_norm": kind(sizes[0]), "k_norm": kind(sizes[1])}
        for norm in (made["q_norm"], made["k_norm"]):
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.3)
    return made


@lru_cache(maxsize=32)
def case(rope: str, dtype: torch.dtype = torch.float32, outlier: float = 1.0) -> Case:
    """Grouped queries with biases. outlier: of key channels 2 and 6 of the second KV head, undone in its queries."""
    torch.manual_seed(0)
    model: Any = Function(forward, **layers(rope)).to(dtype)
    model.rope = rope
    if outlier != 1:
        with torch.no_grad():
            for channel in (2, 6):
                for parameter in (model.k.weight, model.k.bias):
                    parameter[DIM + channel] *= outlier
                for head in (2, 3):
                    for parameter in (model.q.weight, model.q.bias):
                        parameter[head * DIM + channel] /= outlier
    return Case(model, (torch.randn(3, TOKENS, WIDTH, dtype=dtype),), {})


def attention(gm: fx.GraphModule) -> fx.Node:
    found: fx.Node = next(n for n in gm.graph.nodes if graph.schema_name(n) in sites_of.ATTENTION)
    return found


def factor(site: Site) -> Tensor:
    return positive(site.factors)


@pytest.mark.parametrize("rope", ROPE)
def test_exact(rope: str) -> None:
    sites, refusals = check(case(rope), smooth_k, factor)
    assert len(sites) == 1 and refusals == []
    if rope == "unit norms":
        assert sites[0].keys[0].plus_one


@pytest.mark.parametrize("rope", ["halves", "unit norms"])
def test_exact_in_double_precision(rope: str) -> None:
    check(case(rope, torch.float64), smooth_k, factor, limit=1e-13)


MODELS = ("bloom", "falcon", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "gptj", "olmo2", "phi3", "qwen3", "t5", "whisper")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_exact_on_models(name: str) -> None:
    sites, refusals = check(zoo(name), smooth_k, factor)
    assert len(sites) == (6 if name in ("t5", "whisper") else 2) and refusals == []


@pytest.mark.slow
def test_exact_on_latent_attention() -> None:
    """DeepSeek: keys are a part of each head and a rotated part that all heads share, from two projections."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ranks = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = transformers.DeepseekV3Config(
        **sizes, **ranks, num_key_value_heads=4, vocab_size=64, first_k_dense_replace=1, max_position_embeddings=32
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    randomize(model, 0)
    held = Case(model, (), {"input_ids": torch.arange(3, 13).reshape(2, 5), "use_cache": False})
    ((site,), refusals) = check(held, smooth_k, factor)
    assert refusals == [] and [len(parts) for parts in (site.keys, site.queries)] == [2, 1]


def test_the_text_stays() -> None:
    gm, _ = case("halves").copies()
    before = text(gm)
    smooth_k.apply(gm, smooth_k.find(gm)[0][0], positive(8))
    assert text(gm) == before


def broken(rope: str, keys: Any, queries: Any = None) -> float:
    """The error with other runs in place of those that were found."""
    held = case(rope)
    gm, _ = held.copies()
    site = smooth_k.find(gm)[0][0]
    k, q = (
        tuple(dataclasses.replace(part, runs=part.runs if runs is None else runs) for part in own)
        for own, runs in ((site.keys, keys), (site.queries, queries))
    )
    smooth_k.apply(gm, Site(site.attention, k, q, 16), positive(16))
    return held.error(gm)


def test_negative_control_a_factor_for_each_channel() -> None:
    """Without RoPE it keeps the function, behind RoPE it does not."""
    keys = ((0, 1, 16, 0),)
    queries = tuple((head * DIM, 1, DIM, head // 2 * DIM) for head in range(HEADS))
    assert broken("none", keys, queries) < 1e-6
    assert broken("halves", keys, queries) > 0.1


def test_negative_control_the_pairs_of_the_other_kind() -> None:
    keys, queries = ((0, 2, 8, 0), (1, 2, 8, 0)), tuple(
        (head * DIM + at, 2, 4, head // 2 * 4) for head in range(HEADS) for at in (0, 1)
    )  # fmt: skip
    assert broken("neighbours", keys, queries) < 1e-6
    assert broken("halves", keys, queries) > 0.1


def test_negative_control_one_query_head_of_the_group_only() -> None:
    assert broken("halves", None, ((0, 1, 4, 0), (4, 1, 4, 0), (16, 1, 4, 4), (20, 1, 4, 4))) > 0.1


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


def tied(own: Any, x: Tensor) -> Any:
    return sdpa(own.q(x), own.q(x.exp()), x)


def shared(own: Any, x: Tensor) -> Any:
    """Keys of one layer that the next one reads, too."""
    k = own.k(x)
    return sdpa(sdpa(own.q(x), k, x), k, x)


def unwritten(own: Any, x: Tensor) -> Any:
    """Keys of which a part was never written."""
    k = x.new_zeros(x.shape)
    k[..., :4] = own.k(x)[..., :4]
    return sdpa(own.q(x), k, x)


def unknown(own: Any, x: Tensor) -> Any:
    """A rotation that is none of RoPE's."""
    k = own.k(x)
    return sdpa(own.q(x), k * 0.5 + k.roll(1, -1), x)


def normed(own: Any, x: Tensor) -> Any:
    return sdpa(F.rms_norm(own.q(x), (WIDTH,)), F.rms_norm(own.k(x), (WIDTH,)), x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (tied, "q.weight is also used by"),
        (lambda own, x: (y := own.q(x), sdpa(y, y, x))[1], "queries and keys are both made by q.weight"),
        (lambda own, x: (y := own.k(x), sdpa(own.q(x), y, y))[1], "reads them, too"),
        (lambda own, x: (sdpa(own.q(x), y := own.k(x), x), y), "output reads them, too"),
        (lambda own, x: (y := own.k(x), sdpa(own.q(x), y * y.sum(-1, keepdim=True), x))[1], "reads them, too"),
        (shared, "reads them, too"),
        (unwritten, "keys: it does not come straight from a linear, %new_zeros makes it"),
        (unknown, "keys: it does not come straight from a linear, %add makes it"),
        (normed, "queries: the norm has no weight"),
        (lambda own, x: sdpa(own.q(x), x, x), "keys: it does not come straight from a linear"),
        (lambda own, x: sdpa(sdpa(own.q(x), own.k(x), x), own.k(x.exp()), x), "k.weight is also used by"),
    ],
)
def test_refusals(forward: Any, reason: str) -> None:
    gm = cleaned(Function(forward, q=nn.Linear(WIDTH, WIDTH), k=nn.Linear(WIDTH, WIDTH)), torch.randn(2, 3, WIDTH))
    sites, refusals = smooth_k.find(gm)
    assert sites == [] and reason in refusals[0].reason, [note.reason for note in refusals]
    assert refusals[0].reason.startswith("its keys cannot be scaled")


def test_bad_factors() -> None:
    gm, _ = case("halves").copies()
    site = smooth_k.find(gm)[0][0]
    for bad in (torch.ones(7), torch.zeros(8), torch.full((8,), torch.inf)):
        with pytest.raises(ValueError, match=r"expected 8 positive factors for .*, found tensor"):
            smooth_k.apply(gm, site, bad)


def stats(held: Case, gm: fx.GraphModule) -> Any:
    return observed(gm, [held.flat], smooth_k.watch, roles=smooth_k.roles, progress=False)[0]


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_the_factors_find_the_outlier(alpha: Any, observer: str) -> None:
    held = case("halves", outlier=30.0)
    gm, _ = held.copies()
    ((site, found),), notes = smooth_k.smooth(gm, stats(held, gm), alpha=alpha, observer=observer)
    assert notes == [] and int(found.argmax()) == 6, "channel 2 of the second head"
    assert float(found[6]) > 8 * float(found.median())
    smooth_k.apply(gm, site, found)
    assert held.error(gm) < 1e-5
    after = stats(held, gm)[site.attention, "k"].absmax().reshape(KV, DIM)[1]
    assert float(after.max() / after.median()) < 6


def test_the_formula() -> None:
    held = case("halves")
    gm, _ = held.copies()
    seen = stats(held, gm)
    ((site, found),), _ = smooth_k.smooth(gm, seen, alpha=0.3)
    q, k = (seen[site.attention, role].absmax().reshape(-1, DIM) for role in "qk")
    most_k = torch.maximum(k[1, 1], k[1, 5])
    most_q = q[2:, [1, 5]].max()
    assert found[5] == pytest.approx(float(most_k**0.3 / most_q**0.7))


class Rounding(nn.Module):
    """Each token of each head rounded by itself."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.fmt = fmt

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.fmt, activation=True)


def test_rounded_keys_lose_less() -> None:
    """What attention gives for keys in 8 and 4 bits, token by token: factors bring it much nearer."""
    held = case("halves", outlier=30.0)
    errors: dict[tuple[str, bool], float] = {}
    for fmt in ("i8/tok", "u4/tok"):
        for smoothed in (False, True):
            gm, _ = held.copies()
            if smoothed:
                smooth_k.apply(gm, *smooth_k.smooth(gm, stats(held, gm), alpha="search")[0][0])
            node = attention(gm)
            keys: Any = node.args[1]
            gm.rounding = Rounding(Format.parse(fmt))
            with gm.graph.inserting_before(node):
                node.replace_input_with(keys, gm.graph.call_module("rounding", (keys,)))
            errors[fmt, smoothed] = held.error(gm)
    print(errors)
    assert all(errors[fmt, True] < 0.2 * errors[fmt, False] for fmt in ("i8/tok", "u4/tok"))


def test_keys_with_scales_per_channel_are_left() -> None:
    held = case("halves")
    gm, _ = held.copies()
    chosen, notes = smooth_k.smooth(gm, stats(held, gm), formats=lambda node: Format.parse("u4/g32/f16"))
    assert chosen == [] and "with scales for each channel: scaling the channels changes nothing" in notes[0].reason


def test_nothing_seen_is_nothing_chosen() -> None:
    gm, _ = case("halves").copies()
    assert smooth_k.smooth(gm, {}) == ([], [])


def test_two_attentions_of_one_name_are_refused() -> None:
    gm, _ = case("halves").copies()
    node = attention(gm)
    with gm.graph.inserting_before(node):
        other = gm.graph.node_copy(node)
    node.meta["qfx_module"] = "attn"
    other.meta = dict(node.meta)
    _, refusals = smooth_k.find(gm)
    assert len(refusals) == 2 and "2 attentions are called attn.scaled_dot_product_attention" in refusals[0].reason
