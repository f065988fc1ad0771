"""qfx.verify: graphs that passes make hold; graphs broken on purpose do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qfx import annotation, graph
from qfx.format import Format
from qfx.verify import verify
from tests.graphs import Function, capture, node_of

aten = torch.ops.aten


def captured() -> fx.GraphModule:
    model = Function(lambda own, x: own.down(torch.relu(own.up(x))), up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    return capture(model, torch.randn(2, 4), dynamic=True)


def test_a_captured_graph_holds() -> None:
    gm = captured()
    verify(gm)
    annotation.set(node_of(gm, "linear"), "w", Format.parse("i4/g128"))
    verify(gm)


def _no_value(gm: fx.GraphModule) -> None:
    del node_of(gm, "relu").meta["val"]


def _no_value_of_an_input(gm: fx.GraphModule) -> None:
    del node_of(gm, "inputs_0").meta["val"]


def _no_value_of_a_parameter(gm: fx.GraphModule) -> None:
    del node_of(gm, "p_up_weight").meta["val"]


def _parameter_gone(gm: fx.GraphModule) -> None:
    del gm.up.weight  # type: ignore[union-attr]


def _module_gone(gm: fx.GraphModule) -> None:
    del gm.up


def _no_tensor(gm: fx.GraphModule) -> None:
    del gm.up.weight  # type: ignore[union-attr]
    gm.up.weight = "text"  # type: ignore[union-attr]


def _other_shape(gm: fx.GraphModule) -> None:
    graph.set_tensor(gm, "up.weight", torch.zeros(8, 5))


def _other_dtype(gm: fx.GraphModule) -> None:
    graph.set_tensor(gm, "up.weight", torch.zeros(8, 4, dtype=torch.float16))


def _in_place(gm: fx.GraphModule) -> None:
    node_of(gm, "relu").target = aten.relu_.default


def _method(gm: fx.GraphModule) -> None:
    relu = node_of(gm, "relu")
    relu.op, relu.target = "call_method", "relu"


def _module(gm: fx.GraphModule) -> None:
    gm.add_module("act", nn.ReLU())
    relu = node_of(gm, "relu")
    relu.op, relu.target = "call_module", "act"


def _late_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_after(node_of(gm, "relu")):
        gm.graph.placeholder("late").meta["val"] = None


def _used_before_made(gm: fx.GraphModule) -> None:
    node_of(gm, "relu").append(node_of(gm, "linear"))


BROKEN: dict[str, tuple[Callable[[fx.GraphModule], None], type[Exception], str]] = {
    "no value": (_no_value, AssertionError, "relu.*carries no value"),
    "no value of an input": (_no_value_of_an_input, AssertionError, "inputs_0 carries no value"),
    "no value of a parameter": (_no_value_of_a_parameter, AssertionError, "p_up_weight carries no value"),
    "parameter gone": (_parameter_gone, RuntimeError, "p_up_weight target up.weight references nonexistent attribute"),
    "module gone": (_module_gone, RuntimeError, "p_up_weight target up.weight references nonexistent attribute"),
    "no tensor": (_no_tensor, AssertionError, "up.weight is str, not a tensor"),
    "other shape": (_other_shape, AssertionError, r"the graph says .*\(8, 4\), up.weight is .*\(8, 5\)"),
    "other dtype": (_other_dtype, AssertionError, "the graph says torch.float32 .*, up.weight is torch.float16"),
    "in place": (_in_place, AssertionError, "relu: aten.relu_.default changes its input"),
    "a method": (_method, AssertionError, "relu: call_method has no place"),
    "a module": (_module, AssertionError, "relu: call_module has no place"),
    "late input": (_late_input, AssertionError, "input late stands after a call"),
    "used before made": (_used_before_made, RuntimeError, "relu.*used before it has been defined"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_found(name: str) -> None:
    breaks, kind, message = BROKEN[name]
    gm = captured()
    breaks(gm)
    with pytest.raises(kind, match=message), torch.no_grad():
        verify(gm)


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"z": "i8"}, "unknown role"), ({"w": "int8"}, "did you mean 'i8'"), ("w=i8", "no dictionary")],
)
def test_bad_annotations_are_found(stored: object, message: str) -> None:
    """The user may write them with torch.fx.traceback.annotate, so they are no fault of ours."""
    gm = captured()
    node_of(gm, "linear").meta["custom"] = {"qfx": stored}
    with pytest.raises(ValueError, match=message) as caught:
        verify(gm)
    assert "%linear" in str(caught.value)
