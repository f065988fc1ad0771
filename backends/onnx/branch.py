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
    branches, results = [], []
    for make in (then, otherwise):
        graph, result = _branch(b, source, make)
        branches.append(graph)
        results.append(result)
    assert results[0].dtype == results[1].dtype and results[0].shape == results[1].shape, results
    attributes = {"then_branch": branches[0], "else_branch": branches[1]}
    chosen = b.ops("If", condition, dtypes=[results[0].dtype], **attributes)[0]
    return Value(chosen.name, chosen.dtype, results[0].shape)


def _branch(b: Builder, source: Value, make: Callable[[], Value]) -> tuple[onnx.GraphProto, Value]:
    """The nodes that `make` emits and that depend on `source`, as a graph of its own."""
    start, before = len(b.nodes), (dict(b.memo), dict(b.views))
    result = make()
    inside, inner = {source.name}, []
    emitted = b.nodes[start:]
    del b.nodes[start:]
    for node in emitted:
        if inside.intersection(read_by(node)):
            inside.update(node.output)
            inner.append(node)
        else:
            b.nodes.append(node)
    assert result.name in inside and result.name != source.name, "a branch that does not depend on its source"
    b.memo, b.views = before  # what was remembered of the inside is not known outside
    b.forget(inside)
    used, needed = {result.name}, []
    for node in reversed(inner):
        if used.intersection(node.output):
            needed.append(node)
            used |= read_by(node)
    output = helper.make_tensor_value_info(result.name, ONNX_TYPE[result.dtype], None)
    return helper.make_graph(needed[::-1], result.name, [], [output]), result


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
