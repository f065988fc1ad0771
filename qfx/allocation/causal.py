"""Does an attention see only what came before? Then its keys and values are what a cache keeps.

The mask is computed at small sizes, from the part of the graph that makes it:

    %le: b1[s0,1,s1,s1] = aten.le.Tensor(%index_3, %index_2)          4 tokens: 1000 1100 1110 1111
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from qfx import graph
from qfx.allocation.sizes import Sizes, numbers
from qfx.errors import Note, first_line
from qfx.passes import _match as m

_BATCH, _LENGTH = 2, 4  # sizes at which masks are computed; all others are _LENGTH too, and nothing is cached
_BLOCKED = -1e4  # an additive mask at or below this lets nothing through
_LARGE = ("aten::linear", "qfx::linear", "qfx::attention", "aten::scaled_dot_product_attention")


def is_causal(attention: fx.Node, sizes: Sizes, notes: list[Note]) -> bool:
    """Whether no query reads a later key. What cannot be told counts as no, with a note."""
    given = m.arguments(attention)
    if given.get("is_causal") or given.get("causal"):
        return True
    mask = given.get("attn_mask", given.get("mask"))
    if not isinstance(mask, fx.Node):
        return False
    value = _computed(mask, sizes)
    if isinstance(value, str):
        reason = f"whether its mask is causal cannot be told: {value}; it is counted as without a cache"
        notes.append(
            Note(graph.fqn_of(attention), reason, "capture the model with its cache (qfx.decoding.decoder)", minor=True)
        )
        return False
    return _lower(value)


def _lower(mask: Tensor) -> bool:
    """A mask [.., T, T] that lets each query through to itself and to nothing later."""
    if mask.dim() < 2 or mask.shape[-2:] != (_LENGTH, _LENGTH):
        return False
    opened = mask if mask.dtype == torch.bool else mask > _BLOCKED
    later = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).triu(1)
    return not bool((opened & later).any()) and bool(opened.diagonal(dim1=-2, dim2=-1).all())


def _computed(mask: fx.Node, sizes: Sizes) -> Tensor | str:
    """The mask's value, or why there is none."""
    needed = graph.above(mask)
    if large := next((n for n in needed if graph.schema_name(n) in _LARGE), None):
        return f"it depends on %{large.name}"
    owner = mask.graph.owning_module
    assert owner is not None
    env: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            for node in mask.graph.nodes:
                if node in needed:
                    env[node] = _step(owner, node, env, sizes)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    found = env[mask]
    return found if isinstance(found, Tensor) else "it is no tensor"


def _step(owner: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], sizes: Sizes) -> Any:
    if node.op == "get_attr":
        return graph.get_tensor(owner, str(node.target))
    if node.op == "placeholder":
        return _input(node, sizes)
    assert node.op == "call_function" and callable(node.target), node
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    return node.target(*args, **kwargs)


def _input(node: fx.Node, sizes: Sizes) -> Any:
    """Ones, or 0, 1, 2, ... for positions."""
    fake = graph.val(node)
    if not isinstance(fake, Tensor):
        return _LENGTH
    exprs = sizes.shape(fake)
    free = {str(s) for e in exprs for s in getattr(e, "free_symbols", ())}
    put = {"batch": _BATCH, "sequence": _LENGTH, "context": 0, **dict.fromkeys(free - {"batch", "context"}, _LENGTH)}
    shape = [int(size) for size in numbers(exprs, put)]
    if "position" in node.name and shape:
        return torch.arange(shape[-1]).expand(shape).to(fake.dtype)
    return torch.ones(shape, dtype=fake.dtype)
