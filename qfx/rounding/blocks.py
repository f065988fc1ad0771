"""Blocks of a graph for methods that round weights by what they see: what is to be rounded, and what goes in and out.

A graph is cut where the outermost `name.<index>` of its modules changes (`model.layers.0`, `model.layers.1`, ...); what
stands before, between and after is a block of its own. A method gets one `Block` after the other:

    for site in block.sites:                        # linears that read one value, in the order of the graph
        for x, wanted in block.inputs_of(site):     # rows [.., K] of each batch, behind what is rounded already
            ...                                     # wanted: the same in the float model (None where not asked for)
        for linear in site.linears:
            for part in linear.parts:               # one; or one for each segment of a weight of several formats
                block.put(part, packed, {...})

    block.inputs, block.outputs                     # or the whole block: values of each batch, see `Block`
    block.run(batch, {part.name: weight, ...})
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Formats, show
from qfx.format import Format
from qfx.live.segments import Segment, along, pieces, segments, stem_of, take
from qfx.packing import Packed
from qfx.rounding import rounded
from qfx.rounding.lanes import Env, Lane, Program
from qfx.rounding.parts import dequantize_in_parts
from qfx.storage.spill import beside, rest

_INDEXED = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_WEIGHT = {"aten::linear": 1, "qfx::grouped_linear": 1, "aten::embedding": 0}


@dataclass(frozen=True, eq=False)
class Part:
    """What is rounded as one: a weight, or one segment of it. names: under which a plan holds it, the first counts."""

    names: tuple[str, ...]
    format: Format
    linear: Linear
    segment: Segment | None = None

    @property
    def name(self) -> str:
        """The name, such as `model.layers.0.mlp.up_proj` or `model.layers.0.self_attn.q_proj.rows1`."""
        return self.names[0]

    def take(self, whole: Tensor) -> Tensor:
        """The part of the whole weight [.., N, K]."""
        return whole if self.segment is None else take(whole, self.segment, along(self.linear.w))

    @property
    def columns(self) -> tuple[tuple[int, int], ...] | None:
        """Ranges of the input channels that the part reads; None where these are all."""
        return self.segment.ranges if self.segment is not None and along(self.linear.w) else None


@dataclass(eq=False)
class Linear:
    """A weight to be rounded, and the calls that read it, in order. w: its formats."""

    readers: list[fx.Node]
    w: Formats
    parts: list[Part] = field(default_factory=list)

    @property
    def node(self) -> fx.Node:
        """The first call that reads it."""
        return self.readers[0]

    @property
    def fqn(self) -> str:
        """Its name in recipes, plans and reports."""
        return graph.fqn_of(self.node)

    @property
    def grouped(self) -> bool:
        """Weights [E, N, K] of experts, whose rows are those between two offsets."""
        return graph.schema_name(self.node) == "qfx::grouped_linear"

    @property
    def table(self) -> bool:
        """An embedding: no data goes into its rounding."""
        return graph.schema_name(self.node) == "aten::embedding"

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole weight of its parts, in order; gradients go through."""
        if len(parts) == 1:
            return parts[0]
        axis, found = along(self.w), [part.segment for part in self.parts if part.segment is not None]
        return torch.cat([parts[i].narrow(axis, a, b - a) for i, a, b in pieces(found)], axis)


@dataclass(frozen=True, eq=False)
class Site:
    """Linears that read one value. call: the first that reads it. later: of layers that are called several times one
    call for each other value that all of these linears read."""

    call: fx.Node
    linears: list[Linear]
    later: tuple[fx.Node, ...] = ()

    @property
    def x(self) -> fx.Node:
        """The value."""
        assert isinstance(self.call.args[0], fx.Node)
        return self.call.args[0]

    @property
    def offsets(self) -> fx.Node | None:
        """The ends of the experts' rows, where the linears are grouped."""
        offsets = self.call.args[2] if self.linears[0].grouped else None
        assert isinstance(offsets, fx.Node | None)
        return offsets


