"""qfx.reporting.sqnr: two forms of one graph side by side."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import graph
from qfx.measuring.measure import decibel, sqnr_db
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe, Rule
from qfx.reporting import sqnr
from tests.graphs import Function, capture


def pair(recipe: str) -> tuple[fx.GraphModule, fx.GraphModule, Function]:
    torch.manual_seed(0)
    layers = {"up": nn.Linear(16, 32), "down": nn.Linear(32, 8)}
    model = Function(lambda own, x: own.down(torch.relu(own.up(x))) + own.down(torch.relu(own.up(-x))), **layers)
    plain = capture(model, torch.randn(3, 16), dynamic=True)
    prepare(plain)
    quantized = graph.copy(plain)
    apply_plan(quantized, None, Recipe.parse(recipe))
    return plain, quantized, model


@torch.no_grad()
def test_nodes_are_compared_by_name_and_uses_of_one_layer_add_up() -> None:
    plain, quantized, model = pair("w8a8")
    x = torch.randn(5, 16)
    found = sqnr.compare(plain, quantized, [x])
    assert list(found) == ["up", "down"]
    both = torch.cat([x, -x])
    up = model.get_submodule("up")(both)
    assert found["up"][0] == pytest.approx(float(up.double().square().sum()), rel=1e-5)
    collector = sqnr.Collector()
    collector.add("a record", plain, quantized, [x])
    values = collector.of("a record")
    assert 35 < values["up"] < 60 and 30 < values["down"] < values["up"]
    assert collector.of("another") == {} and collector.graphs == 1 and collector.measured
    out = quantized(x)[0]
    assert sqnr_db(plain(x)[0], out) == pytest.approx(values["down"], abs=6)


@torch.no_grad()
def test_calls_of_one_graph_add_up() -> None:
    plain, quantized, _ = pair("w8a8")
    first, second = torch.randn(5, 16), torch.randn(2, 16) * 10
    collector = sqnr.Collector()
    for x in (first, second):
        collector.add("record", plain, quantized, [x])
    sums = [sqnr.compare(plain, quantized, [x])["up"] for x in (first, second)]
    signal, noise = (sum(parts) for parts in zip(*sums, strict=True))
    assert collector.of("record")["up"] == pytest.approx(10 * math.log10(signal / noise))


class Padded(nn.Module):
    """Linears of positions [B, T, K], of their rows [B * T, K], and attention with rounded operands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rows, self.wide = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """x [B, T, 16], attention_mask [B, T] -> [B, T, 16]."""
        h = self.rows(torch.relu(self.tokens(x)).reshape(-1, 32)).reshape(x.shape)
        heads = h.unflatten(-1, (2, 8)).transpose(1, 2)
        seen = attention_mask[:, None, None].bool()
        h = nn.functional.scaled_dot_product_attention(heads, heads, heads, seen)
        y: Tensor = self.wide(h.transpose(1, 2).flatten(2))
        return y


@torch.no_grad()
def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = mask[2, 2:] = 0
    x[mask == 0] *= 100  # far beyond the scales of the tokens
    linear, attention = Rule(target="linear", x="i8", w="i8/ch"), Rule(target="attention", q="i8", k="i8", v="i8")
    model, recipe = Padded().eval(), Recipe(name="static", rules=(linear, attention))
    plan = qfx.plan(model, recipe, [{"x": x, "attention_mask": mask}])
    plain = capture(model, x, mask, dynamic=True)
    prepare(plain)
    quantized = graph.copy(plain)
    apply_plan(quantized, plan, recipe)
    found, whole = (
        {name: decibel(*pair) for name, pair in sqnr.compare(plain, quantized, [x, given]).items()}
        for given in (mask, torch.ones_like(mask))
    )
    assert found == pytest.approx(plan.sensitivities["sqnr_db"]) and len(found) == 4
    assert min(found.values()) > 25 and max(whole.values()) < 10


def test_what_is_not_quantized_is_not_compared() -> None:
    plain, _, _ = pair("w8a8")
    assert sqnr.compare(plain, graph.copy(plain), [torch.randn(2, 16)]) == {}
    collector = sqnr.Collector()
    collector.add("record", plain, graph.copy(plain), [torch.randn(2, 16)])
    assert collector.graphs == 1 and not collector.measured


def test_the_collector_is_there_inside_and_in_this_thread_only() -> None:
    seen: list[object] = []
    assert sqnr.collecting() is None
    with sqnr.measuring() as outer:
        assert sqnr.collecting() is outer
        with sqnr.measuring() as inner:
            assert sqnr.collecting() is inner
        assert sqnr.collecting() is outer
        thread = threading.Thread(target=lambda: seen.append(sqnr.collecting()))
        thread.start()
        thread.join()
    assert seen == [None] and sqnr.collecting() is None
    with pytest.raises(KeyError), sqnr.measuring():
        raise KeyError
    assert sqnr.collecting() is None
