"""Scale the hidden channels of an MLP in the up projection and undo it in the down projection. Exact.

    down(act(gate(x)) * up(x))       up's rows and bias / s, down's columns * s: the product is linear in up(x)
    down(relu(up(x)))                the same for s > 0

So SmoothQuant for the down projection costs no division at run time. GELU and the like are not homogeneous: refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qfx.calibration.sample import Sample
from qfx.errors import Note
from qfx.graph import is_call
from qfx.passes import _channels as channels
from qfx.passes import _edits as edits
from qfx.passes import _sites as sites
from qfx.passes._sites import Record, Weight
from qfx.passes.smooth import Chooser, choose

aten = torch.ops.aten


@dataclass(frozen=True)
class Site(Record):
    """One MLP: channel j of down's input is made by row `offset + stride * j` of the (maybe fused) up projection."""

    NAME: ClassVar[str] = "up-down"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor",)
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"up": Weight.of, "down": Weight.of}

    up: Weight
    down: Weight
    channels: int
    offset: int = 0
    stride: int = 1


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every gated or ReLU MLP; refusals are of those whose structure fits and whose weights do not."""
    found, refusals = [], []
    for node in gm.graph.nodes:
        if not is_call(node, aten.mul.Tensor, aten.relu.default):
            continue
        down = _down(node)
        if down is None:
            continue
        results = [_site(node, value, down) for value in dict.fromkeys(node.args) if isinstance(value, fx.Node)]
        site = next((r for r in results if isinstance(r, Site)), None)
        reason = next((r for r in results if isinstance(r, str)), None)
        if site is not None:
            found.append(site)
        elif reason is not None:
            refusals.append(sites.note(down, f"its input cannot be scaled in the up projection: {reason}"))
    return found, refusals


def _down(node: fx.Node) -> fx.Node | None:
    """The one linear that reads a value, channels in their order."""
    numbers = channels.numbered(node, (-1,))
    if numbers is None:
        return None
    found, ends = channels.flow(node, numbers)
    if len(ends) != 1 or not sites.is_linear(ends[0][0]) or ends[0][0].args[0] is not ends[0][1]:
        return None
    return ends[0][0] if channels.along(found[ends[0][1]], -1) == list(range(numbers.shape[-1])) else None


def _site(node: fx.Node, value: fx.Node, down: fx.Node) -> Site | str | None:
    """The site where `value`, an operand of the product or ReLU, comes straight from a linear; None where not."""
    up = channels.source(value)
    if not sites.is_linear(up):
        return None
    numbers = channels.numbered(up, (-1,))
    if numbers is None:
        return None
    found, ends = channels.flow(up, numbers)
    rows = channels.along(found.get(value), -1)
    if rows is None or len(rows) != down.args[0].meta["val"].shape[-1]:  # type: ignore[union-attr]
        return None
    used = set(rows)
    for user, at in ends:
        if used & channels.numbers_in(found[at]) and not (user is node and at is value and node.args.count(at) == 1):
            return f"%{user.name} reads it, too"
    stride = rows[1] - rows[0] if len(rows) > 1 else 1
    if rows != list(range(rows[0], rows[0] + stride * len(rows), stride)):
        return "its channels do not lie evenly"
    up_weight, down_weight = sites.weight_of(up), sites.weight_of(down)
    if isinstance(up_weight, str) or isinstance(down_weight, str):
        return up_weight if isinstance(up_weight, str) else str(down_weight)
    return Site(up_weight, down_weight, len(rows), rows[0], stride)


def apply(module: nn.Module, site: Site, factor: Tensor) -> None:
    """Divide the hidden channels by `factor` [channels], in a graph or a live model."""
    edits.check_factor(factor, site.channels, site.down.name)

    def rows(old: Tensor) -> Tensor:
        new = old.movedim(site.up.out, -1).clone() if old.dim() > 1 else old.clone()
        end = site.offset + site.stride * site.channels
        new[..., site.offset : end : site.stride] /= factor.to(new)
        return new.movedim(-1, site.up.out) if old.dim() > 1 else new

    edits.edit(module, site.up.weight, rows)
    if site.up.bias is not None:
        edits.edit(module, site.up.bias, rows)
    edits.scale(module, site.down.weight, factor, site.down.inp)


def smooth(
    gm: fx.GraphModule, stats: Mapping[str, Sample], *, skip: Iterable[str] = (), chooser: Chooser = choose
) -> tuple[list[tuple[Site, Tensor]], list[Note]]:
    """SmoothQuant's factors [channels] for the inputs of down projections; arguments as for `smooth.smooth`."""
    found, refusals = find(gm)
    chosen: list[tuple[Site, Tensor]] = []
    left = set(skip)
    for site in found:
        if site.down.name in stats and site.down.name not in left and stats[site.down.name].seen:
            factor = chooser(gm, (site.down,), [stats[site.down.name]])
            if factor is not None:
                chosen.append((site, factor))
    return chosen, refusals