@dataclass(frozen=True)
class Cut:
    """The calls [start, stop) of a program that are a block."""

    name: str
    start: int
    stop: int


def cuts(program: Program) -> list[Cut]:
    """The blocks of a program in order, without gaps."""
    keys = [layer_of(node) for node in program.nodes]
    runs: list[Cut] = []
    for at, key in enumerate(keys):
        if runs and runs[-1].name == key:
            runs[-1] = Cut(key, runs[-1].start, at + 1)
        else:
            runs.append(Cut(key, at, at + 1))
    found: list[Cut] = []
    for run in runs:  # what has no index between two calls of one block is in it
        if len(found) > 1 and not found[-1].name and found[-2].name == run.name:
            found[-2:] = [Cut(run.name, found[-2].start, run.stop)]
        else:
            found.append(run)
    return [Cut(cut.name or _name(cut, program), cut.start, cut.stop) for cut in found]


def layer_of(node: fx.Node) -> str:
    """The outermost `name.<index>` of a node's module, such as `model.layers.3`; "" beside the layers."""
    found = _INDEXED.match(str(node.meta.get("qfx_module") or ""))
    return found[0] if found else ""


def _name(cut: Cut, program: Program) -> str:
    """Of a block without an index: the modules of its first and last weight."""
    named = [graph.fqn_of(n) for n in program.nodes[cut.start : cut.stop] if graph.schema_name(n) in _WEIGHT]
    return " to ".join(dict.fromkeys([named[0], named[-1]])) if named else program.nodes[cut.start].name


def find(program: Program) -> list[Linear]:
    """Every weight with a format, in the order in which it is first read. Raises ValueError as `segments` does."""
    found: dict[Any, Linear] = {}
    for node in program.nodes:
        w = annotation.get(node).get("w")
        at = _WEIGHT.get(graph.schema_name(node))
        if w is None or at is None:
            continue
        source = graph.weight_of(node)
        assert source is not None, node
        linear = found.setdefault((source.target, steps_of(node.args[at]), show(w)), Linear([], w))
        linear.readers.append(node)
    for linear in found.values():
        linear.parts += _parts(linear)
    return list(found.values())


def _parts(linear: Linear) -> list[Part]:
    fqns = list(dict.fromkeys(graph.fqn_of(node) for node in linear.readers))
    shape = graph.val(linear.node.args[_WEIGHT[graph.schema_name(linear.node)]]).shape
    if graph.schema_name(linear.node) != "aten::linear":
        assert isinstance(linear.w, Format)
        return [Part(tuple(fqns), linear.w, linear)]
    each = segments(linear.w, shape, fqns[0])
    if len(each) == 1:
        return [Part(tuple(fqns), each[0].format, linear)]
    stems = [stem_of(along(linear.w), i) for i in range(len(each))]
    return [
        Part(tuple(f"{fqn}.{stem}" for fqn in fqns), segment.format, linear, segment)
        for stem, segment in zip(stems, each, strict=True)
    ]


def steps_of(operand: Any) -> str:
    """What is done to a parameter before it is a weight operand."""
    if not isinstance(operand, fx.Node) or operand.op == "get_attr":
        return ""
    return f"{steps_of(operand.args[0])}|{operand.target}{operand.args[1:]}"


