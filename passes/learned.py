"""Learned rounding: the weights of a block are rounded so that the block's results stay what they were in float.

    %linear: f32[2,4] = aten.linear(%x, @layers.0.fc.weight)  # w=u4/g128
    ->                       the same graph; the plan holds layers.0.fc/codes, /scale, /zero (see
    `qfx.rounding.rounded`)

Every step rounds all weights of the block with their present offsets and shares of the extremes
(`qfx.rounding.offsets`), runs some batches, and moves the parameters against their gradients; the loss is the squared
error of the block's results, the inputs are what the blocks rounded before give (Cheng et al. 2023, SignRound /
AutoRound). The rate falls linearly to 0. Batches come in an order drawn by the seed. Scales begin where
`qfx.rounding.scales.search` finds them.

    python -m pytest -m slow -s tests/qfx/test_accuracy.py -k learned      beside GPTQ, and Adam beside signs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qfx.errors import Note, explain
from qfx.packing import Packed, pack_weight
from qfx.recipe import Recipe
from qfx.rounding.blocks import Block, Part
from qfx.rounding.lanes import Env
from qfx.rounding.method_options import LearnedOptions
from qfx.rounding.offsets import Offsets
from qfx.rounding.scales import search


def method(recipe: Recipe) -> LearnedRounding:
    """For `qfx.rounding.sequential`."""
    return LearnedRounding(recipe.learned)


class Moving(Protocol):
    """A weight whose rounding gradient descent moves, such as `Offsets`."""

    def value(self) -> Tensor: ...
    def step(self, gradient: Tensor, rate: float, clip_rate: float) -> None: ...
    def packed(self) -> Any: ...
    @property
    def clipped(self) -> float: ...


def _offsets(part: Part, weight: Tensor, options: LearnedOptions) -> Moving | None:
    if part.format.is_plain:
        return None
    params = search(weight.float(), part.format)
    return Offsets(weight, part.format, params=params, optimizer=options.optimizer, reach=options.reach)


def _as_packed(part: Part, found: Packed, weight: Tensor) -> Packed:
    return found


@dataclass(frozen=True)
class LearnedRounding:
    """Learned rounding as a method of `qfx.rounding.sequential`.

    start: a weight as descent takes it up; None where there is nothing to learn. finish: what comes of `packed` there.
    Raises ValueError under torch.inference_mode().
    """

    options: LearnedOptions
    start: Callable[[Part, Tensor, LearnedOptions], Moving | None] = _offsets
    finish: Callable[[Part, Any, Tensor], Packed] = _as_packed

    def __post_init__(self) -> None:
        if torch.is_inference_mode_enabled():
            what = "rounding='learned' needs gradients, which torch.inference_mode() takes away"
            raise ValueError(explain(what, next_step="call it outside of it; qfx makes none where it needs none"))

    @property
    def needs_float(self) -> bool:
        """The results of the float block are what is aimed at."""
        return True

    @property
    def reads_all(self) -> bool:
        """Of the calls that read a weight those in its block are seen."""
        return False

    def round(self, block: Block) -> list[Note]:
        """Round every weight of a block. Raises ValueError where its results are NaN or infinite."""
        started, moving, parts = time.perf_counter(), dict[str, Moving](), list[Part]()
        for part in (part for site in block.sites for linear in site.linears for part in linear.parts):
            first = self.start(part, block.weight(part), self.options)
            if first is None:
                block.put(part, pack_weight(block.weight(part), part.format, name=part.name))
            else:
                moving[part.name] = first
                parts.append(part)
        if not parts:
            return []
        outputs = block.outputs
        wanted = [_results(block, batch, env) for batch, env in enumerate(outputs)]
        if not wanted[0]:
            return self._without_results(block, parts, moving)
        full = {part.name: block.weight(part) for part in parts}
        found = learn(
            lambda weights, batch: _results(
                block, batch, block.run(batch, {n: w.to(full[n].dtype) for n, w in weights.items()})
            ),
            moving,
            wanted,
            steps=self.options.steps,
            batches=-(-self.options.batch // max(1, len(_floating(outputs[0])[0]))),
            rate=self.options.learning_rate or first_rate(self.options.optimizer, self.options.steps),
            name=repr(block.name),
        )
        seconds = round((time.perf_counter() - started) / len(parts), 3)
        for part in parts:
            told = {"clipped": found.clipped[part.name], "seconds": seconds}
            block.put(part, self.finish(part, found.packed[part.name], full[part.name]), {**found.told, **told})
        return []

    def _without_results(self, block: Block, parts: Sequence[Part], moving: Mapping[str, Moving]) -> list[Note]:
        notes = []
        for part in parts:
            block.put(part, self.finish(part, moving[part.name].packed(), block.weight(part)))
            what = "its block gives nothing in floating point that could be compared with the float model"
            step = "rounding 'gptq' looks at each layer by itself"
            notes.append(Note(part.name, f"{what}: rounded by 'mse'", step))
        return notes


def _floating(env: Env) -> list[Tensor]:
    """What a block gives that has a gradient, in the order of the graph."""
    return [value for value in env.values() if _is_floating(value)]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _results(block: Block, batch: int, env: Env) -> list[Tensor]:
    """What the loss looks at: the block's floating results for a batch, without the positions that are padding."""
    return [block.lane.rows(batch, node, value) for node, value in env.items() if _is_floating(value)]


