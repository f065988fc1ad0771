"""LayerNorm becomes RMSNorm: the mean of the channels is taken out of everything that writes the residual stream.

    %layer_norm: f32[2,8] = aten.layer_norm(%x, [8], @ln.weight, @ln.bias, 1e-05)      writers: W <- C W, b <- C b
    ->                                                                                 tables and constants: E <- E C
    %rms_norm: f32[2,8] = aten.rms_norm(%x, [8], @ln.weight, 1e-05)                    C = I - 11^T / d
    %add: f32[2,8] = aten.add.Tensor(%rms_norm, @ln.bias)                              (where the bias is not 0)

Values whose mean is 0 have their mean square as variance. Exact where LayerNorms alone read the stream: on a model with
RMS norms it would change the function (Ashkboos et al. 2024, SliceGPT). In a live model each nn.LayerNorm becomes a
`CentredLayerNorm` with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qfx import graph
from qfx.errors import Note
from qfx.passes import _edits as edits
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes import _stream as streams
from qfx.passes._build import call
from qfx.passes._sites import Norm, Record
from qfx.passes._stream import Part
from qfx.rewrites.centred import centred

aten = torch.ops.aten


@dataclass(frozen=True)
class Site(Record):
    """A residual stream: the LayerNorms that read it, and tensors with their axes that write it."""

    NAME: ClassVar[str] = "centre"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"norms": Norm.of, "writers": Part.of}

    norms: tuple[Norm, ...]
    writers: tuple[Part, ...]


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every residual stream that LayerNorms alone read; those of RMS norms need nothing; the others with the reason."""
    found, refusals = [], []
    streams_, notes = streams.find(gm, folded=False)
    for stream in streams_:
        if stream.centred:
            continue
        norms = [sites.norm_of(node) for node in stream.norms]
        reason = None
        if any(node.target is not aten.layer_norm.default for node in stream.norms):
            reason = "RMS norms read it, too"
        elif stream.direct:
            reason = f"%{stream.direct[0].name} reads it without a norm"
        elif any(not isinstance(norm, Norm) for norm in norms):
            reason = "a norm has no weight by which its module could be found"
        elif own := next((node for node in stream.norms if not _is_module(node)), None):
            reason = f"%{own.name} is computed by a module that is no nn.LayerNorm"
        if reason is None:
            found.append(Site(tuple(n for n in norms if isinstance(n, Norm)), tuple(stream.writers)))
        else:
            refusals.append(sites.note(stream.norms[0], f"the residual stream cannot be centred: {reason}"))
    return found, [*notes, *refusals]


def apply(module: nn.Module, site: Site) -> None:
    """Centre the writers in f64 and change the norms, in a graph or a live model."""
    for part in site.writers:
        edits.edit(module, part.weight, lambda old, axis=part.axis: old - old.mean(axis, keepdim=True))  # type: ignore[misc]
    if isinstance(module, fx.GraphModule):
        _in_graph(module, {norm.weight for norm in site.norms})
        return
    for norm in site.norms:
        centred(module.get_submodule(norm.weight.rpartition(".")[0]))


def _is_module(node: fx.Node) -> bool:
    """Does an nn.LayerNorm with its own forward compute it?"""
    stack = node.meta.get("nn_module_stack")
    kind = list(stack.values())[-1][1] if stack else None
    if isinstance(kind, type):
        return issubclass(kind, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward
    return str(kind) == "torch.nn.modules.normalization.LayerNorm"


def _in_graph(gm: fx.GraphModule, weights: set[str]) -> None:
    for node in list(gm.graph.nodes):
        if not graph.is_call(node, aten.layer_norm.default):
            continue
        a = m.arguments(node)
        weight, bias = m.skip_casts(a["weight"]), m.skip_casts(a["bias"])
        if weight is None or weight.target not in weights:
            continue
        with gm.graph.inserting_before(node):
            new = call(gm, aten.rms_norm.default, a["input"], a["normalized_shape"], a["weight"], a["eps"], like=node)
            if bias is not None and bool(graph.get_tensor(gm, str(bias.target)).any()):
                new = call(gm, aten.add.Tensor, new, a["bias"], like=node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    graph.clean(gm)
