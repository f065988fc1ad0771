"""Predicted time of a plan on a device: each call takes as long as its bytes or its products do, whichever is longer.

    time of a call = max(bytes moved / bandwidth, operations / rate of its kernel) + overhead    (Williams et al. 2009)

prefill reads a prompt of `sequence` tokens into an empty cache; decode adds one token to a cache of `context`. Weights
and cache are read at the bandwidth of all of them together, activations at that of the call's own. Everything said here
is a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qfx.allocation.costs import Asked, CacheFormats, Costs, role_formats
from qfx.allocation.devices import Device
from qfx.allocation.nodes import NodeCost
from qfx.allocation.sizes import numbers
from qfx.annotation import Formats, each
from qfx.format import Format
from qfx.live.segments import along, segments

GAIN = 1.05  # a plan that is this much faster is called faster; one that is as much slower, slower
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 1024, 8192)

_PRODUCTS = ("linear", "experts", "conv", "matmul")


@dataclass(frozen=True)
class Phase:
    """One call. seconds, and the parts of it in calls that are bound by "memory", by "compute" and by "overhead";
    moved: bytes; macs: multiply-accumulates."""

    seconds: float
    parts: Mapping[str, float]
    moved: int
    macs: int

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Prediction:
    """Predicted for a device. decode: of one token of each sequence; None for a model without a cache.

    weights, cache, memory: bytes; memory is what a device must have for both. fits: the device has it. notes: what was
    taken in place of what is not known.
    """

    device: str
    prefill: Phase
    decode: Phase | None
    weights: int
    cache: int
    memory: int
    fits: bool
    notes: tuple[str, ...] = ()


class Roofline:
    """The times of one plan on one device, at any sizes. formats: as for `Costs.weights`, roles "x" and "w" count."""

    def __init__(self, costs: Costs, formats: Asked | None, device: Device, cache: CacheFormats = None) -> None:
        self.costs, self.formats, self.device, self.cache = costs, dict(formats or {}), device, cache
        self.rest = Format(device.dtype)
        self._moved = costs.moved(self.formats, cache, rest=self.rest, held=device.held)
        self._kernels = self._shares()

    def phase(self, *, batch: int = 1, sequence: int = 1, context: int = 0, **sizes: int) -> Phase:
        """One call of `sequence` new tokens behind `context` cached ones."""
        given = {"batch": batch, "sequence": sequence, "context": context, **sizes}
        weights, activations, caches = (numbers([one[i] for one in self._moved], given) for i in range(3))
        macs, rows = (numbers([getattr(n, name) for n in self.costs.nodes], given) for name in ("macs", "rows"))
        stream = self.device.speed(sum(weights) + sum(caches))
        parts = dict.fromkeys(("memory", "compute", "overhead"), 0.0)
        for i, node in enumerate(self.costs.nodes):
            if node.kind == "view":
                continue
            moving = (weights[i] + caches[i]) / stream + activations[i] / self.device.speed(activations[i] or 1)
            count = rows[i] if node.weight else batch * sequence
            working = sum(2 * macs[i] * share / self.device.rate(kernel, count) for kernel, share in self._kernels[i])
            parts["memory" if moving >= working else "compute"] += max(moving, working)
            parts["overhead"] += self.device.overhead * max(1, len(self._kernels[i]))
        moved = round(sum(weights) + sum(activations) + sum(caches))
        return Phase(sum(parts.values()), parts, moved, round(sum(macs)))

    def prediction(
        self, *, batch: int = 1, sequence: int = 128, context: int | None = None, **sizes: int
    ) -> Prediction:
        """Both phases. context: cached tokens when one more is decoded; left out: `sequence`."""
        context = sequence if context is None else context
        prefill = self.phase(batch=batch, sequence=sequence, **sizes)
        has_cache = bool(self.costs.caches)
        decode = self.phase(batch=batch, sequence=1, context=context, **sizes) if has_cache else None
        given = {"batch": batch, "sequence": 1, "context": context, **sizes}
        cache = round(numbers([self.costs.cache(self.cache)], given)[0]) if has_cache else 0
        calls: list[dict[str, Any]] = [{**given, "sequence": sequence, "context": 0}, *([given] if has_cache else [])]
        memory = max(self.costs.memory(self.formats, self.cache, rest=self.rest, **call) for call in calls)
        weights = self.costs.weights(self.formats, rest=self.rest)
        fits = memory <= self.device.memory
        return Prediction(self.device.name, prefill, decode, weights, cache, memory, fits, self._notes())

    def _shares(self) -> list[list[tuple[str, float]]]:
        """For each node its kernels, and the share of the products that each computes."""
        found: list[list[tuple[str, float]]] = []
        for node in self.costs.nodes:
            roles = self._roles(node)
            x = roles.get("x")
            assert x is None or isinstance(x, Format), node
            if roles:
                shares = _shares(roles.get("w"), self.costs.stored[node.weight].shape, node.name)
                found.append([(self.device.kernel(fmt, x), share) for fmt, share in shares])
            else:
                own = node.kind if node.kind in self.device.rates else self.device.dtype
                found.append([(own, 1.0)])
        return found

    def _roles(self, node: NodeCost) -> dict[str, Formats]:
        """Formats of a product; where its weight is tied and has a format by another name, that one."""
        if node.kind not in _PRODUCTS or not node.weight:
            return {}
        names = (node.name, *self.costs.stored[node.weight].names)
        return next((role_formats(self.formats[name]) for name in names if name in self.formats), {})

    def _notes(self) -> tuple[str, ...]:
        """Kernels of which the device tells no rate."""
        unknown = set()
        for node in self.costs.nodes:
            roles = self._roles(node)
            x = roles.get("x")
            for w in each(roles["w"]) if "w" in roles else ():
                if not w.is_plain and self.device.kernel(w, x if isinstance(x, Format) else None) == self.device.dtype:
                    unknown.add(f"w={w} x={x}" if x is not None else f"w={w}")
        taken = f"{self.device.name} tells no rate for it, products count at that of {self.device.dtype}"
        return tuple(f"{text}: {taken}" for text in sorted(unknown))


def predict(
    costs: Costs, formats: Asked | None, device: Device, *, batch: int = 1, sequence: int = 128,
    context: int | None = None, cache: CacheFormats = None, **sizes: int,
) -> Prediction:  # fmt: skip
    """Time of a prompt of `sequence` tokens and of each token behind `context` cached ones (left out: the prompt)."""
    return Roofline(costs, formats, device, cache).prediction(batch=batch, sequence=sequence, context=context, **sizes)


@dataclass(frozen=True)
class Point:
    """How many times faster a plan is than what it is compared with, predicted, at one batch and context."""

    phase: str
    batch: int
    context: int
    ratio: float
    bound: str

    @property
    def verdict(self) -> str:
        """faster, slower, or neither: then the plan is only smaller."""
        return "faster" if self.ratio >= GAIN else "slower" if self.ratio <= 1 / GAIN else "only smaller"


def crossover(
    costs: Costs, formats: Asked | None, device: Device, *, cache: CacheFormats = None,
    batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS, **sizes: int,
) -> list[Point]:  # fmt: skip
    """Where a plan is faster than the floats, phase by phase.

    decode at each batch and context; prefill at each batch, with a prompt as long as the context.
    """
    mine, other = Roofline(costs, formats, device, cache), Roofline(costs, None, device, None)
    found = []
    for name in ("prefill", "decode") if costs.caches else ("prefill",):
        for context in contexts:
            for batch in batches:
                new, old = (1, context) if name == "decode" else (context, 0)
                now, before = (r.phase(batch=batch, sequence=new, context=old, **sizes) for r in (mine, other))
                found.append(Point(name, batch, context, before.seconds / now.seconds, now.bound))
    return found


def sentences(points: Sequence[Point]) -> list[str]:
    """What `crossover` found, a line for each phase and context."""
    lines = []
    for (phase, context), row in groupby(points, lambda p: (p.phase, p.context)):
        runs = [(verdict, list(run)) for verdict, run in groupby(row, lambda p: p.verdict)]
        where = f"{phase}, {'prompt' if phase == 'prefill' else 'context'} {context}"
        lines.append(f"{where}: {'; '.join(f'{verdict} at {_span(run)}' for verdict, run in runs)} (predicted)")
    return lines


def _span(run: Sequence[Point]) -> str:
    """`batch 1 to 16 (2.10x to 3.50x)`."""
    batches = f"{run[0].batch}" if len(run) == 1 else f"{run[0].batch} to {run[-1].batch}"
    low, high = (f"{value:.2f}x" for value in (min(p.ratio for p in run), max(p.ratio for p in run)))
    return f"batch {batches} ({low if low == high else f'{low} to {high}'})"


def _shares(formats: Formats | None, shape: tuple[int, ...], name: str) -> list[tuple[Format | None, float]]:
    if formats is None or isinstance(formats, Format):
        return [(formats, 1.0)]
    parts = segments(formats, shape, name)
    whole = shape[along(formats)]
    return [(part.format, part.size / whole) for part in parts]
