"""Where attention lies, from the queries and keys of a run: fused attention hides its probabilities, so that they are
computed again. Sums over batches, of which `Patterns.heads` makes shares and types (see `qfx.analysis.head_types`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx.analysis.attentions import Attention
from qfx.analysis.head_types import Head, type_of
from qfx.passes import _match as m
from qfx.rounding.lanes import Env, Program

_DEVIATIONS = 4.0  # standard deviations above the mean that make a score an outlier


def logits_of(given: Mapping[str, Any]) -> Tensor:
    """Scores before the softmax, f32 [B, H, S, T], -inf where masked, from the arguments of an attention by name."""
    q, k = (given.get(name, given.get(long)) for name, long in (("q", "query"), ("k", "key")))
    assert isinstance(q, Tensor) and isinstance(k, Tensor), list(given)
    if k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = given.get("scale")
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap := given.get("softcap"):
        scores = torch.tanh(scores / softcap) * softcap
    mask = given.get("mask", given.get("attn_mask"))
    if given.get("causal", given.get("is_causal")):
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if isinstance(mask, Tensor):
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    masked: Tensor = scores.masked_fill(scores < torch.finfo(torch.float32).min / 4, -torch.inf)
    return masked


def probabilities(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Attention [B, H, S, T] of scores; rows that see nothing are 0. sinks [H]: scores that take part, and drop out."""
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    found = scores.softmax(-1).nan_to_num(0.0)
    return found if sinks is None else found[..., :-1]


@dataclass
class _Sums:
    """Sums over positions, f64 [H, ..], of one attention."""

    rows: int = 0
    by_offset: Tensor | None = None  # [H, 2 T - 1] sums of attention, key less query + T - 1, without the first token
    count: Tensor | None = None  # [2 T - 1] of how many
    square: Any = 0.0
    sink: Any = 0.0
    largest: Tensor | None = None
    above: Any = 0.0
    seen: int = 0
    square_keys: bool = True
    same: dict[str, Any] = field(default_factory=dict)


