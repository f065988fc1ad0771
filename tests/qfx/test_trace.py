"""qfx.trace: any graph of fake tensors as functional pre-dispatch ATen, wrappers inlined."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import (
    tag_activation_checkpoint,
    wrap,
    wrap_with_autocast,
    wrap_with_set_grad_enabled,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qfx import graph, trace
from qfx.capture import capture_export
from qfx.errors import UnsupportedError
from qfx.text import dump
from qfx.trace import retrace
from tests.seeded import randn

GOLDEN = """\
%arg0_1: f32[2,4] = input
%arg1_1: f32[4] = input
%add: f32[2,4] = aten.add.Tensor(%arg0_1, 1)
%mul: f32[2,4] = aten.mul.Tensor(%add, %arg1_1)
%relu: f32[2,4] = aten.relu(%mul)
return [%add, %mul, %relu]
"""


def fakes(*inputs: Any, dynamic: bool = False) -> list[Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None, allow_non_fake_inputs=True)
    return [mode.from_tensor(v, static_shapes=not dynamic) if isinstance(v, Tensor) else v for v in inputs]


def traced(
    function: Callable[..., Any] | nn.Module, *inputs: Any, dynamic: bool = False
) -> tuple[fx.GraphModule, list[int]]:
    return retrace(fx.symbolic_trace(function), fakes(*inputs, dynamic=dynamic))


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def wrapped(target: Any, inner: Callable[..., Any], *before: Any, **kwargs: Any) -> fx.GraphModule:
    """A graph that calls `inner` on its one input within a wrapper."""
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    body = nodes.get_attr("body")
    nodes.output((nodes.call_function(target, (*before, body, x), kwargs),))
    return fx.GraphModule({"body": fx.symbolic_trace(inner)}, nodes)


def test_golden_text_of_changes_in_place() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        z = x.add_(1).mul(y)
        return z.clone().relu_()

    gm, mutated = traced(forward, torch.randn(2, 4), torch.randn(4))
    assert mutated == [0] and ops(gm) == ["add.Tensor", "mul.Tensor", "clone.default", "relu.default"]

    def without_copy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = x.add_(1).mul(y)
        return z, z.relu()

    gm, mutated = traced(without_copy, torch.randn(2, 4), torch.randn(4))
    assert mutated == [0] and dump(gm) == GOLDEN
    x, y = torch.randn(2, 4), torch.randn(4)
    for found, expected in zip(gm(x, y), (x + 1, (x + 1) * y, ((x + 1) * y).relu()), strict=True):
        torch.testing.assert_close(found, expected)


def test_changes_through_views_are_changes_of_the_input() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        y[0].zero_()
        x.t()[1:].copy_(y)
        return x

    gm, mutated = traced(forward, torch.zeros(4, 3), torch.ones(2, 4))
    assert mutated == [0, 1] and not any("_." in op for op in ops(gm))
    x, y = torch.zeros(4, 3), torch.ones(2, 4)
    news = gm(x, y)
    assert torch.equal(x, torch.zeros(4, 3)), "the traced graph changes nothing"
    expected = forward(x, y)
    assert torch.equal(news[0], x) and torch.equal(news[1], y) and torch.equal(news[2], expected)


def test_composite_operators_are_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GELU(), nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers(x)
            return (F.scaled_dot_product_attention(x, x, x) @ x.mT).softmax(-1)

    gm, mutated = traced(Model(), torch.randn(2, 3, 4))
    assert mutated == []
    assert ops(gm) == [
        *("linear.default", "layer_norm.default", "rms_norm.default", "gelu.default", "silu.default"),
        *("scaled_dot_product_attention.default", "transpose.int", "matmul.default", "softmax.int"),
    ]


@pytest.mark.parametrize("call", [F.dropout, torch.dropout])
def test_what_dropout_leaves_may_change_in_place(call: Callable[..., Tensor]) -> None:
    """In eval mode it gives its input itself, as older models multiply by their mask afterwards (XLM)."""

    def forward(x: Tensor) -> Tensor:
        y = call(x + 1, 0.1, False)
        y *= 2
        return y

    gm, mutated = traced(forward, torch.randn(3))
    assert mutated == [] and ops(gm) == ["add.Tensor", "mul.Tensor"]
    assert torch.equal(gm(torch.ones(3))[0], torch.full((3,), 4.0))


def test_outputs_are_flat() -> None:
    gm, _ = traced(lambda x: {"a": x + 1, "b": [x + 2, (x + 3,)], "c": None}, torch.zeros(2))
    assert [None if y is None else float(y[0]) for y in gm(torch.zeros(2))] == [1.0, 2.0, 3.0, None]


def test_sizes_stay_symbolic() -> None:
    gm, _ = traced(lambda x: x.reshape(x.shape[0] * x.shape[1], -1).relu(), torch.randn(3, 5, 2), dynamic=True)
    assert gm(torch.randn(2, 7, 2))[0].shape == (14, 2)


def test_nodes_keep_where_they_came_from() -> None:
    source = fx.symbolic_trace(lambda x: x.relu())
    next(n for n in source.graph.nodes if n.op == "call_method").meta["stack_trace"] = "here"
    gm, _ = retrace(source, fakes(torch.randn(2)))
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert "here" in node.meta["stack_trace"] and node.meta["val"].shape == (2,)


def test_known_numbers_take_the_place_of_item() -> None:
    source = fx.symbolic_trace(lambda x, scale: x * scale.item())
    gm, _ = retrace(source, fakes(torch.randn(2), torch.tensor(3.0, dtype=torch.float64)), {"scale": 3.0})
    assert ops(gm) == ["mul.Tensor"]
    assert torch.equal(gm(torch.ones(2), torch.tensor(7.0))[0], torch.full((2,), 3.0))


def test_a_graph_without_tensors() -> None:
    gm, _ = traced(lambda n: torch.ones(3) * n, 2)
    assert torch.equal(gm(2)[0], torch.full((3,), 2.0))


@pytest.mark.parametrize("enabled", [True, False])
def test_switches_of_grad_mode_vanish(enabled: bool) -> None:
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    nodes.call_function(torch._C._set_grad_enabled, (enabled,))
    nodes.output((nodes.call_function(torch.relu, (x,)),))
    before = torch.is_grad_enabled()
    gm, _ = retrace(fx.GraphModule({}, nodes), fakes(torch.randn(2)))
    assert ops(gm) == ["relu.default"] and torch.is_grad_enabled() is before


WRAPPED: dict[str, Callable[[Callable[..., Any]], fx.GraphModule]] = {
    "grad mode": lambda inner: wrapped(wrap_with_set_grad_enabled, inner, False),
    "autocast that is off": lambda inner: wrapped(wrap_with_autocast, inner, "cpu", None, False, None),
    "checkpoint": lambda inner: wrapped(tag_activation_checkpoint, inner, use_reentrant=False),
    "wrap": lambda inner: wrapped(wrap, inner),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_inlined(name: str) -> None:
    gm, _ = retrace(WRAPPED[name](lambda x: (x * 2).relu()), fakes(torch.randn(2)))
    assert ops(gm) == ["mul.Tensor", "relu.default"]
    x = torch.randn(2)
    assert torch.equal(gm(x)[0], (x * 2).relu())


def test_wrappers_in_wrappers_are_inlined() -> None:
    inner = WRAPPED["grad mode"](lambda x: x.relu())
    gm, _ = retrace(wrapped(tag_activation_checkpoint, inner), fakes(torch.randn(2)))
    assert ops(gm) == ["relu.default"]


def test_autocast_that_is_on_is_refused() -> None:
    gm = wrapped(wrap_with_autocast, lambda x: x @ x, "cpu", torch.bfloat16, True, None)
    with pytest.raises(UnsupportedError, match=r"enables autocast; next step: cast the model with model.to\(dtype\)"):
        retrace(gm, fakes(torch.randn(2, 2)))
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    nodes.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    nodes.output((nodes.call_function(torch.relu, (x,)),))
    with pytest.raises(UnsupportedError, match="enables autocast"):
        retrace(fx.GraphModule({}, nodes), fakes(torch.randn(2)))


@pytest.mark.parametrize("spelled", ["region", "wrapper"])
def test_a_region_without_autocast_stays_one_where_the_caller_turns_it_on(spelled: str) -> None:
    if spelled == "wrapper":
        gm = wrapped(wrap_with_autocast, lambda x: x @ x, "cpu", None, False, None)
    else:
        nodes = fx.Graph()
        x = nodes.placeholder("x")
        mode = nodes.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, False, None))
        inside = nodes.call_function(torch.matmul, (x, x))
        nodes.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        nodes.output((inside, nodes.call_function(torch.matmul, (x, x))))
        gm = fx.GraphModule({}, nodes)
    with torch.autocast("cpu", torch.bfloat16):
        traced, _ = retrace(gm, fakes(torch.randn(2, 2)))
        assert torch.is_autocast_enabled("cpu")
    found = [n.meta["val"].dtype for n in traced.graph.nodes if n.op == "call_function"]
    assert found == [torch.float32, torch.bfloat16][: len(found)]


def test_autocast_is_as_it_was_after_an_error_in_a_region() -> None:
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    nodes.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, False, None))
    nodes.output((nodes.call_function(torch.matmul, (x, x)),))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="same reduction dim"):
            retrace(fx.GraphModule({}, nodes), fakes(torch.randn(2, 3)))
        assert torch.is_autocast_enabled("cpu")


def test_a_course_that_depends_on_values_is_refused() -> None:
    class Either(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.cond(x.sum() > 0, torch.relu, torch.tanh, (x,))
            return found

    exported = torch.export.export(Either(), (torch.randn(2),)).graph_module
    assert isinstance(exported, fx.GraphModule)
    with pytest.raises(UnsupportedError, match=r"found torch's operator 'cond'; next step: .* torch.where"):
        retrace(exported, fakes(torch.randn(2)))


def test_what_cannot_be_traced_raises_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="broadcast"):
        traced(lambda x: x + torch.ones(3), torch.randn(2))


class Known(nn.Module):
    """What torch.export leaves to be decomposed, a region without gradients, and a decomposition of two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            table = torch.arange(x.shape[1]).to(torch.float32)[None, :, None].expand(x.shape[0], -1, 1)
        rows = self.fc(x).transpose(0, 1).reshape(-1, 3)
        half, other = (x * table).chunk(2, dim=-1)
        return rows, half + other.contiguous(), x.flatten().to(torch.float64), x.type_as(y), F.dropout(x, 0.5, False)


