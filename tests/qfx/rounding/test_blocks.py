"""Where a graph is cut, what is rounded in a block, and what a block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.capture import capture_export
from qfx.packing import pack_weight
from qfx.passes.annotate import annotate
from qfx.pipeline import prepare
from qfx.recipe import Recipe
from qfx.rounding.blocks import Block, cuts, find
from qfx.rounding.lanes import Lane, Program
from tests.stack import Stack, annotated, batches
from tests.zoo import ZOO

RULES = [{"target": "linear", "w": "i4/ch"}, {"target": "embedding", "w": "i8/ch"}]


def blocks_of(model: nn.Module, rules: Any = RULES, *, wanted: bool = True) -> tuple[list[Block], list[Tensor]]:
    """All blocks of a model; the lanes are shared, so they are to be used in order."""
    data = batches()
    gm, plan, flat = annotated(model, rules, data)
    program = Program(gm)
    lane = Lane(program, flat, rounded=True)
    other = Lane(program, flat, rounded=False) if wanted else None
    linears = find(program)
    found = []
    for cut in cuts(program):
        own = [one for one in linears if cut.start <= program.position[one.node] < cut.stop]
        found.append(Block(cut, own, lane, other, plan.tensors, {}))
    return found, data


def test_cuts_by_the_outermost_index() -> None:
    found, _ = blocks_of(Stack(3))
    assert [block.name for block in found] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert [[linear.fqn for linear in block.linears] for block in found[1:3]] == [
        [f"layers.{i}.{name}" for name in ("gate", "up", "down")] for i in (0, 1)
    ]
    assert [block.cut.start for block in found[1:]] == [block.cut.stop for block in found[:-1]]


@pytest.mark.parametrize(
    ("name", "indexed"),
    [
        pytest.param("bert", ["encoder.layer.0", "encoder.layer.1"], marks=pytest.mark.slow),
        ("llama", ["model.layers.0", "model.layers.1"]),
        pytest.param("gpt2", ["transformer.h.0", "transformer.h.1"], marks=pytest.mark.slow),
        ("t5", [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)]),
        pytest.param("mixtral", ["model.layers.0", "model.layers.1"], marks=pytest.mark.slow),
        ("vit", None),
        pytest.param("whisper", None, marks=pytest.mark.slow),
    ],
)
def test_cuts_of_the_zoo(name: str, indexed: list[str] | None) -> None:
    """Every block is one stretch of the graph, and each weight is in one of them."""
    model, inputs = ZOO[name]()
    gm = capture_export(model, (), inputs, dynamic=name == "llama").gm
    prepare(gm)
    annotate(gm, Recipe.parse("w8a16"))
    program = Program(gm)
    found = cuts(program)
    assert found[0].start == 0 and found[-1].stop == len(program.nodes)
    assert [cut.start for cut in found[1:]] == [cut.stop for cut in found[:-1]]
    if indexed is not None:
        assert [cut.name for cut in found if cut.name.rpartition(".")[2].isdigit()] == indexed
    for linear in find(program):
        homes = [cut for cut in found if cut.start <= program.position[linear.node] < cut.stop]
        assert len(homes) == 1


def test_linears_that_read_one_value_are_one_site() -> None:
    block = blocks_of(Stack())[0][1]
    assert [[linear.fqn for linear in site.linears] for site in block.sites] == [
        ["layers.0.gate", "layers.0.up"],
        ["layers.0.down"],
    ]


def test_inputs_that_are_rounded_differently_are_two_sites() -> None:
    rules = [{"target": "linear", "x": "i8/tok", "w": "i4/ch"}, {"target": "*.up", "x": "none"}]
    block = blocks_of(Stack(), rules)[0][1]
    assert [len(site.linears) for site in block.sites] == [1, 1, 1]


def test_a_tied_weight_is_one_linear_of_two_names() -> None:
    found, _ = blocks_of(Stack(tied=True), [{"target": "tied", "w": "i8/ch"}])
    (table,) = found[0].linears
    assert table.table and table.parts[0].names == ("embed", "head")
    assert all(not block.linears for block in found[1:])


def test_two_formats_of_one_weight_are_two_linears() -> None:
    found, _ = blocks_of(Stack(tied=True))
    assert [part.names for block in found for linear in block.linears for part in linear.parts if linear.table] == [
        ("embed",)
    ]
    assert found[-1].linears[0].parts[0].names == ("head",)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_segments_are_parts(along: str) -> None:
    w = ["i8/ch", "i4/g8", "i8/ch"] if along == "rows" else ["i8/g8", "i4/g8", "i8/g8"]
    block = blocks_of(Stack(), [{"target": "*.up", "w": w, "along": along}])[0][1]
    (up,) = block.linears
    assert [part.name for part in up.parts] == [f"layers.0.up.{along}0", f"layers.0.up.{along}1"]
    whole = block.gm.get_parameter("layers.0.up.weight").detach()
    parts = [block.weight(part) for part in up.parts]
    assert [part.columns for part in up.parts] == (
        [None, None] if along == "rows" else [((0, 8), (16, 24)), ((8, 16),)]
    )
    assert torch.equal(up.join(parts), whole)


@torch.no_grad()
def test_what_goes_in_and_out() -> None:
    model: Any = Stack()
    found, data = blocks_of(model)
    for part in (part for linear in found[0].linears for part in linear.parts):
        found[0].put(part, pack_weight(found[0].weight(part), part.format), {"error": 0.5})
    assert found[0].told == {"embed": {"error": 0.5}}
    found[0].leave()
    block = found[1]
    assert len(block) == len(data)
    rounded = found[0].tensors["embed/codes"].float() * found[0].tensors["embed/scale"]
    for i, ids in enumerate(data):
        (x,) = [v for node, v in block.inputs[i].items() if node.op != "placeholder"]
        assert torch.allclose(x, rounded[ids], atol=1e-6), "behind the rounded table"
    for i, ids in enumerate(data):
        (y,) = block.outputs[i].values()
        assert torch.allclose(y, model.layers[0](model.embed(ids)), atol=1e-6), "of the float model"


def test_a_block_can_be_run_with_other_weights_and_learns() -> None:
    model: Any = Stack()
    found, _ = blocks_of(model)
    found[0].leave()
    block = found[1]
    plain = block.run(0, {})
    for node, value in plain.items():
        assert torch.allclose(value, block.outputs[0][node], atol=1e-6)
    up = block.weight(block.linears[1].parts[0]).clone().requires_grad_()
    changed = block.run(0, {"layers.0.up": up * 2})
    (value,) = changed.values()
    assert not torch.allclose(value, next(iter(plain.values())))
    value.square().sum().backward()
    assert up.grad is not None and up.grad.abs().max() > 0
    assert model.layers[0].up.weight.grad is None


@torch.no_grad()
def test_a_site_is_seen_behind_what_is_rounded_before_it() -> None:
    model: Any = Stack()
    found, data = blocks_of(model)
    found[0].leave()
    block = found[1]
    gate, up = (linear.parts[0] for linear in block.sites[0].linears)
    y = model.layers[0].norm(model.embed(data[0]))
    x, wanted = next(iter(block.inputs_of(block.sites[0])))
    assert wanted is not None and torch.allclose(x, y, atol=1e-6) and torch.equal(x, wanted)
    for part in (gate, up):
        block.put(part, pack_weight(block.weight(part), part.format))
    x, wanted = next(iter(block.inputs_of(block.sites[1])))
    layer: Any = model.layers[0]
    rounded = [pack_weight(getattr(layer, n).weight, gate.format).dequantize() for n in ("gate", "up")]
    one, two = (
        nn.functional.linear(y, w, getattr(layer, n).bias) for w, n in zip(rounded, ("gate", "up"), strict=True)
    )
    assert torch.allclose(x, nn.functional.silu(one) * two, atol=1e-5)
    assert wanted is not None and not torch.allclose(x, wanted, atol=1e-3)
    block.leave()
    assert block.lane.weights == {}, "nothing reads them any more"


class Twice(Stack):
    """The same layer twice. up also reads something else before."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        layer: Any = self.layers[0]
        more = layer.down(layer.up(x.flip(-1)))
        out: Tensor = self.head(self.norm(layer(layer(x)) + more))
        return out


