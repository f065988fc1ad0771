"""qfx.passes._build: new nodes carry values and what they came from."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.passes import _build
from tests.graphs import Function, capture, error, text

aten = torch.ops.aten


def _graph(dynamic: bool = False) -> torch.fx.GraphModule:
    return capture(Function(lambda own, x: (x @ own.w).sin(), w=torch.randn(4, 4)), torch.randn(3, 4), dynamic=dynamic)


def test_a_call_stands_before_the_node_it_came_from_and_has_its_value() -> None:
    gm = _graph(dynamic=True)
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    cos = _build.call(gm, aten.cos.default, sin.args[0], like=sin)
    assert cos.next is sin
    assert cos.meta["val"].shape == sin.meta["val"].shape
    assert cos.meta["stack_trace"] == sin.meta["stack_trace"]
    _build.replace(sin, cos)
    gm.recompile()
    x = torch.randn(5, 4)
    assert error((x @ gm.get_parameter("w")).cos(), gm(x)) == 0


def test_a_call_stands_where_the_graph_is_being_inserted() -> None:
    gm = _graph()
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    with gm.graph.inserting_after(sin):
        cos = _build.call(gm, aten.cos.default, sin, like=sin)
    assert sin.next is cos


def test_sizes_are_numbers_or_nodes() -> None:
    gm = _graph(dynamic=True)
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    first = _build.size(gm, sin.args[0], 0, like=sin)
    assert isinstance(first, torch.fx.Node) and isinstance(first.meta["val"], torch.SymInt)
    assert _build.size(gm, sin.args[0], 1, like=sin) == 4
    _build.replace_by_number(first, 3)
    assert "sym_size" not in text(gm)


def test_matches_add_up() -> None:
    gm = _graph()
    assert _build.matched(gm, "some", 2) is True
    assert _build.matched(gm, "some", 0) is False
    assert gm.meta["qfx_matches"] == {"some": 2}


def test_nothing_is_computed_for_a_value() -> None:
    def refuse(x: Tensor) -> Tensor:
        assert type(x).__name__ == "FakeTensor"
        return x.new_empty((*x.shape, 10**6))

    gm = _graph()
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    assert _build.value_of(refuse, (sin,), {}).shape == (3, 4, 10**6)


def test_a_value_without_tensor_arguments_joins_those_of_the_graph() -> None:
    gm = _graph()
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    full = _build.call(gm, aten.full.default, [], 0.0, like=sin)
    above = _build.call(gm, aten.gt.Scalar, sin.args[0], 0, like=sin)
    both = _build.call(gm, aten.where.ScalarSelf, above, 1.0, full, like=sin)
    assert full.meta["val"].fake_mode is sin.meta["val"].fake_mode
    assert both.meta["val"].shape == (3, 4)
