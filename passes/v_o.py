"""Scale or transform each value head, undone in the output projection. Exact for any invertible matrix per KV head.

    v = x W_v^T + b_v      W_v,h <- M_h W_v,h      b_v,h <- M_h b_v,h
    o = z W_o^T            W_o's columns of *every* query head that reads KV head h  <-  (columns) M_h^-1

Attention mixes tokens, never the channels of a head, so M_h passes through it. A factor [kv_heads, head_dim] divides
the values (M = diag(1 / factor)): SmoothQuant for the output projection without a division at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.calibration.sample import Sample
from qfx.errors import Note
from qfx.passes import _channels as channels
from qfx.passes import _edits as edits
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._sites import Record, Weight
from qfx.passes.smooth import Chooser, choose


@dataclass(frozen=True)
class Site(Record):
    """One attention.

    v, o: value and output projection. starts: first row of each KV head in the (maybe fused) value projection. heads:
    the KV head that each query head reads. head_dim: channels per head.
    """

    NAME: ClassVar[str] = "v-o"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor",)
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"v": Weight.of, "o": Weight.of}

    v: Weight
    o: Weight
    starts: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: int


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every attention whose values come from one linear and whose result goes into one, and the others."""
    found, refusals = [], []
    for node in gm.graph.nodes:
        if graph.schema_name(node) in sites.ATTENTION:
            site = _site(node)
            if isinstance(site, Site):
                found.append(site)
            else:
                refusals.append(sites.note(node, f"its value heads cannot be scaled: {site}"))
    return found, refusals


def _site(node: fx.Node) -> Site | str:
    value = node.args[2]
    v = channels.source(value)
    if graph.schema_name(v) != "aten::linear" or not isinstance(value, fx.Node):
        return "the values do not come straight from a linear"
    o = _output(node)
    if isinstance(o, str):
        return o
    v_weight, o_weight = sites.weight_of(v), sites.weight_of(o)
    if isinstance(v_weight, str) or isinstance(o_weight, str):
        return v_weight if isinstance(v_weight, str) else str(o_weight)
    rows = _rows(v, value, node)
    if isinstance(rows, str):
        return rows
    query_heads, head_dim = (channels.known(size) for size in m.shape(node)[-3::2])
    starts = [row[0] for row in rows]
    if any(row != list(range(row[0], row[0] + head_dim)) for row in rows) or query_heads % len(rows):
        return "the channels of a head do not lie together"
    unique = list(dict.fromkeys(starts))
    heads = [unique.index(starts[h * len(rows) // query_heads]) for h in range(query_heads)]
    return Site(v_weight, o_weight, tuple(unique), tuple(heads), head_dim)


def _output(node: fx.Node) -> fx.Node | str:
    """The one linear that reads the heads of an attention, side by side in their order."""
    numbers = channels.numbered(node, (-3, -1))
    if numbers is None or numbers.dim() != 4:
        return "the number of heads is not fixed"
    reader = channels.one_linear(node, numbers)
    if reader is None:
        return "its result is not read by one linear alone"
    linear, columns = reader
    if columns != list(range(numbers.shape[-3] * numbers.shape[-1])):
        return "the output projection does not read the heads side by side"
    return linear


def _rows(v: fx.Node, value: fx.Node, attention: fx.Node) -> list[list[int]] | str:
    """For each head of the values its rows of the value projection; a reason where others read them, too."""
    numbers = channels.numbered(v, (-1,))
    if numbers is None:
        return "the sizes of the values are not known"
    found, ends = channels.flow(v, numbers)
    per_head = channels.along(found.get(value), -3, -1)
    if per_head is None:
        return "the channels of the values cannot be followed"
    head_dim = found[value].shape[-1]
    used = set(per_head)
    for user, at in ends:
        is_value = user is attention and at is value and at not in (*user.args[:2], *user.args[3:])
        if not is_value and used & channels.numbers_in(found[at]):
            return f"%{user.name} reads the values, too"
    return [per_head[i : i + head_dim] for i in range(0, len(per_head), head_dim)]


def apply(module: nn.Module, site: Site, factor: Tensor) -> None:
    """Transform the values of each KV head, in a graph or a live model.

    factor [kv_heads, head_dim] divides them; [kv_heads, head_dim, head_dim] holds the matrices M with v <- M v.
    """
    count, size = len(site.starts), site.head_dim
    if factor.shape not in ((count, size), (count, size, size)) or not bool(torch.isfinite(factor).all()):
        raise ValueError(f"expected factors {[count, size]} or {[count, size, size]}, found {list(factor.shape)}")
    wide = factor.to(torch.float64)
    matrices = torch.diag_embed(1.0 / wide) if factor.dim() == 2 else wide
    inverse = torch.diag_embed(wide) if factor.dim() == 2 else torch.linalg.inv(wide)

    def rows(old: Tensor) -> Tensor:
        new = old.movedim(site.v.out, 0).clone() if old.dim() > 1 else old.clone()
        for start, matrix in zip(site.starts, matrices.to(old.device), strict=True):
            part = new[start : start + size]
            new[start : start + size] = (matrix @ part.reshape(size, -1)).reshape(part.shape)
        return new.movedim(0, site.v.out) if old.dim() > 1 else new

    def columns(old: Tensor) -> Tensor:
        new = old.movedim(site.o.inp, -1).clone()
        for query, head in enumerate(site.heads):
            part = slice(query * size, (query + 1) * size)
            new[..., part] = new[..., part] @ inverse[head].to(old.device)
        return new.movedim(-1, site.o.inp)

    edits.edit(module, site.v.weight, rows)
    if site.v.bias is not None:
        edits.edit(module, site.v.bias, rows)
    edits.edit(module, site.o.weight, columns)


def smooth(
    gm: fx.GraphModule, stats: Mapping[str, Sample], *, skip: Iterable[str] = (), chooser: Chooser = choose
) -> tuple[list[tuple[Site, Tensor]], list[Note]]:
    """SmoothQuant's factors [kv_heads, head_dim] for the inputs of output projections; arguments as for `smooth`."""
    found, refusals = find(gm)
    chosen: list[tuple[Site, Tensor]] = []
    left = set(skip)
    for site in found:
        if site.o.name in stats and site.o.name not in left and stats[site.o.name].seen:
            factor = chooser(gm, (site.o,), [stats[site.o.name]], tie=functools.partial(_tied, site))
            if factor is not None:
                first = [site.heads.index(head) for head in range(len(site.starts))]
                chosen.append((site, factor.reshape(len(site.heads), site.head_dim)[first]))
    return chosen, refusals


def _tied(site: Site, x: Tensor) -> Tensor:
    """The greatest value over the query heads of each KV head, put back on every query head."""
    per_head = x.reshape(len(site.heads), site.head_dim)
    index = torch.tensor(site.heads, device=x.device).unsqueeze(1).expand_as(per_head)
    kept = per_head.new_zeros(len(site.starts), site.head_dim).scatter_reduce(0, index, per_head, "amax")
    return kept[list(site.heads)].reshape(-1)
