"""Mutated inputs (static caches) that are updated where they lie.

A captured graph writes into an input by giving its new value as an output, which the caller copies back. Where that
output is a scatter into the input and nothing else reads the input, ONNX Runtime may write into the input's own memory:
the caller's copy is then one onto itself, and no byte of the rest of a cache moves.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qfx.backends.onnx.values import computed
from qfx.graph import is_call

_aten = torch.ops.aten
_SCATTERS = (_aten.index_copy.default, _aten.index_add.default, _aten.scatter.src, _aten.scatter_add.default)


def in_place(gm: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node]) -> dict[int, int]:
    """Position among a stage's outputs -> position among its inputs, for outputs that may be written into the input."""
    results = gm.graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    found: dict[int, int] = {}
    for place, name in gm.meta.get("qfx_mutations", {}).items():
        node = results[place]
        source = next((n for n in inputs if n.name == name), None)
        if source is not None and node in outputs and _only_scatters_into(node, source):
            found[outputs.index(node)] = inputs.index(source)
    return found


def _only_scatters_into(node: object, source: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or not is_call(node, *_SCATTERS) or node.args[0] is not source:
        return False
    fake = source.meta["val"]
    readers = [u for u in source.users if u is not node and not is_call(u, _aten.sym_size.int)]
    others = source in node.args[1:] or source in node.kwargs.values()
    return isinstance(fake, Tensor) and fake.dtype == computed(fake.dtype) and not readers and not others
