"""qfx.passes.v_o: any invertible matrix per KV head between values and output projection."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qfx import annotation, graph
from qfx.format import Format
from qfx.passes import _edits as edits
from qfx.passes import v_o
from qfx.passes.smooth import choose
from qfx.passes.v_o import Site
from tests.graphs import Function, text
from tests.passes.test_smooth import watched
from tests.rewriting import Case, check, cleaned, positive, zoo

HEADS, KV, DIM = 8, 4, 8


def scaled(site: Site) -> Tensor:
    return positive(len(site.starts), site.head_dim)


def turned(site: Site) -> Tensor:
    """An orthogonal matrix per KV head, scaled."""
    noise = torch.randn(len(site.starts), site.head_dim, site.head_dim, generator=torch.Generator().manual_seed(0))
    turn: Tensor = torch.linalg.qr(noise.double())[0]
    return turn * 1.7


def grouped(dtype: torch.dtype = torch.float64) -> Case:
    """Grouped-query attention with biases, 8 query and 4 key and value heads."""

    def forward(own: Any, x: Tensor) -> Any:
        q = own.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (KV, DIM)).transpose(1, 2) for f in (own.k, own.v))
        z = sdpa(q, k.repeat_interleave(HEADS // KV, 1), v.repeat_interleave(HEADS // KV, 1), is_causal=True)
        return own.o(z.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    wide, narrow = HEADS * DIM, KV * DIM
    layers = {
        "q": nn.Linear(16, wide),
        "k": nn.Linear(16, narrow),
        "v": nn.Linear(16, narrow),
        "o": nn.Linear(wide, 16),
    }
    return Case(Function(forward, **layers).to(dtype), (torch.randn(2, 5, 16, dtype=dtype),), {})


@pytest.mark.parametrize("factor", [scaled, turned])
@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("gpt2", 2), ("llama", 2), ("phi3", 2), ("t5", 6)])
def test_exact(name: str, count: int, factor: Any) -> None:
    sites, refusals = check(zoo(name), v_o, factor)
    assert len(sites) == count and refusals == []


@pytest.mark.parametrize("factor", [scaled, turned])
def test_exact_in_double_precision(factor: Any) -> None:
    check(grouped(), v_o, factor, limit=1e-13)


def test_sites_tell_the_layout() -> None:
    site = v_o.find(grouped().copies()[0])[0][0]
    assert site.starts == (0, 8, 16, 24) and site.heads == (0, 0, 1, 1, 2, 2, 3, 3) and site.head_dim == DIM
    fused = v_o.find(zoo("gpt2").copies()[0])[0][0]
    assert fused.starts == (128, 144, 160, 176) and fused.heads == (0, 1, 2, 3)
    assert (fused.v.inp, fused.v.out) == (0, 1)
    llama = v_o.find(zoo("llama").copies()[0])[0][0]
    assert llama.starts == (0, 16) and llama.heads == (0, 0, 1, 1)


def test_the_text_stays() -> None:
    gm, _ = grouped().copies()
    before = text(gm)
    site = v_o.find(gm)[0][0]
    v_o.apply(gm, site, scaled(site))
    assert text(gm) == before


def test_negative_control_one_query_head_of_the_group_only() -> None:
    for factor in (scaled, turned):
        case = grouped()
        gm, _ = case.copies()
        site = v_o.find(gm)[0][0]
        original = graph.get_tensor(gm, site.o.weight)
        v_o.apply(gm, site, factor(site))

        def forgetful(new: Tensor, original: Tensor = original) -> Tensor:
            """The columns of every second query head as they were."""
            columns = [c for c in range(HEADS * DIM) if c // DIM % 2]
            new = new.clone()
            new[:, columns] = original.detach().to(new)[:, columns]
            return new

        edits.edit(gm, site.o.weight, forgetful)
        assert case.error(gm) > 0.3


def test_negative_control_another_group() -> None:
    case = grouped()
    gm, _ = case.copies()
    site = v_o.find(gm)[0][0]
    v_o.apply(gm, dataclasses.replace(site, heads=(0, 1, 2, 3, 0, 1, 2, 3)), scaled(site))
    assert case.error(gm) > 0.3


def heads(value: Tensor) -> Tensor:
    split: Tensor = value.unflatten(-1, (2, 4))
    return split.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z: Tensor = sdpa(heads(q), heads(k), heads(v))
    return z.transpose(1, 2).flatten(2)


def mixed(own: Any, x: Tensor) -> Any:
    return own.o(sdpa(heads(x), heads(x), heads(own.v(x))).permute(0, 2, 3, 1).flatten(2))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda own, x: own.o(attend(own.v(x), own.v(x), own.v(x))), "reads the values, too"),
        (lambda own, x: (own.o(attend(x, x, own.v(x))), own.v(x).exp()), "reads the values, too"),
        (lambda own, x: own.o(attend(x, x, x)), "do not come straight from a linear"),
        (lambda own, x: own.o(attend(x, x, own.v(x).relu())), "do not come straight from a linear"),
        (lambda own, x: own.o(attend(x, x, own.v(x)) * x.sigmoid()), "not read by one linear alone"),
        (mixed, "side by side"),
        (lambda own, x: own.v(own.o(attend(x, x, own.v(x)))), "also used by"),
    ],
)
def test_refusals(forward: Any, reason: str) -> None:
    gm = cleaned(Function(forward, v=nn.Linear(8, 8), o=nn.Linear(8, 8)), torch.randn(2, 3, 8))
    sites, refusals = v_o.find(gm)
    assert sites == [] and reason in refusals[0].reason


def test_bad_factors() -> None:
    gm, _ = grouped().copies()
    site = v_o.find(gm)[0][0]
    with pytest.raises(ValueError, match=r"expected factors \[4, 8\] or \[4, 8, 8\], found \[8, 8\]"):
        v_o.apply(gm, site, torch.ones(8, 8))


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothing_gives_one_factor_per_kv_head(alpha: Any) -> None:
    """Value channels that are 100 times larger, and smaller output columns: the factors find and undo it."""
    case = grouped(torch.float32)
    gm, _ = case.copies()
    site = v_o.find(gm)[0][0]
    hurt = torch.ones(KV, DIM)
    hurt[1, 3], hurt[3, 0] = 0.01, 0.01
    v_o.apply(gm, site, hurt)
    for node in gm.graph.nodes:
        if graph.fqn_of(node) == "o":
            annotation.set(node, "x", Format("u8"))
            annotation.set(node, "w", Format.parse("i8/ch"))
    stats = watched(gm, [case.flat])
    chosen, notes = v_o.smooth(gm, stats, chooser=functools.partial(choose, alpha=alpha))
    assert notes == [] and chosen[0][0] == site
    factor = chosen[0][1]
    assert factor.shape == (KV, DIM)
    typical = float(factor.median())
    assert float(factor[1, 3]) > 20 * typical and float(factor[3, 0]) > 20 * typical
    assert v_o.smooth(gm, stats, skip=["o"]) == ([], [])
    v_o.apply(gm, *chosen[0])
    assert case.error(gm) < 1e-5
