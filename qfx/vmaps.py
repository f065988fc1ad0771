"""Regions of torch.vmap in a captured graph, written as the plain operators that they stand for.

%level = _vmap_increment_nesting(4, 'error')          %mul = aten.mul.Tensor(%x, %y)
%a = _add_batch_dim(%x, 0, 1)
%b = _add_batch_dim(%y, 0, 1)                    ->
%mul = operator.mul(%a, %b)
%out = _remove_batch_dim(%mul, 1, 4, 0)
%end = _vmap_decrement_nesting()

Tracing before dispatch, which keeps linear and attention whole, does not see through the batched tensors of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

_BEGIN, _END = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def has_vmaps(gm: fx.GraphModule) -> bool:
    """Whether the graph, or one that it calls (a checkpointed function's), enters a region of torch.vmap."""
    return any(_named(node, _BEGIN) for node in gm.graph.nodes) or any(map(has_vmaps, _bodies(gm).values()))


def without_vmaps(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """A copy of the graph without regions of torch.vmap; `gm` is not changed.

    fakes: values of the placeholders, in order; those of other nodes are what Dynamo (meta["example_value"]) or
    torch.export (meta["val"]) notes. To be called under the fakes' mode.
    """
    values = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), fakes, strict=True))
    graph, copied, constants = fx.Graph(), dict[fx.Node, Any](), dict[str, Any]()
    nodes = iter(gm.graph.nodes)
    for node in nodes:
        if _named(node, _BEGIN):
            region = [node, *_until_end(nodes)]
            inputs, outputs = _borders(region)
            traced = _traced(gm, region, inputs, outputs, [_value(n, values) for n in inputs])
            found = _inlined(graph, constants, traced, [copied[n] for n in inputs])
            copied.update(zip(outputs, found, strict=True))
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    held = fx.GraphModule(gm, gm.graph)  # what the nodes of gm read
    for name, value in constants.items():
        setattr(held, name, value)
    for name, body in _bodies(gm).items():
        if has_vmaps(body):
            read = [_value(node, {}) for node in body.graph.nodes if node.op == "placeholder"]
            setattr(held, name, without_vmaps(body, read))
    held.graph = graph
    held.graph.lint()
    return held


@contextmanager
def levels_kept() -> Iterator[None]:
    """Levels of torch.func that a graph entered stay where it ends in an error, and Dynamo's guards see them."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        # one by one: torch 2.11 has a function that leaves levels down to a depth, and leaves two at a time
        while torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
            _leave()


def _leave() -> None:
    """Leave the innermost level of torch.func."""
    level, kinds = torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.TransformType
    leave: dict[Any, Callable[[], int]] = {
        kinds.Vmap: torch._C._functorch._vmap_decrement_nesting,
        kinds.Grad: torch._C._functorch._grad_decrement_nesting,
        kinds.Jvp: torch._C._functorch._jvp_decrement_nesting,
        kinds.Functionalize: torch._C._functorch._func_decrement_nesting,
    }
    leave[level.key()]()


def _bodies(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graphs that a graph hands to wrappers, by the names under which it holds them."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    held = {name: getattr(gm, name, None) for name in names}
    return {name: body for name, body in held.items() if isinstance(body, fx.GraphModule)}


def _named(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == name


def _until_end(nodes: Iterator[fx.Node]) -> Iterator[fx.Node]:
    """The nodes up to the end of the region that was entered last, the regions in it included."""
    depth = 1
    while depth:
        node = next(nodes)
        depth += _named(node, _BEGIN) - _named(node, _END)
        yield node


def _borders(region: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes outside that the region reads, constants apart, and those of it that others read."""
    inside = set(region)
    reads = (n for node in region for n in node.all_input_nodes)
    inputs = dict.fromkeys(n for n in reads if n not in inside and n.op != "get_attr")
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    return list(inputs), outputs


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node in values:
        return values[node]
    return node.meta["example_value" if "example_value" in node.meta else "val"]


def _traced(
    gm: fx.GraphModule, region: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node],
    values: Sequence[Any],
) -> fx.GraphModule:  # fmt: skip
    """The region's operators on plain tensors."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
    for node in region:
        for constant in node.all_input_nodes:
            if constant.op == "get_attr" and constant not in copied:
                copied[constant] = graph.node_copy(constant)
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in outputs))
    run = fx.Interpreter(fx.GraphModule(gm, graph)).run
    with levels_kept(), torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        return make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*values)


def _inlined(
    graph: fx.Graph, constants: dict[str, Any], traced: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[Any, ...]:
    """Copies the traced region into the graph, its constants into `constants`; returns what stands for its outputs."""
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copied = dict(zip(places, inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            name = f"_vmap_constant{len(constants)}"
            constants[name] = getattr(traced, node.target)
            copied[node] = graph.get_attr(name)
        elif node.op == "output":
            return tuple(fx.map_arg(node.args[0], copied.__getitem__))
        elif node.op != "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    raise AssertionError("a graph without an output")