class Block:
    """One block of the graph, between weights that are rounded and those that are not yet.

    gm: the float graph. nodes: the block's calls. linears: weights to be rounded that are read here first; sites: the
    same without embeddings, by the value they read. name: such as `model.layers.0`.
    """

    def __init__(
        self, cut: Cut, linears: list[Linear], lane: Lane, wanted: Lane | None,
        tensors: MutableMapping[str, Tensor], told: MutableMapping[str, dict[str, Any]],
    ) -> None:  # fmt: skip
        """lane, wanted: at the start of the block, of the rounded and of the float model. tensors, told: of the plan,
        for rounded weights and for what a method tells about them."""
        self.name, self.cut, self.lane, self.wanted, self.tensors, self.told = (
            cut.name,
            cut,
            lane,
            wanted,
            tensors,
            told,
        )
        self.program, self.gm = lane.program, lane.program.gm
        self.nodes = self.program.nodes[cut.start : cut.stop]
        self.linears = linears
        self.sites = _sites(linears, self.program)
        self.on_put: Callable[[Part], object] = lambda part: None

    def __len__(self) -> int:
        return len(self.lane.values)

    @property
    def inputs(self) -> list[Env]:
        """For each batch the values that come into the block, behind what is rounded already."""
        assert self.lane.at == self.cut.start, "the block has been run already"
        return self.lane.values

    @property
    def outputs(self) -> list[Env]:
        """For each batch the values that the float block gives to what follows, by node."""
        assert self.wanted is not None, "the method did not ask for the float model"
        self.wanted.advance(self.cut.stop)
        return [{n: v for n, v in env.items() if n in self.gives} for env in self.wanted.values]

    @property
    def gives(self) -> list[fx.Node]:
        """The block's calls whose values are read after it, or are the graph's result."""
        return [node for node in self.nodes if self.program.last_use[node] >= self.cut.stop]

    def weight(self, part: Part) -> Tensor:
        """The float weight [.., N, K] of a part, as the graph holds it."""
        node = part.linear.node
        operand = node.args[_WEIGHT[graph.schema_name(node)]]
        assert isinstance(operand, fx.Node)
        whole: Tensor = self.program.look(operand, {})
        return part.take(whole)

    def run(self, batch: int, weights: Mapping[str, Tensor]) -> Env:
        """What the block gives for a batch, with these weights in place of those of parts, by name.

        Weights of parts that are not named are as they are rounded so far, else float. Gradients go through; the
        rounding of inputs is passed straight.
        """
        held = dict(self.lane.weights)
        for linear in self.linears:
            if any(part.name in weights for part in linear.parts):
                whole = linear.join([weights.get(p.name, self._now(p)) for p in linear.parts])
                held.update(dict.fromkeys(linear.readers, whole))
        found = self.program.run(self.inputs[batch], range(self.cut.start, self.cut.stop), held, rounded=True)
        return {node: value for node, value in found.items() if node in self.gives}

    def inputs_of(self, site: Site) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each batch what the linears of a site read, rounded in their format; and the same in the float model.

        Everything before is run; sites are to be asked for in order. Inputs are those of the site's call, without the
        positions that are padding.
        """
        at = self.program.position[site.call]
        self.lane.advance(at)
        if self.wanted is not None:
            self.wanted.advance(at)
        x_format = annotation.get(site.call).get("x")
        for batch in range(len(self)):
            x = self.lane.value(batch, site.x)
            if isinstance(x_format, Format):
                x = self.program.round_input(graph.fqn_of(site.call), x, x_format)
            wanted = None if self.wanted is None else self.lane.rows(batch, site.x, self.wanted.value(batch, site.x))
            yield self.lane.rows(batch, site.x, x), wanted

    def reads(self, site: Site) -> Iterator[tuple[Block, Site]]:
        """The site before each value that its linears read, one after the other, and the block as it is then.

        Before later calls of layers that are called several times, weights that are not rounded yet are float ones.
        """
        yield self, site
        if site.later:
            ahead = copy.copy(self)
            ahead.lane, ahead.wanted = self.lane.copy(), None if self.wanted is None else self.wanted.copy()
            for call in site.later:
                yield ahead, Site(call, site.linears)

    def first_bad(self, batch: int, x: fx.Node) -> str:
        """Where NaN or infinity first comes up on the way to a value: "%exp (model.layers.0.mlp)"; "" where nowhere.

        The batch is run again from the start, so this is for an error that is about to be raised.
        """
        weights: dict[fx.Node, Tensor] = {}
        for linear in find(self.program):
            if all(self.has(part) for part in linear.parts):
                whole = linear.join([self._now(part) for part in linear.parts])
                weights.update(dict.fromkeys(linear.readers, whole))
        above = graph.above(x)
        env: Env = dict(zip(self.program.inputs, self.lane.batches[batch], strict=True))
        for node in (*self.program.inputs, *self.program.nodes):
            if node in self.program.position:
                env[node] = self.program.step(node, env, weights, rounded=True)
            value = env[node]
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if node in above and floating and bool((value.isnan() | value.isposinf()).any()):
                module = str(node.meta.get("qfx_module") or "")
                return f"%{node.name}" + (f" ({module})" if module else "")
            if node is x:
                break
        return ""

    def shares_inputs(self, site: Site) -> bool:
        """Whether the experts of a site read rows of one value, which none of them has made."""
        before = (n for n in graph.above(site.x) if graph.schema_name(n) == "qfx::grouped_linear")
        return site.offsets is not None and all(node.args[2] is not site.offsets for node in before)

    def offsets_of(self, site: Site, batch: int) -> Tensor:
        """The ends of the experts' rows of a batch, int [E], among those that `inputs_of` gives."""
        assert site.offsets is not None
        found: Tensor = self.lane.value(batch, site.offsets)
        kept = self.lane.kept_rows(batch, site.x, len(self.lane.value(batch, site.x)))
        if kept is None:
            return found
        return torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[found.cpu().long()]

    def put(self, part: Part, packed: Packed, told: Mapping[str, Any] | None = None) -> None:
        """Take a rounded part: it goes into the plan, and stands in the graph for what follows.

        Where the float weight lies in a file, both forms do, too (see `qfx.storage.spill`).
        """
        weight = self.weight(part)
        packed = packed.beside(weight)
        for name in part.names:
            rounded.put(self.tensors, name, packed)
        if told is not None:
            self.told[part.name] = dict(told)
        parts = part.linear.parts
        if all(self.has(p) for p in parts):
            near = weight if len(parts) == 1 else None
            whole = beside(part.linear.join([self._now(p, near) for p in parts]), weight)
            self.lane.weights.update(dict.fromkeys(part.linear.readers, whole))
        rest(weight)
        self.on_put(part)

    def has(self, part: Part) -> bool:
        """Whether the part is rounded already."""
        return f"{part.name}/codes" in self.tensors

    def leave(self) -> None:
        """Run what is left of the block, and let go of the weights that nothing reads later."""
        for lane in (self.lane, self.wanted):
            if lane is not None:
                lane.advance(self.cut.stop)
        for node in [n for n in self.lane.weights if self.program.position[n] < self.cut.stop]:
            del self.lane.weights[node]

    def _now(self, part: Part, near: Tensor | None = None) -> Tensor:
        """The weight of a part: rounded where it is rounded, else float. near: see `dequantize_in_parts`."""
        weight = self.weight(part)
        found = rounded.get(self.tensors, part.name, part.format, tuple(weight.shape))
        return weight if found is None else dequantize_in_parts(found, weight.dtype, near)


def _sites(linears: list[Linear], program: Program) -> list[Site]:
    found: dict[Any, Site] = {}
    for linear in linears:
        if linear.table:
            continue
        op, first = graph.schema_name(linear.node), linear.node.args[0]
        values = {node.args[0]: node for node in reversed(linear.readers) if graph.schema_name(node) == op}
        later = tuple(node for x, node in reversed(values.items()) if x is not first)
        offsets = linear.node.args[2] if linear.grouped else None
        key = first, offsets, tuple(node.args[0] for node in later), _rounding(linear, program)
        found.setdefault(key, Site(linear.node, [], later)).linears.append(linear)
    return list(found.values())


def _rounding(linear: Linear, program: Program) -> str:
    """What tells apart how linears round one input: its format, and its scale where that is fixed."""
    held = [program.tensors.get(f"{linear.fqn}/{leaf}") for leaf in ("x_scale", "x_zero")]
    return f"{annotation.get(linear.node).get('x')} {[None if t is None else t.tolist() for t in held]}"
