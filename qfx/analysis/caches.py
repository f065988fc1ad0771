"""Units of the key-value cache: what a head's keys, and its values, lose in few bits.

An attention reads keys and values [B, G, T, D]; each of the G heads of either is a unit. A format is one that a cache
can store (`qfx.kv.formats`): /tok for each token, /gN for channels of keys in groups of N tokens, and for groups of N
channels of values. Errors are those that the cache itself makes: of all tokens, or where a `CacheFormat` says which
ones stay as they are, of those that a query reads from the codes (`qfx.analysis.split`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.analysis.attentions import Attention
from qfx.analysis.patterns import arguments
from qfx.analysis.split import split
from qfx.analysis.units import Unit
from qfx.format import Format
from qfx.kv.codes import Codes
from qfx.kv.formats import CacheFormat
from qfx.passes import _match as m
from qfx.passes._channels import known
from qfx.rounding.blocks import layer_of
from qfx.rounding.lanes import Env, Program

Take = Callable[[Tensor, Tensor], None]
FORMATS = ("u2/tok", "u3/tok", "u4/tok", "i8/tok")


@dataclass(frozen=True, eq=False)
class Cache:
    """One head of the keys (argument 1) or values (argument 2) of an attention, as a unit. kept: which tokens stay as
    they are, by `sinks`, `residual` and `step` of a format; None: none do."""

    unit: Unit
    node: fx.Node
    argument: int
    head: int
    kept: CacheFormat | None = None


def stored(x: Tensor, fmt: Format, *, keys: bool, kept: CacheFormat | None = None) -> Tensor:
    """What a cache gives back of x [.., T, D], keys or values, in this format. The first tokens, if kept, and those
    last ones that fill no group come as they are."""
    sinks = 0 if kept is None else kept.sinks
    count = x.shape[-2] - sinks
    count -= count % (fmt.group or 1) if keys else 0
    if fmt.is_plain or count <= 0:
        return x
    rows = x.reshape(-1, 1, *x.shape[-2:])
    codes = Codes(fmt, rows, by_tokens=keys)
    own = rows[:, :, sinks : sinks + count]
    beyond = -count % codes.unit  # whole units are written: more tokens, which change no other's
    codes.write(torch.cat([own, own[:, :, -1:].expand(-1, -1, beyond, -1)], 2) if beyond else own, 0)
    found = codes.values(0, count).to(x.dtype)
    return torch.cat([rows[:, :, :sinks], found, rows[:, :, sinks + count :]], 2).reshape(x.shape)


def caches(attentions: Sequence[Attention], kept: CacheFormat | None = None) -> list[Cache]:
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
                found.append(Cache(unit, attention.node, argument, head, kept))
    return found


class CachedProgram(Program):
    """A program whose attentions read rounded keys and values. formats: attention -> argument -> head -> Format. kept:
    attention -> which tokens stay as they are. hooks: (attention, argument) -> called with keys or values that are read
    from the codes and the gradient of these; of attentions in `kept`."""

    def __init__(self, gm: fx.GraphModule, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(gm, tensors)
        self.formats: dict[fx.Node, dict[int, dict[int, Format]]] = {}
        self.kept: dict[fx.Node, CacheFormat] = {}
        self.hooks: dict[tuple[fx.Node, int], Take] = {}

    def _call(self, node: fx.Node, env: Env, replaced: Mapping[int, Any]) -> Any:
        rounded = dict(replaced)
        for argument, heads in self.formats.get(node, {}).items():
            source = node.args[argument]
            assert isinstance(source, fx.Node)
            value = self.look(source, env).clone()
            for head, fmt in heads.items():
                own = value[..., head, :, :]
                value[..., head, :, :] = stored(own, fmt, keys=argument == 1, kept=self.kept.get(node))
            rounded[argument] = value
        if node in self.kept and (node in self.formats or (node, 1) in self.hooks):
            given = arguments(self, node, env)
            far = [rounded.get(i, self.look(node.args[i], env)) for i in (1, 2)]  # type: ignore[arg-type]
            apart = split(given, (self._hooked(node, 1, far[0]), self._hooked(node, 2, far[1])), self.kept[node])
            if apart is not None:
                return _by_name(node.target, apart)
        return super()._call(node, env, rounded)

    def _hooked(self, node: fx.Node, argument: int, value: Tensor) -> Tensor:
        take = self.hooks.get((node, argument))
        if take is None or not value.requires_grad:
            return value
        far = value.clone()
        far.register_hook(lambda gradient: take(value.detach(), gradient.detach()))
        return far


def _by_name(target: Any, given: Mapping[str, Any]) -> Tensor:
    """The result of an operator whose arguments are given by name."""
    schema = target._schema.arguments
    args = [given.get(a.name, a.default_value) for a in schema if not a.kwarg_only]
    found: Tensor = target(*args, **{a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given})
    return found


class CacheScores:
    """Scores of caches: sum over samples, tokens and channels of (gradient x error)^2, see `qfx.analysis.scores`."""

    def __init__(self, units: Sequence[Cache], formats: Sequence[Format]) -> None:
        self.formats = formats
        self.sums: dict[str, dict[str, float]] = {}
        by_value: dict[fx.Node, list[Cache]] = {}
        by_use: dict[tuple[fx.Node, int], list[Cache]] = {}
        self.kept = {cache.node: cache.kept for cache in units if cache.kept is not None}
        for cache in units:
            source = cache.node.args[cache.argument]
            assert isinstance(source, fx.Node)
            by_value.setdefault(source, [])
            if cache.kept is None:
                by_value[source].append(cache)
            else:
                by_use.setdefault((cache.node, cache.argument), []).append(cache)
        self.hooks: dict[fx.Node, Take] = {node: self._hook(own) for node, own in by_value.items()}
        self.far: dict[tuple[fx.Node, int], Take] = {use: self._hook(own) for use, own in by_use.items()}

    def program(self, gm: fx.GraphModule) -> CachedProgram:
        """The float program whose gradients of keys and values that are read from the codes are taken."""
        program = CachedProgram(gm)
        program.hooks, program.kept = self.far, self.kept
        return program

    def _hook(self, own: Sequence[Cache]) -> Take:
        def take(value: Tensor, gradient: Tensor) -> None:
            for fmt in self.formats:
                for cache in own:
                    held, slope = value[..., cache.head, :, :], gradient[..., cache.head, :, :]
                    found = stored(held, fmt, keys=cache.argument == 1, kept=cache.kept)
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