CLIP_RATE = 0.15  # of the rate of offsets: that of the shares of the extremes
_TOLD = 4  # batches by which errors are told
Forward = Callable[[Mapping[str, Tensor], int], Sequence[Tensor]]
"""(weights by name, batch) -> the block's floating results for that batch with these weights in place."""


@dataclass
class Learned:
    """What `learn` found.

    before, after: squared error of the block's results over some batches, relative to their squares, at the start and
    in the end. clipped: the share of each weight beyond the range of its codes.
    """

    packed: dict[str, Any]
    before: float
    after: float
    clipped: dict[str, float] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, float]:
        """The errors, by the names that reports know."""
        return {"error_before": self.before, "error_after": self.after}


def first_rate(optimizer: str, steps: int) -> float:
    """The rate of the first step where none is given."""
    return (2.0 if optimizer == "adam" else 1.0) / max(1, steps)


def learn(
    forward: Forward,
    found: Mapping[str, Moving],
    wanted: Sequence[Sequence[Tensor]],
    *,
    steps: int,
    rate: float,
    batches: int = 1,
    seed: int = 0,
    name: str = "the block",
) -> Learned:
    """Round the weights [N, K] of a block so that its results stay near those in `wanted`.

    wanted: for each batch the block's floating results in float. batches: how many a step looks at. rate: of the first
    step, in steps of the format. With no step it is plain rounding. Raises ValueError where the results are NaN or Inf
    (naming the block). Where the descent leads away (too few steps, too high a rate), the weights are those of its
    start.
    """
    before = _error(forward, found, wanted, name)

    def taken(after: float) -> Learned:
        clipped = {key: one.clipped for key, one in found.items()}
        return Learned({key: one.packed() for key, one in found.items()}, before, after, clipped)

    first = taken(before)
    order = _Order(len(wanted), seed)
    for done in range(steps):
        now = rate * (1 - done / steps)
        for key, slope in _slopes(forward, found, wanted, order.take(batches)).items():
            found[key].step(slope, now, CLIP_RATE * now)
    after = _error(forward, found, wanted, name)
    return first if after > before else taken(after)


def _slopes(
    forward: Forward, found: Mapping[str, Moving], wanted: Sequence[Sequence[Tensor]], chosen: Sequence[int]
) -> dict[str, Tensor]:
    """The gradient of the loss over the chosen batches for each rounded weight."""
    values = {key: one.value().detach().requires_grad_() for key, one in found.items()}
    sums: dict[str, Tensor] = {}
    for batch in chosen:
        with torch.enable_grad():
            loss = squared_error(forward(values, batch), wanted[batch])
        for key, slope in zip(values, torch.autograd.grad(loss, list(values.values()), allow_unused=True), strict=True):
            if slope is not None:
                sums[key] = sums[key] + slope if key in sums else slope
    return sums


def squared_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Sum of the squared differences, scalar f32."""
    assert len(found) == len(wanted), (len(found), len(wanted))
    return torch.stack([(f.float() - w.float()).square().sum() for f, w in zip(found, wanted, strict=True)]).sum()


@torch.no_grad()
def _error(forward: Forward, found: Mapping[str, Moving], wanted: Sequence[Sequence[Tensor]], name: str) -> float:
    values = {key: one.value() for key, one in found.items()}
    wanted = wanted[:_TOLD]
    total = sum(float(squared_error(forward(values, i), each)) for i, each in enumerate(wanted))
    energy = sum(float(t.float().square().sum()) for each in wanted for t in each)
    if not torch.isfinite(torch.tensor(total)):
        raise ValueError(
            explain(
                f"the results of {name} hold NaN or Inf",
                expected="finite values",
                next_step="look for a failed load, an overflow in half precision or bad data before quantizing",
            )
        )
    return total / max(energy, 1e-30)


class _Order:
    """Batches in an order drawn by the seed, each once before any comes again."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.left = count, [0] * 0
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, number: int) -> list[int]:
        """The next batches, each at most once."""
        number = min(number, self.count)
        if len(self.left) < number:
            again = torch.randperm(self.count, generator=self.generator).tolist()
            self.left += [i for i in again if i not in self.left]
        chosen, self.left = self.left[:number], self.left[number:]
        return chosen
