"""If: of two ways to compute a value the one that a condition picks at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx
from onnx import helper

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.values import ONNX_TYPE, Value


def choose(
    b: Builder, condition: Value, source: Value, then: Callable[[], Value], otherwise: Callable[[], Value]
) -> Value:
    """then() where the condition, bool [], holds, else otherwise(): values of one dtype and shape, made from `source`.

    What does not depend on `source` (sizes, weights) is computed outside, once for both and for later nodes.
    """
    found = choose_each(b, condition, [source], lambda: [then()], lambda: [otherwise()])
    return found[0]


def choose_each(
    b: Builder,
    condition: Value,
    sources: Sequence[Value],
    then: Callable[[], Sequence[Value]],
    otherwise: Callable[[], Sequence[Value]],
) -> list[Value]:
    """As `choose` for several values, each made from at least one of `sources`."""
    branches, results = [], []
    for make in (then, otherwise):
        graph, made = _branch(b, sources, make)
        branches.append(graph)
        results.append(made)
    kinds = [[(value.dtype, value.shape) for value in made] for made in results]
    assert kinds[0] == kinds[1], kinds
    attributes = {"then_branch": branches[0], "else_branch": branches[1]}
    chosen = b.ops("If", condition, dtypes=[value.dtype for value in results[0]], **attributes)
    return [Value(c.name, c.dtype, value.shape) for c, value in zip(chosen, results[0], strict=True)]


def _branch(
    b: Builder, sources: Sequence[Value], make: Callable[[], Sequence[Value]]
) -> tuple[onnx.GraphProto, Sequence[Value]]:
    """The nodes that `make` emits and that depend on `sources`, as a graph of its own."""
    start, before = len(b.nodes), (dict(b.memo), dict(b.views))
    results = make()
    outside = {value.name for value in sources}
    inside, inner = set(outside), []
    emitted = b.nodes[start:]
    del b.nodes[start:]
    for node in emitted:
        if inside.intersection(read_by(node)):
            inside.update(node.output)
            inner.append(node)
        else:
            b.nodes.append(node)
    names = {result.name for result in results}
    assert names <= inside - outside, "a branch that does not depend on its source"
    b.memo, b.views = before  # what was remembered of the inside is not known outside
    b.forget(inside)
    used, needed = names, []
    for node in reversed(inner):
        if used.intersection(node.output):
            needed.append(node)
            used |= read_by(node)
    outputs = [helper.make_tensor_value_info(r.name, ONNX_TYPE[r.dtype], None) for r in results]
    return helper.make_graph(needed[::-1], results[0].name, [], outputs), results


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of a node."""
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def read_by(node: onnx.NodeProto) -> set[str]:
    """The values that a node reads, those that its branches take from outside included."""
    names = set(node.input)
    for graph in subgraphs(node):
        made = {name for inner in graph.node for name in inner.output}
        names |= {name for inner in graph.node for name in read_by(inner)} - made
    return names


def every_node(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of their branches."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from every_node(graph.node)