class Patterns:
    """Collects what heads attend to; `watch` is for `qfx.analysis.gradients.gather`."""

    def __init__(self, attentions: Sequence[Attention]) -> None:
        self.attentions = {a.node: a for a in attentions}
        self._sums: dict[fx.Node, _Sums] = {}

    def watch(self, node: fx.Node, given: Mapping[str, Any]) -> None:
        """One attention on one batch, its arguments by name."""
        if node not in self.attentions:
            return
        sums = self._sums.setdefault(node, _Sums())
        scores = logits_of(given)
        self._outliers(sums, scores)
        if scores.shape[-1] != scores.shape[-2]:
            sums.square_keys = False
            return
        _offsets(sums, probabilities(scores, given.get("sinks")))

    def _outliers(self, sums: _Sums, scores: Tensor) -> None:
        kept = torch.isfinite(scores)
        values = scores[kept]
        if values.numel():
            limit = values.mean() + _DEVIATIONS * values.std(correction=0)
            sums.above = sums.above + (kept & (scores > limit)).sum((0, 2, 3)).double()
            sums.seen += values.numel() // scores.shape[1]

    @property
    def seen(self) -> bool:
        """Was there any attention?"""
        return bool(self._sums)

    def repeated(self, program: Program, batch: Sequence[Any]) -> bool:
        """Run random tokens that stand twice in the place of `input_ids` [B, T]. False where there is no such input."""
        ids = next((i for i, n in enumerate(program.inputs) if n.meta.get("qfx_name", n.name) == "input_ids"), None)
        if ids is None or not isinstance(batch[ids], Tensor) or batch[ids].dim() != 2 or batch[ids].shape[1] < 8:
            return False
        random = torch.Generator().manual_seed(0)
        highest = max(8, int(batch[ids].max()) + 1)
        half = torch.randint(0, highest, (len(batch[ids]), batch[ids].shape[1] // 2), generator=random)
        twice = torch.cat([half, half, half[:, : batch[ids].shape[1] % 2]], 1).to(batch[ids].device)
        env: Env = dict(zip(program.inputs, batch, strict=True))
        env[program.inputs[ids]] = twice
        for at, node in enumerate(program.nodes):
            if node in self.attentions:
                self._same_tokens(node, arguments(program, node, env), half.shape[1])
            env[node] = program.step(node, env, {}, rounded=False)
            for read in (node, *node.all_input_nodes):
                if read in env and program.last_use[read] <= at:
                    del env[read]
        return True

    def _same_tokens(self, node: fx.Node, given: Mapping[str, Any], period: int) -> None:
        sums, scores = self._sums.setdefault(node, _Sums()), logits_of(given)
        if scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < 2 * period:
            return
        p = probabilities(scores, given.get("sinks"))
        for name, offset in (("induction", 1 - period), ("duplicate", -period)):
            sums.same[name] = p.diagonal(offset, -2, -1)[..., 1:].mean((0, 2))  # the first one is the first token

    def outliers(self) -> dict[tuple[str, int], float]:
        """(attention, query head) -> share of its scores that are outliers."""
        return {
            (self.attentions[node].name, head): float(value) / sums.seen
            for node, sums in self._sums.items()
            if sums.seen
            for head, value in enumerate(sums.above)
        }

    def heads(self, layer_of: Mapping[str, str]) -> list[Head]:
        """Every head of the attentions that were seen. layer_of: attention -> layer."""
        outliers = self.outliers()
        found = []
        for node, attention in self.attentions.items():
            for head in range(attention.heads):
                facts = _facts(self._sums[node], head) if node in self._sums else {}
                facts["outliers"] = outliers.get((attention.name, head))
                layer = layer_of.get(attention.name, "")
                kind = type_of(facts, cross=node in self._sums and not self._sums[node].square_keys)
                found.append(Head(attention.name, layer, head, attention.groups[head], kind, **facts))
        return found


def arguments(program: Program, node: fx.Node, env: Env) -> dict[str, Any]:
    """The values of an attention's arguments by name."""
    return {name: program.look(a, env) if isinstance(a, fx.Node) else a for name, a in m.arguments(node).items()}


def _offsets(sums: _Sums, p: Tensor) -> None:
    """Add the attention [B, H, T, T] of a batch by offset, key less query."""
    size = p.shape[-1]
    sums.sink = sums.sink + p[:, :, 1:, 0].sum((0, 2)).double()
    sums.rows += len(p) * (size - 1)
    rest = p.clone()
    rest[..., 0] = 0
    shift = torch.arange(size, device=p.device)
    at = (shift[None, :] - shift[:, None] + size - 1).reshape(-1)
    seen = torch.ones(size, size, device=p.device, dtype=torch.float64)
    seen[:, 0] = 0
    if not bool((p.triu(1) > 0).any()):  # causal: what cannot be seen does not count
        seen = seen.tril()
    found = p.new_zeros(p.shape[1], 2 * size - 1, dtype=torch.float64)
    found.index_add_(1, at, rest.sum(0).double().flatten(1))
    count = found.new_zeros(2 * size - 1).index_add_(0, at, seen.reshape(-1)) * len(p)
    best = p[:, :, 1:].argmax(-1) - shift[1:] + size - 1  # the first query has but one key, or none before it
    largest = torch.stack([best[:, h].flatten().bincount(minlength=2 * size - 1) for h in range(p.shape[1])]).double()
    sums.square = sums.square + rest.double().square().sum((0, 2, 3))
    sums.by_offset, sums.count = _wider(sums.by_offset, found), _wider(sums.count, count)
    sums.largest = _wider(sums.largest, largest)


def _wider(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum of two tensors by offset, which lie around the middle of the last axis."""
    if total is None:
        return part
    missing = (total.shape[-1] - part.shape[-1]) // 2
    pad = torch.nn.functional.pad
    return total + pad(part, (missing, missing)) if missing >= 0 else pad(total, (-missing, -missing)) + part


def _facts(sums: _Sums, head: int) -> dict[str, Any]:
    facts: dict[str, Any] = {name: float(value[head]) for name, value in sums.same.items()}
    if sums.by_offset is None or sums.count is None or sums.largest is None:
        return facts
    total, count, middle = sums.by_offset[head], sums.count, sums.by_offset.shape[-1] // 2
    known = count > 0
    mean = total.sum() / count.sum()
    between = (total[known].square() / count[known]).sum() - count.sum() * mean**2
    whole = sums.square[head] - count.sum() * mean**2
    at = int(sums.largest[head].argmax())
    return facts | {
        "sink": float(sums.sink[head]) / sums.rows,
        "largest": float(sums.largest[head, at] / sums.largest[head].sum()),
        "offset": at - middle,
        "explained": float((between / whole).clamp(0, 1)) if whole > 1e-12 else 0.0,
        "previous": float(total[middle - 1] / count[middle - 1].clamp_min(1)),
    }