def exported(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> tuple[fx.GraphModule, list[Any]]:
    """torch.export's graph, and the values of its inputs."""
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(range(v.dim()), auto) for v in inputs) if dynamic else None
    gm = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False).graph_module
    return gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]


def without_values(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, all of which has to be run."""
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta.pop("val", None)
    return gm


def origin(gm: fx.GraphModule) -> list[Any]:
    return [[str(n.meta.get(key)) for key in ("stack_trace", "nn_module_stack")] for n in gm.graph.nodes]


@pytest.mark.parametrize("dynamic", [False, True])
def test_values_that_a_graph_carries_give_what_running_it_gives(dynamic: bool) -> None:
    inputs = torch.randn(3, 4, 6), torch.zeros(1, dtype=torch.float64)
    gm, values = exported(Known().eval(), *inputs, dynamic=dynamic)
    found, mutated = retrace(gm, values)
    expected, _ = retrace(without_values(gm), values)
    for traced_gm in (found, expected):
        graph.clean(traced_gm)
        graph.rename(traced_gm)
    assert mutated == [] and dump(found) == dump(expected) and origin(found) == origin(expected)
    assert not {"to.dtype", "reshape.default", "chunk.default", "flatten.using_ints"} & {*ops(found)}
    parameters = [torch.randn(tuple(int(s) for s in v.shape)) for v in values[: -len(inputs)]]
    for a, b in zip(found(*parameters, *inputs), expected(*parameters, *inputs), strict=True):
        assert torch.equal(a, b)


def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operators that fake tensors compute from now on."""
    run: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    def counted(self: FakeTensorMode, func: Any, *args: Any) -> Any:
        run.append(func)
        return dispatch(self, func, *args)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    return run


@pytest.mark.parametrize("layers", [2, 5])
def test_values_that_a_graph_carries_are_not_computed_again(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))])
    gm, values = exported(model, torch.randn(2, 4), dynamic=True)
    run = dispatched(monkeypatch)
    known, _ = retrace(gm, values)
    assert ops(known).count("gelu.default") == layers
    assert {f for f in run if f.namespace == "aten"} <= {torch.ops.aten.detach.default}
    retrace(without_values(gm), values)
    assert run.count(torch.ops.aten.gelu.default) >= layers


