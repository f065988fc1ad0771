"""Rotate the residual stream (R1 of QuaRot and SpinQuant): every writer and every reader by one orthogonal matrix Q.

    E <- E Q      writers: W <- Q^T W, b <- Q^T b      readers: W <- W Q        (x' = x Q, W maps x W^T)

Outliers of single channels spread over all of them, so that few bits hold the activations. Exact where all norms that
read the stream are RMS norms whose weight is 1 (see `norm_fold` and `centre`), since those do not see an orthogonal
change of basis. Post-norm models are refused. The graph's text stays as it is. (Ashkboos et al. 2024; Liu et al. 2024.)

A linear that shares the embedding's table (lm_head) may keep it: E' = E Q is what it reads, too. The weight g of the
norm before it, which no table can take, acts between two products while the model runs; none is needed where g is 1:

    %rms_norm: f32[2,64] = aten.rms_norm(%x, [64], @norm.weight, 1e-06)
    %linear: f32[2,9] = aten.linear(%rms_norm, @embed.weight)
    ->
    %rms_norm: f32[2,64] = aten.rms_norm(%x, [64], @norm.weight, 1e-06)                 g <- 1
    %hadamard: f32[2,64] = qfx.hadamard(%rms_norm, 64, 0, True)
    %mul: f32[2,64] = aten.mul.Tensor(%hadamard, @lm_head.gain)                         the g that was
    %hadamard_1: f32[2,64] = qfx.hadamard(%mul, 64, 0, False)
    %linear: f32[2,9] = aten.linear(%hadamard_1, @embed.weight)

In a live model the packed linear does so with its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.errors import Note
from qfx.passes import _edits as edits
from qfx.passes import _sites as sites
from qfx.passes import _stream as streams
from qfx.passes._build import call
from qfx.passes._sites import Norm, Record, Weight
from qfx.passes._stream import Part
from qfx.rewrites import rotation


@dataclass(frozen=True)
class Site(Record):
    """A residual stream of `size` channels, rotated in blocks of `block` channels by the matrix of `seed`.

    readers: weights and their input axes. writers: weights, biases, tables and constants and their output axes.
    heads: linears that share a table of the writers, and norms: the one before each, whose weight acts at run time.
    """

    NAME: ClassVar[str] = "rotate"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "readers": Part.of, "writers": Part.of, "heads": Weight.of, "norms": Norm.of,
    }  # fmt: skip

    readers: tuple[Part, ...]
    writers: tuple[Part, ...]
    size: int
    block: int
    seed: int
    heads: tuple[Weight, ...] = ()
    norms: tuple[Norm, ...] = ()

    @property
    def explicit(self) -> bool:
        """Packed linears of a live model have to rotate their input."""
        return bool(self.heads)


def find(
    gm: fx.GraphModule, *, seed: int = 0, block: int | None = None, tied: Collection[str] = ()
) -> tuple[list[Site], list[Note]]:
    """Every residual stream that can be rotated, and the others with the reason.

    block: None is the whole stream. tied: names of linears that may go on sharing the embedding's table.
    """
    found, refusals = [], []
    streams_, notes = streams.find(gm, tied=tied)
    for stream in streams_:
        first = stream.norms[0]
        if not stream.centred:
            refusals.append(sites.note(first, "the residual stream cannot be rotated: its LayerNorms are not centred"))
        elif stream.size % (block or 1):
            reason = f"the residual stream of {stream.size} channels cannot be rotated in blocks of {block}"
            refusals.append(sites.note(first, reason, "choose a block that divides the channels"))
        else:
            writers = (*stream.writers, *stream.shifts)
            heads = _heads(gm, stream)
            size, whole = stream.size, block or stream.size
            found.append(Site(tuple(stream.readers), writers, size, whole, seed, tuple(heads), tuple(heads.values())))
    return found, [*notes, *refusals]


def _heads(gm: fx.GraphModule, stream: streams.Stream) -> dict[Weight, Norm]:
    """The linears that share the table and the norm before each, those alone whose norm has a weight that acts."""
    found = {}
    for node, norm in stream.heads.items():
        if norm is not None and not bool((gain_of(gm, norm) == 1).all()):
            table: Any = node.args[1]
            found[Weight(graph.fqn_of(node), str(table.target), None, 1, 0)] = norm
    return found


def gain_of(module: nn.Module, norm: Norm) -> Tensor:
    """The factors of a norm, [channels], in f32, f64 for f64."""
    held = graph.get_tensor(module, norm.weight).detach()
    held = held.to(torch.promote_types(held.dtype, torch.float32))
    return held + 1.0 if norm.plus_one else held.clone()


def apply(module: nn.Module, site: Site) -> None:
    """Rotate readers and writers in f64, in a graph or a live model, and in a graph the input of `heads`.

    In a live model the gain lies beside the weight as the buffer `gain`, for the packed linear that rotates its input
    (see `rotations`).
    """
    for part in (*site.readers, *site.writers):
        rotate_tensor(module, part.weight, part.axis, site.block, site.seed)
    gains = {norm: gain_of(module, norm) for norm in site.norms}
    for norm in gains:
        one = 0.0 if norm.plus_one else 1.0
        edits.edit(module, norm.weight, lambda old, one=one: torch.full_like(old, one))  # type: ignore[misc]
    for head, norm in zip(site.heads, site.norms, strict=True):
        if isinstance(module, fx.GraphModule):
            _in_graph(module, head, gains[norm], site)
        else:
            module.get_submodule(head.name).register_buffer("gain", gains[norm])


def rotations(records: Collection[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """FQN of a linear -> (block, seed) of the rotations around its gain, of a plan's records."""
    own = [Site.from_record(record) for record in records if record["name"] == Site.NAME]
    return {head.name: (site.block, site.seed) for site in own for head in site.heads}


def _in_graph(gm: fx.GraphModule, head: Weight, gain: Tensor, site: Site) -> None:
    for node in list(gm.graph.nodes):
        if not sites.is_linear(node) or graph.fqn_of(node) != head.name:
            continue
        x: Any = node.args[0]
        name = f"{head.name}.gain"
        known = sites.holds(gm, name)
        held = graph.add_tensor(gm, name, graph.get_tensor(gm, name) if known else gain.to(graph.val(x).dtype), node)
        with gm.graph.inserting_before(node):
            back = call(gm, torch.ops.qfx.hadamard.default, x, site.block, site.seed, True, like=node)
            scaled = call(gm, torch.ops.aten.mul.Tensor, back, held, like=node)
            new = call(gm, torch.ops.qfx.hadamard.default, scaled, site.block, site.seed, False, like=node)
        for made in (back, scaled, new):
            annotation.clear(made)
        node.update_arg(0, new)


def rotate_tensor(module: nn.Module, fqn: str, axis: int, size: int, seed: int) -> None:
    """Replace a stored tensor by itself rotated along an axis in blocks of `size`, in f64 and in parts."""
    old = graph.get_tensor(module, fqn)
    new = torch.empty_like(old, memory_format=torch.contiguous_format, requires_grad=False)
    with torch.no_grad():
        source, target = old.detach().movedim(axis, -1), new.movedim(axis, -1)
        for rows in edits.parts(source) if source.dim() > 1 else [slice(None)]:
            target[rows] = rotation.rotate(source[rows].to(torch.float64), size, seed).to(old.dtype)
    edits.put(module, fqn, new)
