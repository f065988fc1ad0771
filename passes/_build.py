"""Building nodes: every new node carries the value that its operator gives on fake tensors, and where it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from qfx import annotation
from qfx.passes._match import known

# What a node made in place of another inherits from it.
SPELLED_OUT = "qfx_spelled_out"  # the mark of attention that the model itself computes by products and a softmax
INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "qfx_module", "custom", SPELLED_OUT)


def call(gm: fx.GraphModule, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A call_function node `target(*args, **kwargs)` that came out of `like`.

    It stands where the graph is being inserted (`with gm.graph.inserting_before(...)`), else just before `like`.
    `meta["val"]` is what `target` gives on the fake values of its arguments; source line, module and annotation are
    those of `like`.
    """
    if gm.graph._insert == gm.graph._root.prepend:
        with gm.graph.inserting_before(like):
            node = gm.graph.call_function(target, args, kwargs)
    else:
        node = gm.graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in INHERITED if key in like.meta})
    node.meta["val"] = value_of(target, args, kwargs, like)
    return node


def value_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node | None = None) -> Any:
    """What `target` gives on the fake values of these arguments, which may hold nodes. Nothing is computed.

    Without tensors among the arguments (full, arange) the result is of the same fake mode as the value of `like`.
    """
    values: tuple[tuple[Any, ...], dict[str, Any]] = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    # Not torch's detect_fake_mode: inside a Dynamo backend that gives another mode than the graph's own.
    known_values = pytree.tree_leaves((values, None if like is None else like.meta.get("val")))
    mode = next((v.fake_mode for v in known_values if isinstance(v, FakeTensor)), None)
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    # The Python dispatcher keeps symbolic sizes: torch's own kernels of some operators (constant_pad_nd) fix them.
    with mode, torch.no_grad(), enable_python_dispatcher():
        return target(*values[0], **values[1])


def size(gm: fx.GraphModule, node: fx.Node, dim: int, *, like: fx.Node) -> int | fx.Node:
    """A size of a node's tensor: a number where it is known, else a new aten.sym_size node."""
    found = known(node.meta["val"].shape[dim])
    return found if isinstance(found, int) else call(gm, torch.ops.aten.sym_size.int, node, dim, like=like)


def replace_by_number(old: fx.Node, number: int) -> None:
    """Let every user of a size read a plain number, and erase it."""
    for user in list(old.users):
        user.args = fx.map_arg(user.args, lambda node: number if node is old else node)
        user.kwargs = fx.map_arg(user.kwargs, lambda node: number if node is old else node)
    old.graph.erase_node(old)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, and erase `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def take_place(old: fx.Node, new: fx.Node) -> None:
    """`replace`, and `new` gets the name of `old`."""
    replace(old, new)
    new.name = old.name


def matched(gm: fx.GraphModule, name: str, count: int) -> bool:
    """Note in `gm.meta["qfx_matches"]` how often a pass matched; returns whether it did."""
    matches: dict[str, int] = gm.meta.setdefault("qfx_matches", {})
    matches[name] = matches.get(name, 0) + count
    return count > 0


def plain(node: fx.Node) -> fx.Node:
    """The node without the annotation of that which it was made like."""
    annotation.clear(node)
    return node


def on_sizes(gm: fx.GraphModule, operation: Callable[[Any, Any], Any], a: Any, b: Any, like: fx.Node) -> Any:
    """Arithmetic on sizes: a number where both are known, else a node."""
    if isinstance(a, int) and isinstance(b, int):
        return operation(a, b)
    return call(gm, operation, a, b, like=like)