class Detaches(nn.Module):
    """As the empty caches of transformers begin: of a constant that a forward makes torch.export detaches in place."""

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tensor([], dtype=x.dtype)
        return F.gelu(torch.cat([start, x]))


def test_gradients_alone_see_a_tensor_that_is_detached_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, values = exported(Detaches(), torch.randn(6), dynamic=True)
    assert "detach_.default" in ops(gm)
    run = dispatched(monkeypatch)
    found, mutated = retrace(gm, values)
    assert torch.ops.aten.gelu.default not in run, "the values that the graph carries are taken"
    expected, _ = retrace(without_values(gm), values)
    assert torch.ops.aten.gelu.default in run
    assert mutated == []
    same = {"lift_fresh_copy.default": "clone.default"}  # of a constant: both are folded
    assert [same.get(op, op) for op in ops(found)] == ops(expected)
    x = torch.randn(20)
    constants = [torch.tensor([]) for _ in values[:-1]]
    assert torch.equal(found(*constants, x)[0], Detaches()(x)) and torch.equal(
        expected(*constants, x)[0], found(*constants, x)[0]
    )


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[0].add_(1)
        return y


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero().to(torch.float32) * 2


@pytest.mark.parametrize(("model", "gone"), [(InPlace(), "add_.Tensor"), (Nonzero(), "to.dtype")])
def test_graphs_that_have_to_be_run(model: nn.Module, gone: str) -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    gm, values = exported(model, x)
    assert gone in ops(gm)
    found, mutated = retrace(gm, values)
    assert mutated == [] and gone not in ops(found)
    assert torch.equal(found(x)[0], model(x))


