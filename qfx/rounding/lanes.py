"""Run a graph node by node with all batches side by side, so that its weights may change on the way.

A lane holds, for each batch, the values that are still to be read at one place of the graph, and goes on from there:

    program = Program(gm)
    lane = Lane(program, batches)
    lane.advance(program.position[node])            # every batch stands before that node now
    lane.value(0, node.args[0])                     # the input of the node in the first batch
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.calibration.padding import attended, in_positions, without
from qfx.calibration.positions import Rows, rows_of
from qfx.data import check_batch, telling
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.storage.spill import Spill, call, used

Env = dict[fx.Node, Any]
_OPERAND = {"aten::linear": 1, "qfx::grouped_linear": 1, "aten::embedding": 0}  # where the weight stands


class Program:
    """The calls of a graph in order, without those that are the same for every batch.

    nodes: the calls. position: of each. constants: parameters, and calls of nothing else that have no weight to round
    (DeBERTa's projections of relative positions have one); they are computed when they are read. tensors: scales of
    static inputs, by "<FQN>/x_scale" and "<FQN>/x_zero".
    """

    def __init__(self, gm: fx.GraphModule, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.gm, self.tensors = gm, tensors or {}
        self.inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.constants: set[fx.Node] = set()
        self.nodes: list[fx.Node] = []
        for node in gm.graph.nodes:
            fixed = node.op == "call_function" and self.constants.issuperset(node.all_input_nodes)
            if node.op == "get_attr" or (fixed and "w" not in annotation.get(node)):
                self.constants.add(node)
            elif node.op not in ("placeholder", "output"):
                assert node.op == "call_function", f"a prepared graph calls functions only: {node.format_node()}"
                self.nodes.append(node)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {node: self._last_use(node) for node in (*self.inputs, *self.nodes)}
        self._rows: dict[fx.Node, Rows | None] = {}
        self._keep_picks()
        self._known: Env = {}

    def _last_use(self, node: fx.Node) -> int:
        end = len(self.nodes)
        return max((self.position.get(user, end) for user in node.users), default=-1)

    def _keep_picks(self) -> None:
        """What rows are picked by is there as long as a weight to be rounded reads them: it tells which are padding."""
        for node in self.nodes:
            x = node.args[0] if _OPERAND.get(graph.schema_name(node)) == 1 and "w" in annotation.get(node) else None
            for pick in self.picks(x):
                if pick in self.last_use:
                    self.last_use[pick] = max(self.last_use[pick], self.position[node])

    def picks(self, x: Any) -> tuple[fx.Node, ...]:
        """The indices by which the rows of a value are picked from positions."""
        rows = self.rows_of(x) if isinstance(x, fx.Node) else None
        return () if rows is None else rows.picks

    def rows_of(self, node: fx.Node) -> Rows | None:
        """See `qfx.calibration.positions`."""
        if node not in self._rows:
            self._rows[node] = rows_of(node)
        return self._rows[node]

    def forget(self) -> None:
        """Let go of constants that were computed."""
        self._known.clear()

    def look(self, node: fx.Node, env: Env) -> Any:
        """The value of a node that is in `env` or constant."""
        if node not in self.constants:
            return env[node]
        if node not in self._known:
            if node.op == "get_attr":
                self._known[node] = _attribute(self.gm, str(node.target))
            else:
                self._known[node] = self._call(node, env, {})
        return self._known[node]

    def step(self, node: fx.Node, env: Env, weights: Mapping[fx.Node, Tensor], *, rounded: bool) -> Any:
        """The value of a call. weights: linear or embedding -> what stands for its weight operand.

        rounded: inputs are rounded where they are annotated with a format; gradients go straight through.
        """
        replaced: dict[int, Any] = {}
        if node in weights:
            at = _OPERAND[graph.schema_name(node)]
            replaced[at] = weights[node]
        if rounded and "x" in (formats := annotation.get(node)):
            x, fmt = node.args[0], formats["x"]
            assert isinstance(x, fx.Node)
            if isinstance(fmt, Format) and "w" in formats:
                replaced[0] = self.round_input(graph.fqn_of(node), self.look(x, env), fmt)
        return self._call(node, env, replaced)

    def round_input(self, fqn: str, x: Tensor, fmt: Format) -> Tensor:
        """The input of a linear as its format gives it back."""
        scale, zero = self.tensors.get(f"{fqn}/x_scale"), self.tensors.get(f"{fqn}/x_zero")
        nearest = fake_quantize(x.detach(), fmt, scale, zero, activation=True)
        return x + (nearest - x.detach()) if x.requires_grad else nearest

    def _call(self, node: fx.Node, env: Env, replaced: Mapping[int, Any]) -> Any:
        others = [None if i in replaced else arg for i, arg in enumerate(node.args)]
        args = list(fx.map_arg(others, lambda n: self.look(n, env)))
        for i, value in replaced.items():
            args[i] = value
        kwargs = fx.map_arg(node.kwargs, lambda n: self.look(n, env))
        assert callable(node.target), node
        if graph.schema_name(node) == "aten::scaled_dot_product_attention":
            args, kwargs = _without_mask(args, dict(kwargs))
        target = _copy if node.target is torch.ops.aten.copy.default else node.target
        value = call(target, args, kwargs)
        used(*(arg for arg in args if isinstance(arg, Tensor)))
        return value

    def run(
        self, env: Env, span: range, weights: Mapping[fx.Node, Tensor], *, rounded: bool, until: int | None = None
    ) -> Env:
        """Call the nodes of `span` (positions) one after the other; what is alive at `until`, the end of it."""
        env, until = dict(env), span.stop if until is None else until
        for at in span:
            node = self.nodes[at]
            env[node] = self.step(node, env, weights, rounded=rounded)
            for read in (node, *node.all_input_nodes):
                if read in env and self.last_use[read] <= at:
                    del env[read]
        return {node: value for node, value in env.items() if self.last_use[node] >= until}


def _copy(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    """aten.copy, which autograd does not know, as calls of which it knows the gradients."""
    return new.to(old).expand_as(old)


def _without_mask(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an attention that give the same result, sooner: a mask that hides what comes later, and nothing
    else, is `is_causal`, which computes no products to be hidden. Models make it of data, so a graph cannot tell."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    q, k, dropout = args[0], args[1], args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or dropout or len(args) > 5:
        return args, kwargs
    if mask.shape[-2:] != (q.shape[-2], k.shape[-2]) or q.shape[-2] != k.shape[-2]:
        return args, kwargs
    before = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if not torch.equal(mask, before.expand(mask.shape)):
        return args, kwargs
    return args[:3], {**{name: v for name, v in kwargs.items() if name != "attn_mask"}, "is_causal": True}


class Lane:
    """All batches at one place of a program.

    at: position of the call before which they stand. weights: what stands for the weights of calls, changed by the
    caller at any time. rounded: round inputs. memory: bytes above which values go to a temporary file; None: no limit.
    Values that are equal in all batches are held once.
    """

    def __init__(
        self, program: Program, batches: Sequence[Sequence[Any]], *, rounded: bool, memory: int | None = None,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.program, self.rounded, self.memory = program, rounded, memory
        self.folder = folder or Path(tempfile.gettempdir())
        self.weights: dict[fx.Node, Tensor] = {}
        self.batches, self.at = batches, 0
        self.values: list[Env] = []
        names = [node.name for node in program.inputs]
        for number, batch in enumerate(batches, 1):
            check_batch(batch, names, number)
            self.values.append(dict(zip(program.inputs, batch, strict=True)))
        self.attended = [attended(names, batch) for batch in batches]

    def advance(self, stop: int) -> None:
        """Take every batch on to before the call `stop`. Raises ValueError, naming the batch, where one does not."""
        if stop <= self.at:
            return
        span, held = range(self.at, stop), 0
        with Spill(self.folder) as spill, torch.no_grad():
            for number, env in enumerate(self.values, 1):
                with telling(number):
                    found = self.program.run(env, span, self.weights, rounded=self.rounded)
                self.values[number - 1] = found
                self._share(number - 1)
                held = self._spill(found, spill, held)
        self.program.forget()
        self.at = stop

    def copy(self) -> Lane:
        """Another one at the same place, which goes on by itself."""
        found = copy.copy(self)
        found.values, found.weights = [dict(env) for env in self.values], dict(self.weights)
        return found

    def value(self, batch: int, node: fx.Node) -> Any:
        """The value of a node in a batch (counted from 0) at this place."""
        return self.program.look(node, self.values[batch])

    def rows(self, batch: int, node: fx.Node, x: Tensor) -> Tensor:
        """A node's value [B, T, K], or rows of positions (see `Rows`), in a batch without padding, [n, K]; any other as
        it is."""
        kept = self.attended[batch]
        rows = self.program.rows_of(node) if kept and x.dim() == 2 else None
        if rows is None:
            return without(x, kept)
        picks = [self._known(batch, pick) for pick in rows.picks]
        if any(pick is None for pick in picks):  # nothing that is to be rounded reads it
            return x
        return without(*in_positions(x, kept, self._shape(batch, rows.like), picks))

    def kept_rows(self, batch: int, node: fx.Node, count: int) -> Tensor | None:
        """Which of a node's rows `rows` gives, bool [count]; None where these are all."""
        numbers = torch.arange(count)[:, None]
        found = self.rows(batch, node, numbers).reshape(-1)
        if len(found) == count:
            return None
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, found, True)

    def _shape(self, batch: int, like: fx.Node) -> tuple[int, ...]:
        given: Tensor = self.batches[batch][self.program.inputs.index(like)]
        return tuple(given.shape[:2])

    def _known(self, batch: int, node: fx.Node) -> Any:
        env = self.values[batch]
        return self.program.look(node, env) if node in env or node in self.program.constants else None

    def _share(self, batch: int) -> None:
        """Hold what is equal to the first batch's value once."""
        first, env = self.values[0], self.values[batch]
        for node, value in env.items() if batch else ():
            other = first.get(node)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value is not other and _equal(value, other):
                env[node] = other

    def _spill(self, env: Env, spill: Spill, held: int) -> int:
        """Count the bytes of a batch's own values, and put into the file what is beyond the limit."""
        first = {id(value) for value in self.values[0].values()} if env is not self.values[0] else set()
        for node, value in env.items():
            if node.op == "placeholder" or not isinstance(value, Tensor) or id(value) in first:
                continue
            if self.memory is not None and held + value.nbytes > self.memory:
                env[node] = spill.keep(value)
            else:
                held += value.nbytes
        return held


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value.detach() if isinstance(value, Tensor) else value
