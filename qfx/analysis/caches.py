"""Units of the key-value cache: what a head's keys, and its values, lose in few bits.

An attention reads keys and values [B, G, T, D]; each of the G heads of either is a unit. A format is one that a cache
can store (`qfx.kv.formats`): /tok for each token, /gN for channels of keys in groups of N tokens, and for groups of N
channels of values. Errors are those that the cache itself makes, where all tokens but the first are stored in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.analysis.attentions import Attention
from qfx.analysis.units import Unit
from qfx.blocks import layer_of
from qfx.format import Format
from qfx.kv.codes import Codes
from qfx.lanes import Env, Program
from qfx.passes import _match as m
from qfx.passes._channels import known

FORMATS = ("u2/tok", "u3/tok", "u4/tok", "i8/tok")


@dataclass(frozen=True, eq=False)
class Cache:
    """One head of the keys (argument 1) or values (argument 2) of an attention, as a unit. sinks: first tokens that
    stay as they are."""

    unit: Unit
    node: fx.Node
    argument: int
    head: int
    sinks: int = 0


def stored(x: Tensor, fmt: Format, *, keys: bool, sinks: int = 0) -> Tensor:
    """What a cache gives back of x [.., T, D], keys or values, in this format. sinks first tokens, and those last ones
    that fill no group, come as they are."""
    count = x.shape[-2] - sinks
    count -= count % (fmt.group or 1) if keys else 0
    if fmt.is_plain or count <= 0:
        return x
    rows = x.reshape(-1, 1, *x.shape[-2:])
    codes = Codes(fmt, rows, by_tokens=keys)
    codes.write(rows[:, :, sinks : sinks + count], 0)
    found = codes.values(0, count).to(x.dtype)
    return torch.cat([rows[:, :, :sinks], found, rows[:, :, sinks + count :]], 2).reshape(x.shape)


def caches(attentions: Sequence[Attention], sinks: int = 0) -> list[Cache]:
    """The units of the caches of a graph's attentions: first all heads of the keys, then of the values, of each."""
    found = []
    for attention in attentions:
        for argument, kind in ((1, "cache_k"), (2, "cache_v")):
            width = known(m.shape(attention.node.args[argument])[-1])
            for head in range(attention.kv_heads):
                unit = Unit(
                    f"{attention.name}.{kind}{head}", attention.name, kind, layer_of(attention.node), (int(width),),
                    head=head, attention=attention.name,
                )  # fmt: skip
                found.append(Cache(unit, attention.node, argument, head, sinks))
    return found


class CachedProgram(Program):
    """A program whose attentions read rounded keys and values. formats: attention -> argument -> head -> Format. sinks:
    first tokens of an attention that stay as they are."""

    def __init__(self, gm: fx.GraphModule, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(gm, tensors)
        self.formats: dict[fx.Node, dict[int, dict[int, Format]]] = {}
        self.sinks: dict[fx.Node, int] = {}

    def _call(self, node: fx.Node, env: Env, replaced: Mapping[int, Any]) -> Any:
        rounded = dict(replaced)
        for argument, heads in self.formats.get(node, {}).items():
            source = node.args[argument]
            assert isinstance(source, fx.Node)
            value = self.look(source, env).clone()
            for head, fmt in heads.items():
                own = value[..., head, :, :]
                value[..., head, :, :] = stored(own, fmt, keys=argument == 1, sinks=self.sinks.get(node, 0))
            rounded[argument] = value
        return super()._call(node, env, rounded)


class CacheScores:
    """Scores of caches: sum over samples, tokens and channels of (gradient x error)^2, see `qfx.analysis.scores`."""

    def __init__(self, units: Sequence[Cache], formats: Sequence[Format]) -> None:
        self.formats = formats
        self.sums: dict[str, dict[str, float]] = {}
        by_value: dict[fx.Node, list[Cache]] = {}
        for cache in units:
            source = cache.node.args[cache.argument]
            assert isinstance(source, fx.Node)
            by_value.setdefault(source, []).append(cache)
        self.hooks: dict[fx.Node, Callable[[Tensor, Tensor], None]] = {
            node: self._hook(own) for node, own in by_value.items()
        }

    def _hook(self, own: Sequence[Cache]) -> Callable[[Tensor, Tensor], None]:
        def take(value: Tensor, gradient: Tensor) -> None:
            for fmt in self.formats:
                for cache in own:
                    held, slope = value[..., cache.head, :, :], gradient[..., cache.head, :, :]
                    found = stored(held, fmt, keys=cache.argument == 1, sinks=cache.sinks)
                    lost = ((found.float() - held.float()) * slope.float()).square().sum(dtype=torch.float64)
                    sums = self.sums.setdefault(cache.unit.name, {})
                    sums[str(fmt)] = sums.get(str(fmt), 0.0) + float(lost)

        return take

    def scores(self, factor: float, weight: float) -> dict[str, dict[str, float]]:
        """unit -> format -> score, on the scale of Quant-Fisher."""
        return {
            name: {text: factor * value / max(weight, 1e-30) for text, value in row.items()}
            for name, row in self.sums.items()
        }