def test_a_part_that_is_called_twice_has_two_values() -> None:
    part, (value,) = exported(nn.ReLU(), torch.randn(3))
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    body = nodes.get_attr("body")
    first = nodes.call_function(wrap, (body, x))
    (one,) = (nodes.call_function(operator.getitem, (first, 0)),)
    twice = nodes.call_function(torch.ops.aten.neg.default, (one,))
    again = nodes.call_function(operator.getitem, (nodes.call_function(wrap, (body, twice)), 0))
    for node in (one, twice, again):
        node.meta["val"] = value.clone()
    nodes.output((one, again))
    gm, _ = retrace(fx.GraphModule({"body": part}, nodes), [value])
    assert ops(gm) == ["relu.default", "neg.default", "relu.default"]
    x_ = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(gm(x_)[0], x_.relu()) and torch.equal(gm(x_)[1], torch.zeros(3))


class InTwoSteps(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape_as(y) * 2


def test_what_decomposes_in_two_steps_is_decomposed() -> None:
    x, y = torch.randn(3, 4), torch.randn(2, 6)
    gm, values = exported(InTwoSteps(), x, y)
    found, _ = retrace(gm, values)
    assert not any("reshape" in name for name in ops(found))
    assert ops(found) == ops(retrace(without_values(gm), values)[0])
    assert torch.equal(found(x, y)[0], x.T.reshape(2, 6) * 2)


class DecomposedInPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout1d(x, 0.5, True), F.alpha_dropout(x, 0.5, True)


def test_what_decomposes_into_a_change_in_place_is_functional() -> None:
    x = torch.ones(2, 50, 3)
    gm, values = exported(DecomposedInPlace(), x)
    found, mutated = retrace(gm, values)
    assert mutated == [] and not any(name.split(".")[0].endswith("_") for name in ops(found))
    assert ops(found) == ops(retrace(without_values(gm), values)[0])
    channels, _ = found(x)
    assert set(channels.unique().tolist()) == {0.0, 2.0} and torch.equal(channels, channels[..., :1].expand(-1, -1, 3))


class SizeToldLater(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = nn.utils.rnn.pad_sequence([x[0], x[1, :3]], batch_first=True)
        return rows.relu() * x[:2]


def test_sizes_are_as_the_whole_graph_tells_them() -> None:
    gm, values = exported(SizeToldLater(), torch.randn(4, 6), dynamic=True)
    found, _ = retrace(gm, values)
    expected, _ = retrace(without_values(gm), values)
    for traced_gm in (found, expected):
        graph.clean(traced_gm)
        graph.rename(traced_gm)
    assert dump(found) == dump(expected)


class Asserts(nn.Module):
    """Looks at its data, as models of images among tokens do: as many places as there are images."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [T, D], mask bool [T] -> [T, D]."""
        torch._check(mask.all().item())
        return x * mask[:, None]


@pytest.mark.parametrize("functional", [False, True])
def test_what_data_are_asserted_to_be_is_no_part_of_the_graph(
    functional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if functional:
        monkeypatch.setattr(trace, "_is_known", lambda _: False)
    given = (randn(4, 8), torch.ones(4, dtype=torch.bool))
    captured = capture_export(Asserts(), given)
    names = [graph.schema_name(n) for n in captured.gm.graph.nodes]
    assert "aten::mul" in " ".join(names) and not any("assert" in name for name in names)
    assert torch.equal(captured.gm(*given)[0], given[0])
