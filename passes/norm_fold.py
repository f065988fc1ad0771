"""Fold a norm's weight and bias into the linears that read it. Exact where linears alone read it.

    W <- W diag(gamma)      b <- b + W beta      gamma <- 1      beta <- 0

Where a linear has no bias to take W beta, the norm keeps beta / gamma. Post-norm models are refused: there the norm
also feeds the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.errors import Note
from qfx.passes import _edits as edits
from qfx.passes import _sites as sites
from qfx.passes._sites import Norm, Record, Weight

_LEAST = 1e-3  # of |gamma| / max|gamma|, where beta / gamma must be kept


@dataclass(frozen=True)
class Site(Record):
    """A norm and all linears that read it; biases says that every linear takes its part of the norm's bias."""

    NAME: ClassVar[str] = "norm-fold"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"norm": Norm.of, "linears": Weight.of}

    norm: Norm
    linears: tuple[Weight, ...]
    biases: bool


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every norm that only linears read, in graph order, and the other norms with the reason."""
    found, refusals = [], []
    for node in gm.graph.nodes:
        norm = sites.norm_of(node)
        if norm is None:
            continue
        site = norm if isinstance(norm, str) else _site(gm, node, norm)
        if isinstance(site, Site):
            found.append(site)
        else:
            refusals.append(sites.note(node, f"its norm cannot be folded: {site}"))
    return found, refusals


def _site(gm: fx.GraphModule, node: fx.Node, norm: Norm) -> Site | str:
    linears, others = sites.readers(node)
    if others or not linears:
        return f"%{others[0].name} reads it, not only linears" if others else "no linear reads it"
    weights = [sites.weight_of(linear) for linear in linears]
    stored = [w for w in weights if isinstance(w, Weight)]
    if len(stored) < len(weights):
        return next(w for w in weights if isinstance(w, str))
    biases = all(w.bias is not None for w in stored)
    if norm.bias is not None and not biases:
        gamma = _gamma(gm, norm).abs()
        if float(gamma.min()) < _LEAST * float(gamma.max()):
            return "a linear has no bias to take the norm's, and the norm's weight is nearly 0 in places"
    return Site(norm, tuple(stored), biases)


def apply(module: nn.Module, site: Site) -> None:
    """Fold the norm, in a graph or a live model. The fold is computed in f64."""
    gamma = _gamma(module, site.norm)
    beta = None if site.norm.bias is None else graph.get_tensor(module, site.norm.bias).detach().to(torch.float64)
    for linear in site.linears:
        if beta is not None and site.biases:
            assert linear.bias is not None
            weight = graph.get_tensor(module, linear.weight).detach().movedim(linear.inp, -1)
            moved = torch.cat([weight[rows].to(torch.float64) @ beta for rows in edits.parts(weight)])
            edits.edit(module, linear.bias, moved.add)
        edits.scale(module, linear.weight, gamma, linear.inp)
    if site.norm.bias is not None:
        edits.edit(module, site.norm.bias, lambda old: torch.zeros_like(old) if site.biases else old / gamma)
    one = 0.0 if site.norm.plus_one else 1.0
    edits.edit(module, site.norm.weight, lambda old: torch.full_like(old, one))


def _gamma(module: nn.Module, norm: Norm) -> Tensor:
    weight = graph.get_tensor(module, norm.weight).detach().to(torch.float64)
    return weight + 1.0 if norm.plus_one else weight
