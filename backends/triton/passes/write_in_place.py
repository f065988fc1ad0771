"""Appends to packed caches write into the memory itself.

    %new = auto_functionalized_v2(qfx.cache_append, k=%k, v=%v, length=%n, spec=..., _all_bases=[%data, %scale])
    %data_1 = getitem(%new, 1)
    %scale_1 = getitem(%new, 2)
    %y = qfx.cache_attention(%q, [%data_1, %scale_1], ...)
    ->
    qfx.cache_append([%data, %scale], %k, %v, %n, ...)
    %y = qfx.cache_attention(%q, [%data, %scale], ...)

The functional form copies the whole memory. Where something later in the graph still reads the memory as it was, the
append writes into a copy.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qfx.backends.triton.passes._nodes import gives_views, note_computed
from qfx.graph import is_call
from qfx.passes._build import call

_FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2


def write_in_place(gm: fx.GraphModule) -> bool:
    """See the module."""
    found = [node for node in gm.graph.nodes if is_call(node, _FUNCTIONAL) and is_append(node)]
    for node in found:
        _rewrite(gm, node)
    return bool(found)


def is_append(node: fx.Node) -> bool:
    """Whether it is the functional form of qfx::cache_append, each tensor of the memory a whole base."""
    if node.args != (torch.ops.qfx.cache_append.default,):
        return False
    count = int(node.kwargs["_memory_length"])  # type: ignore[arg-type]
    return all(f"_memory_{i}_base_index" in node.kwargs for i in range(count))


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    given: dict[str, Any] = dict(node.kwargs)
    bases: list[fx.Node] = given["_all_bases"]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    with gm.graph.inserting_before(node):
        own = [call(gm, torch.ops.aten.clone.default, b, like=node) if _is_read(b, node, order) else b for b in bases]
        memory = [own[given[f"_memory_{i}_base_index"]] for i in range(given["_memory_length"])]
        operands = (given[name] for name in ("k", "v", "length", "spec"))
        note_computed(call(gm, torch.ops.qfx.cache_append.default, memory, *operands, like=node), node)
    for user in list(node.users):
        assert is_call(user, operator.getitem), user
        user.replace_all_uses_with(own[int(user.args[1]) - 1])  # type: ignore[arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _is_read(base: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether something after the node reads a base, or a view of it."""
    todo, seen = [base], {node}
    while todo:
        for user in todo.pop().users:
            if order[user] > order[node]:
                return True
            if user not in seen and gives_views(user):
                todo.append(user)
            seen.add(user)
    return False
