"""qfx.passes.rotate_down, rotate_heads and rotate_qk: rotations inside a layer keep the function."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import graph
from qfx.passes import _edits as edits
from qfx.passes import rotate_down, rotate_heads, rotate_qk, v_o
from qfx.passes.rewrites import apply_record
from qfx.passes.rotate import rotate_tensor
from qfx.passes.rotate_down import rotations
from qfx.rewrites import rotation
from tests.graphs import Function, counts, text
from tests.rewriting import Case, check, cleaned, zoo


def nothing(site: Any) -> None:
    return None


# ---- the input of down projections


@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [("llama", 2, 96), ("gpt2", 2, 256), ("opt", 2, 96), *((pytest.param("phi3", 2, 96, marks=pytest.mark.slow)),)],
)
def test_down_exact(name: str, count: int, channels: int) -> None:
    found, refusals = check(zoo(name), rotate_down, nothing, untied=True)
    assert len(found) == count and refusals == []
    assert {site.channels for site in found} == {channels} == {site.block for site in found}


def mlp(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    model = Function(lambda own, x: own.down(F.silu(own.gate(x)) * own.up(x)), **layers)
    return Case(model.to(dtype), (torch.randn(2, 3, 8, dtype=dtype),), {})


@pytest.mark.parametrize(("block", "seed"), [(None, 0), (4, 3), (6, 1)])
def test_down_in_double_precision(block: int | None, seed: int) -> None:
    case = mlp()
    gm, live = case.copies()
    (site,), _ = rotate_down.find(gm, block=block, seed=seed)
    record = json.loads(json.dumps(site.to_record()))
    apply_record(gm, record, {})
    assert case.error(gm) < 1e-14
    apply_record(live, record, {})
    assert case.error(live) > 0.1, "a live model rotates its input in the packed linear"
    down = live.get_submodule("down")
    down.register_forward_pre_hook(lambda _, args: (rotation.rotate(args[0], site.block, seed),))
    assert case.error(live) < 1e-14
    assert rotations([record, {"name": "rotate"}]) == {"down": (block or 12, seed)}


def test_down_before_and_after() -> None:
    gm, _ = mlp().copies()
    (site,), _ = rotate_down.find(gm)
    rotate_down.apply(gm, site)
    lines = text(gm).splitlines()
    assert lines[-3:-1] == [
        "%hadamard: f64[s0,s1,12] = qfx.hadamard(%mul, 12, 0, False)",
        "%linear_2: f64[s0,s1,8] = aten.linear(%hadamard, @down.weight, @down.bias)",
    ]


def test_down_negative_control_the_input_only() -> None:
    case = mlp()
    gm, _ = case.copies()
    (site,), _ = rotate_down.find(gm)
    before = graph.get_tensor(gm, "down.weight").detach()
    rotate_down.apply(gm, site)
    edits.put(gm, "down.weight", nn.Parameter(before))
    assert case.error(gm) > 0.5


def test_linears_that_read_one_value_share_its_rotation() -> None:
    layers = {name: nn.Linear(8, 8) for name in "abc"}
    model = Function(lambda own, x: own.b(own.a(x).relu()) + own.c(own.a(x).relu()), **layers)
    case = Case(model, (torch.randn(2, 8),), {})
    gm, _ = case.copies()
    found, _ = rotate_down.find(gm)
    for site in found:
        rotate_down.apply(gm, site)
    assert len(found) == 2 and counts(gm)["hadamard"] <= counts(gm)["relu"] and case.error(gm) < 1e-6


@pytest.mark.parametrize(
    ("forward", "fixed", "reason"),
    [
        (lambda own, x: own.a(own.a(x).relu()), (), "also used by"),
        (lambda own, x: own.b(own.a(x).relu()), ("b",), "a forward of another module"),
        (lambda own, x: F.linear(own.a(x).relu(), own.b.weight * 2), (), "computed in the graph"),
    ],
)
def test_down_refusals(forward: Any, fixed: tuple[str, ...], reason: str) -> None:
    gm = cleaned(Function(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(2, 8))
    found, refusals = rotate_down.find(gm, fixed=fixed)
    assert found == [] and reason in refusals[0].reason


def test_down_takes_only_what_an_activation_made() -> None:
    gm, _ = zoo("mixtral").copies()
    found, refusals = rotate_down.find(gm)
    assert found == [] and len(refusals) == 2 and "experts read their weights" in refusals[0].reason
    found, refusals = rotate_down.find(zoo("llama").copies()[0], block=7)
    assert found == [] and "blocks of 7 do not divide its 96 channels" in refusals[0].reason


# ---- values of heads


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_heads_exact(name: str) -> None:
    found, _ = check(zoo(name), rotate_heads, nothing)
    assert len(found) == 2 and {site.block for site in found} == {16}


def test_heads_in_blocks_where_they_divide() -> None:
    gm, _ = zoo("llama").copies()
    assert [rotate_heads.find(gm, block=b)[0][0].block for b in (8, 32, None)] == [8, 16, 16]
    (site, _), _ = rotate_heads.find(gm, block=8, seed=4)
    before = graph.get_tensor(gm, site.v.weight).detach().clone()
    rotate_heads.apply(gm, site)
    turned = rotation.rotate(before.double().mT, 8, 4).mT
    torch.testing.assert_close(graph.get_tensor(gm, site.v.weight).double(), turned, rtol=0, atol=1e-6)
    assert zoo("llama").error(gm) < 1e-5


def test_heads_negative_control_one_query_head_of_a_group() -> None:
    """Measured 1.1: the columns of every query head that reads the KV head have to follow."""
    case = zoo("llama")
    gm, _ = case.copies()
    site = rotate_heads.find(gm)[0][0]
    original = graph.get_tensor(gm, site.o.weight).detach().clone()
    rotate_heads.apply(gm, site)

    def forgetful(new: Tensor) -> Tensor:
        new = new.clone()
        new[:, 16:32] = original[:, 16:32].to(new)
        return new

    edits.edit(gm, site.o.weight, forgetful)
    assert case.error(gm) > 0.1


def test_heads_records_are_their_own() -> None:
    gm, _ = zoo("llama").copies()
    site = rotate_heads.find(gm)[0][0]
    record = site.to_record()
    assert record["name"] == "rotate-heads" and rotate_heads.Site.from_record(record) == site
    with pytest.raises(ValueError, match="expected a record of 'v-o', found 'rotate-heads'"):
        v_o.Site.from_record(record)
    assert dataclasses.replace(site, seed=1) != site


# ---- queries and keys


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_oss"])
def test_queries_and_keys_exact(name: str) -> None:
    case = zoo(name)
    found, refusals = check(case, rotate_qk, nothing)
    assert len(found) == 2 and refusals == []
    gm, live = case.copies()
    before = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    for site in found:
        apply_record(gm, site.to_record(), {})
        apply_record(live, site.to_record(), {})
    assert counts(gm)["hadamard"] == 4
    assert all(torch.equal(tensor, before[key]) for key, tensor in live.state_dict().items())


def test_queries_and_keys_negative_controls() -> None:
    """One side alone, and both before the rotary embedding (measured .50), are other functions."""
    case = zoo("llama")
    gm, _ = case.copies()
    rotate_qk.apply(gm, rotate_qk.find(gm)[0][0])
    first = next(n for n in gm.graph.nodes if graph.op_name(n) == "hadamard")
    first.replace_all_uses_with(first.args[0])
    assert case.error(gm) > 0.01
    early, _ = case.copies()
    for name in ("q", "k"):
        rotate_tensor(early, f"model.layers.0.self_attn.{name}_proj.weight", 0, 16, 0)
    assert case.error(early) > 0.01


def test_attention_by_name() -> None:
    gm, _ = zoo("llama").copies()
    site = rotate_qk.find(gm)[0][0]
    rotate_qk.apply(gm, dataclasses.replace(site, attention="another"))
    assert "hadamard" not in counts(gm)
    rotate_qk.apply(gm, site)
    assert counts(gm)["hadamard"] == 2
