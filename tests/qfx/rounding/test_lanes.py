"""A graph run node by node: the same values as a call of it, no more held than is read later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import graph
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.rounding import lanes
from qfx.rounding.lanes import Lane, Program
from tests.graphs import Function, capture
from tests.stack import Stack, annotated, batches
from tests.zoo import ZOO

RULES = [{"target": "linear", "w": "i4/ch"}]


def lane_of(model: nn.Module, rules: Any = RULES, count: int = 3, **fields: Any) -> tuple[Lane, list[Tensor]]:
    data = batches(count)
    gm, _, flat = annotated(model, rules, data)
    return Lane(Program(gm), flat, **{"rounded": False, **fields}), data


def node_of(lane: Lane, fqn: str) -> Any:
    return next(n for n in lane.program.nodes if graph.fqn_of(n) == fqn and graph.schema_name(n) == "aten::linear")


@torch.no_grad()
def test_every_stop_has_the_values_of_the_model() -> None:
    model: Any = Stack()
    lane, data = lane_of(model)
    program = lane.program
    for stop in range(1, len(program.nodes)):
        lane.advance(stop)
        assert lane.at == stop
        alive = {node for node in (*program.inputs, *program.nodes[:stop]) if program.last_use[node] >= stop}
        for env in lane.values:
            assert set(env) == alive
    head = node_of(lane, "head")
    assert head is lane.program.nodes[-1]
    for i, ids in enumerate(data):
        found = lane.program.step(head, lane.values[i], {}, rounded=False)
        assert torch.equal(found, model(ids))
    lane.advance(3)  # never back
    assert lane.at == len(lane.program.nodes) - 1


@pytest.mark.parametrize(
    "name",
    ["bert", "t5", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "whisper", "vit"))],
)
@torch.no_grad()
def test_in_steps_as_in_one_go(name: str) -> None:
    from qfx.capture import capture_export
    from qfx.pipeline import prepare

    model, inputs = ZOO[name]()
    captured = capture_export(model, (), inputs, dynamic=name == "bert")
    prepare(captured.gm)
    flat = captured.flatten((), inputs)
    program = Program(captured.gm)
    wanted = captured.gm(*flat)
    one, many = Lane(program, [flat], rounded=False), Lane(program, [flat], rounded=False)
    end = len(program.nodes)
    one.advance(end)
    for stop in range(0, end, 5):
        many.advance(stop)
    many.advance(end)
    output = next(n for n in captured.gm.graph.nodes if n.op == "output")
    results = [n for n in output.all_input_nodes if n in program.position]
    assert results
    for node in results:
        assert torch.equal(one.value(0, node), many.value(0, node))
        assert any(torch.equal(one.value(0, node), t) for t in wanted if isinstance(t, Tensor))


@torch.no_grad()
def test_weights_may_change_on_the_way() -> None:
    model: Any = Stack()
    lane, data = lane_of(model)
    up, down = node_of(lane, "layers.0.up"), node_of(lane, "layers.0.down")
    lane.weights[up] = torch.zeros_like(model.layers[0].up.weight)
    lane.advance(lane.program.position[down])
    y = model.layers[0].norm(model.embed(data[1]))
    wanted = nn.functional.silu(model.layers[0].gate(y)) * model.layers[0].up.bias
    assert torch.allclose(lane.value(1, down.args[0]), wanted)


@torch.no_grad()
def test_inputs_are_rounded_where_asked() -> None:
    model: Any = Stack()
    rules = [{"target": "linear", "x": "i8/tok", "w": "i4/ch"}]
    for rounded in (True, False):
        lane, data = lane_of(model, rules, rounded=rounded)
        gate = node_of(lane, "layers.0.gate")
        lane.advance(lane.program.position[gate] + 1)
        y = model.layers[0].norm(model.embed(data[0]))
        x = fake_quantize(y, Format.parse("i8/tok"), activation=True) if rounded else y
        assert torch.allclose(lane.value(0, gate), model.layers[0].gate(x), atol=1e-6)


def test_gradients_pass_the_rounding_of_inputs() -> None:
    lane, _ = lane_of(Stack(), [{"target": "linear", "x": "i8/tok", "w": "i4/ch"}])
    gate = node_of(lane, "layers.0.gate")
    x = torch.randn(4, 24, requires_grad=True)
    weight = torch.randn(48, 24, requires_grad=True)
    env = {gate.args[0]: x}
    lane.program.step(gate, env, {gate: weight}, rounded=True).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(4, -1), rtol=1e-5)
    wanted = fake_quantize(x.detach(), Format.parse("i8/tok"), activation=True).sum(0).expand(48, -1)
    assert torch.allclose(weight.grad, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_pass_what_is_written_into_slices() -> None:
    """As Gemma3n does; aten.copy has no gradient of its own."""

    def writes(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2] = x[:, 2:3] * 3
        return y

    program = Program(capture(Function(lambda _, x: writes(x)), torch.ones(2, 4)))
    assert any(node.target is torch.ops.aten.copy.default for node in program.nodes)
    x = torch.arange(8.0).view(2, 4).requires_grad_()
    found = program.run(dict(zip(program.inputs, [x], strict=True)), range(len(program.nodes)), {}, rounded=False)
    assert len(found) == 1
    (y,) = found.values()
    assert torch.equal(y, writes(x))
    assert torch.equal(*(torch.autograd.grad(one.sum(), x)[0] for one in (y, writes(x))))


def test_what_is_equal_in_all_batches_is_held_once() -> None:
    """A table of positions depends on the length alone."""

    def forward(own: Any, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).float().sin()[:, None] * torch.ones(24)
        out: Tensor = own.fc(own.embed(ids)) + positions
        return out

    model = Function(forward, embed=nn.Embedding(40, 24), fc=nn.Linear(24, 24))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 40, (2, n), generator=generator) for n in (8, 8, 9)]
    gm, _, flat = annotated(model, RULES, data)
    lane = Lane(Program(gm), flat, rounded=False)
    add: Any = lane.program.nodes[-1]
    lane.advance(lane.program.position[add])
    shared = [n for n in lane.values[0] if n.op != "placeholder" and n not in (add.args[0],)]
    assert shared
    for node in shared:
        assert lane.value(0, node) is lane.value(1, node)
    assert lane.value(0, add.args[0]) is not lane.value(1, add.args[0])
    assert all(n in lane.program.constants for n in gm.graph.nodes if n.op == "get_attr")


@torch.no_grad()
def test_beyond_the_limit_values_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfx.storage.spill.LEAST", 1)
    kept: list[int] = []
    original = __import__("qfx.storage.spill", fromlist=["Spill"]).Spill.keep

    def keep(own: Any, tensor: Tensor) -> Any:
        kept.append(tensor.nbytes)
        return original(own, tensor)

    monkeypatch.setattr("qfx.storage.spill.Spill.keep", keep)
    size = 2 * 16 * 24 * 4
    free, _ = lane_of(Stack(), count=4)
    tight, _ = lane_of(Stack(), count=4, memory=2 * size, folder=tmp_path)
    at = free.program.position[node_of(free, "layers.1.gate")]
    free.advance(at)
    assert kept == []
    tight.advance(at)
    assert sum(kept) == 8 * size - 2 * size, "the residual and the norm of four batches, less two of them"
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    names = {node.name: node for node in tight.values[0]}
    for i, env in enumerate(free.values):
        for node, value in env.items():
            assert torch.equal(value, tight.values[i][names[node.name]])


def test_a_batch_that_does_not_run_is_named() -> None:
    data = batches(2)
    data[1] = data[1] + 100  # beyond the table
    gm, _, flat = annotated(Stack(), RULES, data)
    lane = Lane(Program(gm), flat, rounded=False)
    with pytest.raises(ValueError, match="the model does not take batch 2 of the data: IndexError"):
        lane.advance(len(lane.program.nodes))


def test_a_batch_of_another_number_of_inputs() -> None:
    gm, _, flat = annotated(Stack(), RULES, batches(2))
    message = re.escape("batch 2 does not fit the graph\n  expected: 1 inputs (ids)\n  found: 2")
    with pytest.raises(ValueError, match=message):
        Lane(Program(gm), [flat[0], (*flat[1], 3)], rounded=False)


class Masked(nn.Module):
    """Attention under a mask that is made of the data."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        before = torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None]
        mask = before & keep[:, None, None, :]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)


