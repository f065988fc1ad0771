"""Scale the keys' channels down and the queries' up, each frequency pair of RoPE by one factor. Exact.

    k = x W_k^T + b_k      W_k, b_k <- / s      on the rows of each KV head
    q = x W_q^T + b_q      W_q, b_q <- * s      on the rows of every query head that reads it: q k^T stays

RoPE turns channels i and i + d/2 (neighbours 2i and 2i + 1 where it is interleaved) into each other, so both have one
factor; channels that it leaves (partial RoPE, none at all) are free. With norms of queries and keys (Qwen3, Gemma 3,
OLMo 2) the factors go into the weights of the norms instead: one vector for all heads where these share one.

    s = max|K|^a / max|Q|^(1 - a)       SmoothQuant's formula (Xiao et al. 2023)
    s = max|K|^a                        SmoothAttention (QServe, Lin et al. 2024), which the search tries as well

The maxima are those after RoPE, over all tokens and the channels that share the factor. A few key channels are far
larger than the others (KVQuant, Hooper et al. 2024), and what is rounded token by token has its step from them. Keys
whose scales are per channel gain nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.calibration.observers import Observer
from qfx.calibration.padding import Attended
from qfx.calibration.sample import Sample
from qfx.errors import Note
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.passes import _edits as edits
from qfx.passes import _sites as sites
from qfx.passes._pairs import Factors, Part, factors_of
from qfx.passes._sites import Norm, Record

EXPONENTS: tuple[tuple[float, float], ...] = (  # of max|K| and max|Q| that the search tries
    *((step / 10, 1 - step / 10) for step in range(11)),
    *((step / 10, 0.0) for step in range(1, 10)),
)
FORMAT = "u4/tok/f16"  # what the search judges by where nothing says how keys are stored
_LEAST, _GREATEST = 1e-4, 1e4  # of a factor


@dataclass(frozen=True)
class Site(Record):
    """One attention with `factors` free factors: keys are divided by them, queries multiplied."""

    NAME: ClassVar[str] = "smooth-k"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor",)
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"keys": Part.of, "queries": Part.of}

    attention: str
    keys: tuple[Part, ...]
    queries: tuple[Part, ...]
    factors: int


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every attention whose keys and queries come from linears or norms by RoPE at most, and the others."""
    found = list(_search(gm))
    return [one[1] for one in found if not isinstance(one, Note)], [one for one in found if isinstance(one, Note)]


def _search(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site, Factors] | Note]:
    nodes = [node for node in gm.graph.nodes if graph.schema_name(node) in sites.ATTENTION]
    times = Counter(map(graph.fqn_of, nodes))
    for node in nodes:
        name = graph.fqn_of(node)
        found = factors_of(node) if times[name] == 1 else f"{times[name]} attentions are called {name}"
        if isinstance(found, Factors):
            yield node, Site(name, found.keys, found.queries, found.count), found
        else:
            yield sites.note(node, f"its keys cannot be scaled: {found}")


def apply(module: nn.Module, site: Site, factor: Tensor) -> None:
    """Divide the keys by `factor` [factors] and multiply the queries by it, in a graph or a live model."""
    edits.check_factor(factor, site.factors, site.attention)
    wide = factor.to(torch.float64)
    for parts, change in ((site.keys, 1.0 / wide), (site.queries, wide)):
        for part in parts:
            vector = part.spread(change, graph.get_tensor(module, part.weight).shape[part.axis])
            if part.plus_one:
                edits.scale_norm(module, Norm(part.weight, part.bias, True), vector)
                continue
            edits.scale(module, part.weight, vector, part.axis)
            if part.bias is not None:
                edits.scale(module, part.bias, vector, 0)


def roles(node: fx.Node) -> tuple[str, ...]:
    """For `insert_observers`: queries and keys of every attention."""
    return ("q", "k") if graph.schema_name(node) in sites.ATTENTION else ()


def watch(node: fx.Node, role: str) -> Observer | None:
    """For `insert_observers`: sample queries and keys."""
    return Heads() if role in roles(node) else None


class Heads(Sample):
    """A sample of [B, heads, tokens, D] as rows of all heads side by side, [heads * D]."""

    def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
        super().update(x.transpose(1, 2).flatten(2), batch, kept)


