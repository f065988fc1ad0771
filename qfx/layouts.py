"""How a module holds the weight that a node of the graph reads.

A layout is `linear` [N, K], `transposed` [K, N], `embedding`, `patch` (a convolution kernel used as a linear),
`experts` [E, N, K], `experts-transposed` [E, K, N]; with `-read` where the forward of another module reads it, with
`+read` where one does so beside the module's own. `unknown` cannot be written back.
"""

from __future__ import annotations

import torch
from torch import fx

from qfx import graph

READ = "-read"
ALSO = "+read"


def layout_of(node: fx.Node) -> str:
    """How the module holds the weight of a linear-like node."""
    weight = graph.weight_of(node)
    assert weight is not None
    read = READ if graph.fqn_of(node) not in (node.meta.get("qfx_module"), weight.target) else ""
    if graph.schema_name(node) == "aten::embedding":
        return f"embedding{read}"
    operand = node.args[1]
    assert isinstance(operand, fx.Node)
    shape, held = tuple(operand.meta["val"].shape), tuple(weight.meta["val"].shape)
    swapped = graph.is_turned(operand)
    if graph.schema_name(node) == "qfx::grouped_linear":
        return "experts-transposed" if swapped else "experts"
    if len(held) > 2:
        return f"patch{read}" if not swapped and torch.Size(held[1:]).numel() == shape[-1] else "unknown"
    if tuple(held[::-1] if swapped else held) != shape:
        return "unknown"
    return f"transposed{read}" if swapped else f"linear{read}"


def is_transposed(layout: str) -> bool:
    """The module knows the weight as [.., K, N]."""
    return bare(layout).endswith("transposed")


def bare(layout: str) -> str:
    """The layout without who reads it."""
    return layout.removesuffix(READ).removesuffix(ALSO)