@pytest.mark.parametrize(("kept", "causal"), [(12, True), (9, False)])
def test_a_mask_that_hides_what_comes_later_is_not_multiplied(
    kept: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of the mask, to the bit; a mask that hides more, such as padding, stays."""
    x, keep = torch.randn(2, 12, 32), torch.arange(12).expand(2, 12) < kept
    gm = capture(Masked(), x, keep)
    wanted = Masked()(x, keep)
    calls: list[bool] = []
    inner = lanes._without_mask

    def seen(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        found = inner(args, kwargs)
        calls.append(bool(found[1].get("is_causal")))
        return found

    monkeypatch.setattr(lanes, "_without_mask", seen)
    lane = Lane(program := Program(gm), [[x, keep]], rounded=False)
    lane.advance(len(program.nodes))
    (found,) = lane.values[0].values()
    assert calls == [causal]
    assert torch.equal(found, wanted)


def test_what_is_no_causal_mask_is_left() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    before = torch.ones(4, 4, dtype=torch.bool).tril()
    left: list[tuple[list[Any], dict[str, Any]]] = [
        ([q, k, k, torch.ones(4, 6, dtype=torch.bool).tril()], {}), ([q, q, q, before.T], {}), ([q, q, q], {}),
        ([q, q, q, before.float()], {}), ([q, q, q, before, 0.5], {}), ([q, q, q, before[:1]], {}),
        ([q, q, q], {"attn_mask": before, "dropout_p": 0.1}), ([q, q, q, before, 0.0, True], {}),
    ]  # fmt: skip
    for args, kwargs in left:
        assert lanes._without_mask(list(args), dict(kwargs)) == (args, kwargs)
    taken: list[tuple[list[Any], dict[str, Any]]] = [
        ([q, q, q, before], {"scale": 0.5}), ([q, q, q], {"attn_mask": before, "scale": 0.5}),
    ]  # fmt: skip
    for args, kwargs in taken:
        assert lanes._without_mask(list(args), dict(kwargs)) == ([q, q, q], {"scale": 0.5, "is_causal": True})


class Positions(nn.Module):
    """A linear reads the input and, a second time, a table, as DeBERTa projects relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.both, self.out = nn.Parameter(torch.randn(5, 32)), nn.Linear(32, 32), nn.Linear(5, 32)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.both(x) @ self.both(self.table).transpose(0, 1))


def test_a_linear_of_constants_has_a_place_and_its_weight_may_change() -> None:
    torch.manual_seed(0)
    model, x = Positions(), torch.randn(2, 7, 32)
    gm, _, _ = annotated(model, RULES, [x])
    program = Program(gm)
    linears = [node for node in program.nodes if graph.schema_name(node) == "aten::linear"]
    assert [graph.fqn_of(node) for node in linears].count("both") == 2
    plan = qfx.plan(model, "w4a16", [x], avg_bits=5)
    assert 4 < plan.sensitivities["allocation"]["average_bits"] <= 5
    qfx.quantize(model, plan)(x)
