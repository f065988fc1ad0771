"""Rotate the residual stream (R1 of QuaRot and SpinQuant): every writer and every reader by one orthogonal matrix Q.

    E <- E Q      writers: W <- Q^T W, b <- Q^T b      readers: W <- W Q        (x' = x Q, W maps x W^T)

Outliers of single channels spread over all of them, so that few bits hold the activations. Exact where all norms that
read the stream are RMS norms whose weight is 1 (see `norm_fold` and `centre`), since those do not see an orthogonal
change of basis. Post-norm models are refused. The graph's text stays as it is. (Ashkboos et al. 2024; Liu et al. 2024.)
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
from qfx.passes import _sites as sites
from qfx.passes import _stream as streams
from qfx.passes._sites import Record
from qfx.passes._stream import Part
from qfx.rewrites import rotation


@dataclass(frozen=True)
class Site(Record):
    """A residual stream of `size` channels, rotated in blocks of `block` channels by the matrix of `seed`.

    readers: weights and their input axes. writers: weights, biases, tables and constants and their output axes.
    """

    NAME: ClassVar[str] = "rotate"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"readers": Part.of, "writers": Part.of}

    readers: tuple[Part, ...]
    writers: tuple[Part, ...]
    size: int
    block: int
    seed: int


def find(gm: fx.GraphModule, *, seed: int = 0, block: int | None = None) -> tuple[list[Site], list[Note]]:
    """Every residual stream that can be rotated, and the others with the reason. block: None is the whole stream."""
    found, refusals = [], []
    streams_, notes = streams.find(gm)
    for stream in streams_:
        first = stream.norms[0]
        if not stream.centred:
            refusals.append(sites.note(first, "the residual stream cannot be rotated: its LayerNorms are not centred"))
        elif stream.size % (block or 1):
            reason = f"the residual stream of {stream.size} channels cannot be rotated in blocks of {block}"
            refusals.append(sites.note(first, reason, "choose a block that divides the channels"))
        else:
            writers = (*stream.writers, *stream.shifts)
            found.append(Site(tuple(stream.readers), writers, stream.size, block or stream.size, seed))
    return found, [*notes, *refusals]


def apply(module: nn.Module, site: Site) -> None:
    """Rotate readers and writers in f64, in a graph or a live model."""
    for part in (*site.readers, *site.writers):
        rotate_tensor(module, part.weight, part.axis, site.block, site.seed)


def rotate_tensor(module: nn.Module, fqn: str, axis: int, size: int, seed: int) -> None:
    """Replace a stored tensor by itself rotated along an axis in blocks of `size`, in f64 and in parts."""
    old = graph.get_tensor(module, fqn)
    new = torch.empty_like(old, memory_format=torch.contiguous_format, requires_grad=False)
    with torch.no_grad():
        source, target = old.detach().movedim(axis, -1), new.movedim(axis, -1)
        for rows in edits.parts(source) if source.dim() > 1 else [slice(None)]:
            target[rows] = rotation.rotate(source[rows].to(torch.float64), size, seed).to(old.dtype)
    edits.put(module, fqn, new)