@torch.no_grad()
def test_a_layer_called_several_times_reads_all_that_its_calls_do() -> None:
    model: Any = Twice()
    found, data = blocks_of(model, [{"target": "layers.*", "w": "i4/ch"}])
    block = next(block for block in found if block.linears)
    for before in found[: found.index(block)]:
        before.leave()
    assert [[one.fqn for one in site.linears] for site in block.sites] == [
        ["layers.0.up"],
        ["layers.0.down"],
        ["layers.0.gate"],
    ]
    layer: Any = model.layers[0]
    x = model.embed(data[0])
    once, gated = layer(x), lambda y: nn.functional.silu(layer.gate(y)) * layer.up(y)
    norms = [layer.norm(x), layer.norm(once)]
    wanted = {
        "layers.0.up": [x.flip(-1), *norms], "layers.0.gate": norms,
        "layers.0.down": [layer.up(x.flip(-1)), *map(gated, norms)],
    }  # fmt: skip
    for site in block.sites:
        reads = [next(iter(there.inputs_of(one))) for there, one in block.reads(site)]
        for (value, floating), y in zip(reads, wanted[site.linears[0].fqn], strict=True):
            assert torch.allclose(value, y, atol=1e-6) and floating is not None and torch.equal(value, floating)
    assert block.lane.at <= block.program.position[block.sites[-1].call], "the block itself goes on from there"


def test_where_nan_comes_from() -> None:
    model: Any = Stack()
    with torch.no_grad():
        model.layers[0].down.bias[3] = torch.nan
    found, _ = blocks_of(model)
    site = found[2].sites[0]
    assert found[2].first_bad(1, site.x) == "%linear_2 (layers.0.down)"
    assert found[1].first_bad(1, found[1].sites[0].x) == ""
    assert graph.fqn_of(site.linears[0].node) == "layers.1.gate"
