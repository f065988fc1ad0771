"""Rotate the values of each head, undone in the output projection (R2 of SpinQuant). See `v_o`, whose sites it takes.

    W_v,h <- Q^T W_v,h      b_v,h <- Q^T b_v,h      W_o's columns of every query head that reads KV head h  <-  (..) Q

The matrix is that of one head, so that heads stay apart. The graph's text stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from qfx.errors import Note
from qfx.passes import v_o
from qfx.rewrites import rotation


@dataclass(frozen=True)
class Site(v_o.Site):
    """One attention (see `v_o.Site`), rotated in blocks of `block` channels of a head by the matrix of `seed`."""

    NAME: ClassVar[str] = "rotate-heads"
    TENSORS: ClassVar[tuple[str, ...]] = ()

    block: int = 0
    seed: int = 0


def find(gm: fx.GraphModule, *, seed: int = 0, block: int | None = None) -> tuple[list[Site], list[Note]]:
    """Every attention of `v_o.find`. block: taken where it divides a head; None is the whole head."""
    found, refusals = v_o.find(gm)
    return [_rotated(site, seed, block) for site in found], refusals


def _rotated(site: v_o.Site, seed: int, block: int | None) -> Site:
    size = block if block and site.head_dim % block == 0 else site.head_dim
    return Site(site.v, site.o, site.starts, site.heads, site.head_dim, size, seed)


def apply(module: nn.Module, site: Site) -> None:
    """Rotate values and output projection in f64, in a graph or a live model."""
    one = rotation.rotate(torch.eye(site.head_dim, dtype=torch.float64), site.block, site.seed).mT
    v_o.apply(module, site, one.expand(len(site.starts), *one.shape))
