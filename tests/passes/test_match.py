"""qfx.passes._match: the questions that passes ask."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.graph import val
from qfx.passes import _match as m
from tests.graphs import Function, capture

aten = torch.ops.aten


def last(function: Any, *inputs: torch.Tensor, dynamic: bool = False) -> torch.fx.Node:
    gm = capture(Function(lambda own, *x: function(*x)), *(inputs or (torch.randn(2, 4),)), dynamic=dynamic)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    node = output.args[0][0]
    assert isinstance(node, torch.fx.Node)
    return node


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda x: x * 3, 3.0),
        (lambda x: 3.0 * x, 3.0),
        (lambda x: x / 4, 0.25),
        (lambda x: torch.full((), 2.0) * x, 2.0),
        (lambda x: 3.0 / x, 3.0),  # captured as 3 times the reciprocal
        (lambda x: x * x, None),
        (lambda x: x / 0.0, None),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), None),
        (lambda x: x + 1, None),
    ],
)
def test_scaled(function: Any, factor: float | None) -> None:
    found = m.scaled(last(function))
    assert (None if found is None else found[1]) == factor


def test_additions_with_alpha_are_not_plain() -> None:
    assert m.plain_binary(last(lambda x: x + x), *m.ADD)
    assert not m.plain_binary(last(lambda x: torch.add(x, x, alpha=2)), *m.ADD)


def test_upcasts_are_looked_through_and_downcasts_are_not() -> None:
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert m.skip_upcasts(last(lambda x: x.float().double(), x)).op == "placeholder"
    assert m.skip_upcasts(last(lambda x: x.float().bfloat16(), x)).op == "call_function"
    assert m.skip_casts(last(lambda x: x.float().bfloat16(), x)).op == "placeholder"


def test_numbers() -> None:
    assert m.number(2) == 2.0
    assert m.number(True) is None
    assert m.number(last(lambda x: x)) is None
    assert m.is_number(0.1 + 0.2, 0.3)
    assert not m.is_number(0.3001, 0.3)


def test_arguments_have_names_and_defaults() -> None:
    found = m.arguments(last(lambda x: torch.softmax(x, -1)))
    assert (found["dim"], found["dtype"]) == (-1, None)


def test_symbolic_sizes_are_compared_without_guards() -> None:
    node = last(lambda x, y: x.sin() + y.sum(), torch.randn(2, 3), torch.randn(5, 6), dynamic=True)
    sizes = m.shape(node)
    assert m.same_sizes(sizes, sizes)
    assert not m.same_size(sizes[0], sizes[1])
    assert not m.same_size(sizes[0], 2)
    assert m.known(7) == 7
    assert m.is_last(-1, node) and m.is_last(1, node) and not m.is_last(0, node)


def cut(function: Any, width: int = 8, dynamic: bool = False) -> tuple[torch.fx.Node, tuple[Any, Any]]:
    """The sine of x [2, 3, width], and the two nodes that a function makes of it."""
    gm = capture(
        Function(lambda own, x: [p.cos() for p in function(x.sin())]), torch.randn(2, 3, width), dynamic=dynamic
    )
    sin = next(n for n in gm.graph.nodes if n.target is aten.sin.default)
    first, second = (n.args[0] for n in gm.graph.nodes if n.target is aten.cos.default)
    return sin, (first, second)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[..., :4], x[..., 4:]),
        lambda x: (x[..., -8:-4], x[..., -4:]),
        lambda x: (x[..., -20:4], x[..., 4:99]),
        lambda x: (x.narrow(2, 0, 4), x.narrow(-1, 4, 4)),
        lambda x: x.chunk(2, -1),
        lambda x: x.chunk(2, 2),
        lambda x: x.split(4, -1),
        lambda x: x.split(4, 2),
        lambda x: x.split([4, 4], -1),
        lambda x: x.split([0, 4, 4], 2)[1:],
        lambda x: x.tensor_split(2, -1),
        lambda x: (x.split(4, -1)[0], x[..., 4:]),
    ],
)
def test_halves_however_they_are_cut(function: Any) -> None:
    x, (first, second) = cut(function)
    assert m.elements(first) == (x, range(4))
    assert m.elements(second) == (x, range(4, 8))
    assert m.whole(first, second) is x
    assert m.whole(second, first) is m.whole(first, first) is m.whole(first, second, interleaved=True) is None


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.sampled_from(["slice", "split", "sizes", "chunk"]))
def test_elements_are_those_that_torch_takes(data: st.DataObject, width: int, kind: str) -> None:
    graph, value = torch.fx.Graph(), torch.arange(width).expand(2, width)
    x = graph.placeholder("x")
    x.meta["val"] = value
    if kind == "slice":
        end = st.none() | st.integers(-width - 2, width + 2)
        at = (-1, data.draw(end), data.draw(end), data.draw(st.integers(1, 3)))
        part, found = graph.call_function(aten.slice.Tensor, (x, *at)), aten.slice.Tensor(value, *at)
    else:
        ends = sorted(data.draw(st.lists(st.integers(0, width), max_size=3)))
        sizes = [end - start for start, end in itertools.pairwise([0, *ends, width])]
        number = data.draw(st.integers(1, width + 1))
        splits: dict[str, tuple[Any, Any]] = {
            "split": (aten.split.Tensor, number),
            "sizes": (aten.split_with_sizes.default, sizes),
            "chunk": (aten.chunk.default, number),
        }
        target, how = splits[kind]
        pieces = target(value, how, 1)
        which = data.draw(st.integers(0, len(pieces) - 1))
        part = graph.call_function(operator.getitem, (graph.call_function(target, (x, how, 1)), which))
        found = pieces[which]
    source, columns = m.elements(part) or (None, ())
    assert source is x
    assert list(columns) == found[0].tolist()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[..., :3], x[..., 3:]),
        lambda x: (x[..., :4], x[..., 3:7]),
        lambda x: (x[..., :4], x[..., :4]),
        lambda x: (x[:, :, :4:2], x[..., 4::2]),
        lambda x: (x[:, :4], x[:, 4:]),
        lambda x: x.split([4, 3, 1], -1)[:2],
        lambda x: x.split([2, 4, 2], -1)[:2],
        lambda x: x.split([2, 4, 2], -1)[1:],
        lambda x: x.split(3, -1)[:2],
        lambda x: x.chunk(4, -1)[:2],
        lambda x: x.chunk(2, 0),
        lambda x: x.split([1, 1], 0),
        lambda x: (x[..., :4], x.exp()[..., 4:]),
        lambda x: (x[..., :4], x.exp()),
        lambda x: x.unbind(0),
    ],
)
def test_what_are_no_halves(function: Any) -> None:
    assert m.whole(*cut(function)[1]) is None


def test_even_and_odd_elements() -> None:
    x, parts = cut(lambda x: (x[..., ::2], x[..., 1::2]))
    assert m.whole(*parts, interleaved=True) is x
    assert m.whole(*parts[::-1], interleaved=True) is m.whole(*parts) is None
    for other in (lambda x: (x[..., :6:2], x[..., 1::2]), lambda x: (x[..., ::4], x[..., 1::4])):
        assert m.whole(*cut(other)[1], interleaved=True) is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_odd_has_halves(interleaved: bool) -> None:
    function = (lambda x: (x[..., ::2], x[..., 1::2])) if interleaved else (lambda x: (x[..., :3], x[..., 3:]))
    assert m.whole(*cut(function, width=7)[1], interleaved=interleaved) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.chunk(2, -1),
        lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
        lambda x: (x[..., ::2], x[..., 1::2]),
    ],
)
def test_symbols_have_no_halves_and_stay_symbols(function: Any) -> None:
    x, parts = cut(function, dynamic=True)
    before = len(val(x).shape[-1].node.shape_env.guards)
    assert isinstance(m.shape(x)[-1], torch.SymInt)
    assert all(m.whole(*parts, interleaved=flag) is None for flag in (False, True))
    assert isinstance(m.shape(x)[-1], torch.SymInt)
    assert len(val(x).shape[-1].node.shape_env.guards) == before


def test_widths_beside_symbols_are_known() -> None:
    gm = capture(
        Function(lambda own, x: [p.cos() for p in x.reshape(-1, 8).chunk(2, -1)]), torch.randn(5, 8), dynamic=True
    )
    first, second = (n.args[0] for n in gm.graph.nodes if n.target is aten.cos.default)
    assert m.whole(first, second) is not None