def smooth(
    gm: fx.GraphModule,
    stats: Mapping[tuple[str, str], Observer],
    *,
    alpha: float | Literal["search"] = 0.5,
    observer: str = "minmax",
    percentile: float = 99.99,
    formats: Callable[[fx.Node], Format | None] = lambda node: None,
) -> tuple[list[tuple[Site, Tensor]], list[Note]]:
    """Choose the factors of every attention. Nothing is changed; see `apply`.

    stats: (FQN of the attention, "q" or "k") -> what `watch` saw. alpha: the exponent, or "search": of EXPONENTS and of
    no scaling what has the least error of q k^T on the sampled tokens, keys rounded token by token. observer:
    "percentile" takes the percentile of the sample for the maxima. formats: how an attention's keys are stored, None
    where nothing is said. Returns pairs of site and f32 factor [factors], and notes about what cannot be scaled.
    """
    chosen: list[tuple[Site, Tensor]] = []
    notes: list[Note] = []
    for one in _search(gm):
        if isinstance(one, Note):
            notes.append(one)
            continue
        node, site, found = one
        q, k = (stats.get((site.attention, role)) for role in "qk")
        if not (isinstance(q, Heads) and isinstance(k, Heads) and q.seen and k.seen):
            continue
        fmt = formats(node)
        if fmt is not None and fmt.group:
            reason = f"its keys are stored as {fmt}, with scales for each channel: scaling the channels changes nothing"
            notes.append(sites.note(node, reason, "leave 'smooth-k' out, or store keys token by token (u4/tok)"))
            continue
        keys = _Keys(found, fmt or Format.parse(FORMAT), percentile if observer == "percentile" else None)
        exponents = keys.search(q, k) if alpha == "search" else (alpha, 1 - alpha)
        factor = None if exponents is None else keys.factor(keys.peaks(q), keys.peaks(k), *exponents)
        if factor is not None and bool((factor != 1).any()):
            chosen.append((site, factor))
    return chosen, notes


@dataclass(frozen=True, eq=False)
class _Keys:
    """One attention as the choice sees it. percentile: of the sample, None for the greatest of all the data."""

    found: Factors
    fmt: Format
    percentile: float | None

    def peaks(self, seen: Heads) -> Tensor:
        """f32 [channels]: the greatest magnitude of each channel of queries or keys."""
        if self.percentile is None:
            return seen.absmax()
        return seen.sample().abs().quantile(self.percentile / 100, 0)

    def factor(self, q: Tensor, k: Tensor, a: float, b: float) -> Tensor:
        """f32 [factors]: max|K|^a / max|Q|^b over the channels that share a factor; 1 where either is never seen."""
        heads, width = self.found.of_keys.shape
        of_queries = self.found.of_keys.repeat_interleave(q.numel() // (heads * width), 0)
        q, k = self._most(q, of_queries), self._most(k, self.found.of_keys)
        alive = (q > 0) & (k > 0)
        raw = torch.where(alive, k, 1.0).pow(a) / torch.where(alive, q, 1.0).pow(b)
        return torch.where(alive, raw.clamp(_LEAST, _GREATEST), 1.0).to(torch.float32)

    def _most(self, values: Tensor, at: Tensor) -> Tensor:
        most = torch.zeros(self.found.count, dtype=torch.float64, device=values.device)
        return most.scatter_reduce(0, at.flatten().to(values.device), values.to(torch.float64), "amax")

    def search(self, q: Heads, k: Heads) -> tuple[float, float] | None:
        """The exponents with the least error, or None where no scaling is best.

        Each half of the data is judged with the maxima of the other half.
        """
        folds = [(*of_q, *of_k) for of_q, of_k in zip(q.folds(), k.folds(), strict=True)]
        tried: list[tuple[float, float] | None] = [None, *EXPONENTS]
        errors = []
        for exponents in tried:
            total = 0.0
            for q_rows, q_low, q_high, k_rows, k_low, k_high in folds:
                most = [torch.maximum(low.abs(), high.abs()) for low, high in ((q_low, q_high), (k_low, k_high))]
                factor = torch.ones(self.found.count)
                if exponents is not None:
                    factor = self.factor(most[0], most[1], *exponents)
                total += self.error(q_rows, k_rows, factor)
            errors.append(total)
        return tried[min(range(len(tried)), key=errors.__getitem__)]

    def error(self, q: Tensor, k: Tensor, factor: Tensor) -> float:
        """Squared error of q k^T when the keys, divided by `factor`, are rounded; summed over heads, queries and keys.

        q f32 [R, H * D], k f32 [T, G * D]: rows of all heads. What is the same for all keys of a query is left out, as
        the softmax does.
        """
        heads, width = self.found.of_keys.shape
        per_head = factor[self.found.of_keys].to(k)
        scaled = k.reshape(-1, heads, width) / per_head
        lost = (fake_quantize(scaled, self.fmt, activation=True) - scaled) * per_head
        queries = q.reshape(len(q), heads, -1, width)
        errors = torch.einsum("rhgd,thd->hgrt", queries, lost)
        return float((errors - errors.mean(-1, keepdim=True)).square().sum())
