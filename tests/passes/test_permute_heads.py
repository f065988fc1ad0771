"""qfx.passes.permute_heads: rows and columns of heads in another order, in graphs and live models."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from qfx import graph
from qfx.analysis import attentions
from qfx.analysis.movable import movable
from qfx.errors import UnsupportedError
from qfx.passes import permute_heads
from qfx.passes.permute_heads import Moved, Site
from qfx.passes.rewrites import apply_record, check_record
from tests.graphs import text
from tests.passes.test_v_o import DIM, HEADS, KV, grouped
from tests.rewriting import Case, zoo

KEPT = ([5, 4, 6, 7, 1, 0, 2, 3], [2, 3, 0, 1])  # KV heads with their query heads, which change places within a group


@lru_cache(maxsize=1)
def case() -> Case:
    """8 query and 4 KV heads with biases, in f64; its copies are changed."""
    return grouped()


def copies(one: Case) -> tuple[fx.GraphModule, Any]:
    """A graph and a live model."""
    return one.copies()


def site_of(one: Case, query: list[int], kv: list[int]) -> Site:
    gm, _ = one.copies()
    attention = attentions.find(gm)[0][0]
    found = movable(attention)
    assert not isinstance(found, str), found
    orders = {"query": tuple(query), "kv": tuple(kv)}
    moved = (Moved(a.weight, a.bias, a.axis, a.starts, a.width, orders[a.of]) for a in found)
    return Site(attention.name, tuple(moved))


def test_exact_in_a_graph_and_a_live_model() -> None:
    one = case()
    gm, live = copies(one)
    before = text(gm)
    site = site_of(one, *KEPT)
    record = json.loads(json.dumps(site.to_record()))
    assert Site.from_record(record) == site and record["name"] == "permute-heads"
    check_record(live, record, {})
    for module in (gm, live):
        apply_record(module, record, {})
        assert one.error(module) < 1e-14
    assert text(gm) == before and one.untouched()
    heads = one.before["q.weight"].unflatten(0, (HEADS, DIM))
    assert torch.equal(live.q.weight.unflatten(0, (HEADS, DIM)), heads[KEPT[0]])
    assert torch.equal(live.v.bias.unflatten(0, (KV, DIM)), one.before["v.bias"].unflatten(0, (KV, DIM))[KEPT[1]])
    columns = one.before["o.weight"].unflatten(1, (HEADS, DIM))
    assert torch.equal(live.o.weight.unflatten(1, (HEADS, DIM)), columns[:, KEPT[0]])
    assert torch.equal(live.o.bias, one.before["o.bias"])


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(KV)), st.lists(st.booleans(), min_size=KV, max_size=KV))
def test_any_order_of_groups_and_within_them(kv: list[int], turned: list[bool]) -> None:
    one = case()
    query = [h for g in kv for h in ((2 * g + 1, 2 * g) if turned[g] else (2 * g, 2 * g + 1))]
    gm, _ = one.copies()
    permute_heads.apply(gm, site_of(one, query, list(kv)))
    assert one.error(gm) < 1e-14


def test_negative_control_across_groups() -> None:
    """A query head that reads another KV head than before."""
    one = case()
    gm, live = copies(one)
    site = site_of(one, [2, 1, 0, *range(3, HEADS)], list(range(KV)))
    for module in (gm, live):
        permute_heads.apply(module, site)
        assert one.error(module) > 0.1


@pytest.mark.parametrize("forgotten", range(4))
def test_negative_control_one_tensor_is_forgotten(forgotten: int) -> None:
    one = case()
    gm, _ = one.copies()
    site = site_of(one, *KEPT)
    permute_heads.apply(gm, dataclasses.replace(site, moved=site.moved[:forgotten] + site.moved[forgotten + 1 :]))
    assert one.error(gm) > 0.1


@pytest.mark.parametrize("bias", ["q", "k", "v"])
def test_negative_control_a_bias_is_forgotten(bias: str) -> None:
    one = case()
    gm, _ = one.copies()
    site = site_of(one, *KEPT)
    moved = tuple(dataclasses.replace(m, bias=None) if m.bias == f"{bias}.bias" else m for m in site.moved)
    assert moved != site.moved
    permute_heads.apply(gm, dataclasses.replace(site, moved=moved))
    # without positions, what a key's bias adds is the same for all keys of a row of scores
    assert (one.error(gm) > 1e-3) == (bias != "k")


def test_two_orders_are_one() -> None:
    """Applied twice, an order of two cycles is undone, and records are applied one after the other."""
    one = case()
    gm, _ = one.copies()
    swap = site_of(one, [1, 0, *range(2, HEADS)], list(range(KV)))
    for _ in range(2):
        permute_heads.apply(gm, swap)
    assert all(torch.equal(graph.get_tensor(gm, name), old) for name, old in one.before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_moved_and_never_computed(dtype: torch.dtype) -> None:
    live = copies(case())[1].to(dtype)
    before = live.q.weight.detach().clone()
    permute_heads.apply(live, site_of(case(), *KEPT))
    assert live.q.weight.dtype == dtype
    assert torch.equal(live.q.weight.sort(0).values, before.sort(0).values) and not torch.equal(live.q.weight, before)


def test_fused_projections_keep_what_is_not_moved() -> None:
    fused = zoo("gpt2")
    _, live = copies(fused)
    site = site_of(fused, [3, 1, 2, 0], [3, 1, 2, 0])
    assert len({part.weight for part in site.moved}) == 2 and all(part.axis in (0, 1) for part in site.moved)
    permute_heads.apply(live, site)
    assert fused.error(live) < 1e-5
    name = site.moved[0].weight
    same = [bool(torch.equal(a, b)) for a, b in zip(live.get_parameter(name).t(), fused.before[name].t(), strict=True)]
    assert [all(same[start : start + 16]) for start in range(0, len(same), 16)] == [False, True, True, False] * 3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"order": (0, 0, 1, 2)}, r"\[0, 0, 1, 2\]"),
        ({"order": (0, 1)}, r"an order of 4 heads of 8 among 32 channels, found \[0, 1\]"),
        ({"starts": (0, 8, 16, 28)}, r"at \[0, 8, 16, 28\]"),
    ],
)
def test_orders_that_do_not_fit(changes: dict[str, Any], found: str) -> None:
    part = Moved("k.weight", None, 0, (0, 8, 16, 24), 8, (3, 2, 1, 0))
    model: Any = copies(case())[1]
    before = model.k.weight.detach().clone()
    with pytest.raises(ValueError, match=f"heads of 'k.weight' cannot be ordered: .*{found}"):
        permute_heads.apply(model, Site("a", (dataclasses.replace(part, **changes),)))
    assert torch.equal(model.k.weight, before)


def test_a_model_without_the_layers_is_refused() -> None:
    record = site_of(case(), *KEPT).to_record()
    lacking: Any = copies(case())[1]
    del lacking.k
    for use in (check_record, apply_record):
        with pytest.raises(
            UnsupportedError, match=r"(?s)'permute-heads' does not fit the model.*k.weight, k.bias missing"
        ):
            use(lacking, record, {})
    other = case().copies()[0]
    for name in ("q", "k", "v", "o"):
        delattr(other, name)
    apply_record(other, record, {})  # a graph of another part


def test_tied_names_hold_the_same_tensor_after_it() -> None:
    model: Any = copies(case())[1]
    model.also = nn.Module()
    model.also.weight = model.q.weight
    permute_heads.apply(model, site_of(case(), *KEPT))
    assert model.also.weight is model.q.weight
