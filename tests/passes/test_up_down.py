"""qfx.passes.up_down: hidden channels of gated and ReLU MLPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from qfx import annotation, graph
from qfx.format import Format
from qfx.passes import up_down
from qfx.passes.up_down import Site
from tests.graphs import Function, text
from tests.passes.test_smooth import watched
from tests.rewriting import Case, check, cleaned, positive, zoo


def factor(site: Site) -> Tensor:
    return positive(site.channels)


def mlp(forward: Any, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "both": nn.Linear(4, 12), "down": nn.Linear(6, 4)}
    return Case(Function(forward, **layers).to(dtype), (torch.randn(3, 4, dtype=dtype),), {})


def gated(own: Any, x: Tensor) -> Any:
    return own.down(silu(own.gate(x)) * own.up(x))


def fused(own: Any, x: Tensor) -> Any:
    gate, up = own.both(x).chunk(2, dim=-1)
    return own.down(up * gelu(gate))


def interleaved(own: Any, x: Tensor) -> Any:
    y = own.both(x)
    return own.down(silu(y[..., ::2]) * y[..., 1::2])


def plain(own: Any, x: Tensor) -> Any:
    return own.down(relu(own.up(x)))


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2), ("phi3", 2), ("t5", 4), ("opt", 2), ("mixtral", 2), ("bert", 0), ("gpt2", 0)]
)
def test_exact(name: str, count: int) -> None:
    sites, refusals = check(zoo(name), up_down, factor)
    assert len(sites) == count and refusals == []


@pytest.mark.parametrize(
    ("forward", "layout"),
    [(gated, ("up", 0, 1)), (fused, ("both", 6, 1)), (interleaved, ("both", 1, 2)), (plain, ("up", 0, 1))],
)
def test_exact_in_double_precision(forward: Any, layout: tuple[str, int, int]) -> None:
    sites, _ = check(mlp(forward), up_down, factor, limit=1e-14)
    assert [(s.up.name, s.offset, s.stride) for s in sites] == [layout]


def test_the_text_stays() -> None:
    gm, _ = mlp(gated).copies()
    before = text(gm)
    site = up_down.find(gm)[0][0]
    up_down.apply(gm, site, factor(site))
    assert text(gm) == before


def test_negative_control_the_gate_is_not_linear() -> None:
    case = mlp(gated)
    gm, _ = case.copies()
    site = up_down.find(gm)[0][0]
    gate = dataclasses.replace(site.up, name="gate", weight="gate.weight", bias="gate.bias")
    up_down.apply(gm, dataclasses.replace(site, up=gate), factor(site))
    assert case.error(gm) > 0.05


def test_negative_control_gelu_is_not_homogeneous() -> None:
    case = mlp(lambda own, x: own.down(gelu(own.up(x))))
    gm, _ = case.copies()
    assert up_down.find(gm) == ([], [])
    site = up_down.find(mlp(plain).copies()[0])[0][0]
    up_down.apply(gm, site, factor(site))
    assert case.error(gm) > 0.05


def test_negative_control_the_bias_is_scaled_too() -> None:
    case = mlp(gated)
    gm, _ = case.copies()
    site = up_down.find(gm)[0][0]
    up_down.apply(gm, dataclasses.replace(site, up=dataclasses.replace(site.up, bias=None)), factor(site))
    assert case.error(gm) > 0.05


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda own, x: own.down(own.up(x) * own.up(x).sigmoid()), "reads it, too"),
        (lambda own, x: (own.down(silu(own.gate(x)) * own.up(x)), own.up(x).exp()), "reads it, too"),
        (lambda own, x: own.down(relu(own.up(x))) + own.up.weight.sum(), "is also used by"),
        (lambda own, x: own.down(own.up(x) * own.up(x)), "reads it, too"),
    ],
)
def test_refusals(forward: Any, reason: str) -> None:
    gm = cleaned(Function(forward, gate=nn.Linear(4, 6), up=nn.Linear(4, 6), down=nn.Linear(6, 4)), torch.randn(3, 4))
    sites, refusals = up_down.find(gm)
    assert sites == [] and reason in refusals[0].reason


def test_other_structures_are_no_sites() -> None:
    for forward in (
        lambda own, x: own.down(silu(own.gate(x)) * (own.up(x) + 1)),
        lambda own, x: own.down(silu(own.gate(x)) * own.up(x)[:, :1]),
        lambda own, x: own.down((silu(own.gate(x)) * own.up(x)).flip(-1)),
    ):
        assert up_down.find(mlp(forward).copies()[0])[0] == []


def test_bad_factors() -> None:
    gm, _ = mlp(gated).copies()
    site = up_down.find(gm)[0][0]
    for bad in (torch.ones(5), torch.zeros(6), torch.full((6,), float("inf"))):
        with pytest.raises(ValueError, match="expected 6 positive factors for 'down'"):
            up_down.apply(gm, site, bad)


def test_smoothing_undoes_a_large_channel() -> None:
    case = mlp(gated, torch.float32)
    gm, _ = case.copies()
    site = up_down.find(gm)[0][0]
    hurt = torch.ones(6)
    hurt[2] = 0.01
    up_down.apply(gm, site, hurt)
    for node in gm.graph.nodes:
        if graph.fqn_of(node) == "down":
            annotation.set(node, "x", Format("u8"))
            annotation.set(node, "w", Format.parse("i8/ch"))
    stats = watched(gm, [case.flat])
    chosen, notes = up_down.smooth(gm, stats)
    assert notes == [] and chosen[0][1].argmax() == 2
    assert up_down.smooth(gm, stats, skip=["down"]) == ([], [])
    assert up_down.smooth(gm, {}) == ([], [])
    up_down.apply(gm, *chosen[0])
    assert case.error(gm) < 1e-5
