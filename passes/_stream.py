"""The residual stream: values that are added up layer by layer, who writes into them and who reads them.

Found by the graph alone: sums, moves of rows, factors per token and the like keep the basis of the channels, so that
all values that they connect have one basis. It can be changed where every writer is a parameter along whose output axis
the change goes (embeddings, linears, constants), and every reader a linear, straight or behind a norm whose weight is
folded. Post-norm models are refused: a norm's weight acts inside the stream. A linear that shares the embedding's table
(lm_head) blocks the change, unless the caller names it in `tied` and takes care of its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.errors import Note
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._sites import Norm, Piece

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_POST_NORM = "the result of a norm is part of it (a post-norm model), so that the norm's weight cannot be folded"
_REDUCE = (aten.sum.dim_IntList, aten.mean.dim)


@dataclass(frozen=True)
class Part(Piece):
    """A stored tensor and its axis of stream channels. weight: FQN."""

    weight: str
    axis: int
    bias: ClassVar[None] = None


@dataclass
class Stream:
    """One residual stream of `size` channels.

    norms: the norms that read it. readers: linears behind them or straight (`direct`). writers: what its values come
    from. shifts: FQNs of biases that norms could not give to their linears. heads: linears that read its table as it is
    written -> the norm before each, whose weight is not folded; None where there is no norm, or it has no weight.
    """

    size: int
    norms: list[fx.Node] = field(default_factory=list)
    readers: dict[Part, fx.Node] = field(default_factory=dict)
    writers: dict[Part, fx.Node] = field(default_factory=dict)
    shifts: dict[Part, fx.Node] = field(default_factory=dict)
    direct: list[fx.Node] = field(default_factory=list)
    heads: dict[fx.Node, Norm | None] = field(default_factory=dict)

    @property
    def centred(self) -> bool:
        """Its norms are RMS norms, which any rotation passes."""
        return all(node.target is aten.rms_norm.default for node in self.norms)


def find(gm: fx.GraphModule, *, folded: bool = True, tied: Collection[str] = ()) -> tuple[list[Stream], list[Note]]:
    """Every residual stream whose basis can be changed, and the others with the reason.

    folded: the weights of norms must be 1. tied: names of linears that may share an embedding's table (`heads`).
    """
    found, refusals = [], []
    shared = {node for node in gm.graph.nodes if _is_plain(node) and graph.fqn_of(node) in tied}
    for members in _classes(gm):
        norms = [u for v in members for u in v.users if u.target in _NORMS and u.args[0] is v]
        if not norms or not any(_is_sum(node, members) for node in members):
            continue
        stream = _stream(gm, members, folded, shared)
        if isinstance(stream, Stream):
            found.append(stream)
        else:
            refusals.append(stream)
    return found, refusals


def norm_value(norm: fx.Node) -> tuple[fx.Node, str | None]:
    """(what a norm gives after its gain and a separate bias vector, FQN of that vector)."""
    value = norm
    user = m.only_user(value)
    if user is not None and is_call(user, aten.mul.Tensor) and isinstance(sites.norm_of(user), Norm):
        value, user = user, m.only_user(user)
    if user is not None and m.plain_binary(user, aten.add.Tensor):
        for x, shift in m.orders(user):
            held = m.skip_casts(shift)
            if x is value and isinstance(held, fx.Node) and held.op == "get_attr" and m.rank(held) == 1:
                return user, str(held.target)
    return value, None


def _classes(gm: fx.GraphModule) -> list[dict[fx.Node, None]]:
    """Values of one basis, in graph order."""
    parent: dict[fx.Node, fx.Node] = {}
    held: dict[str, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in gm.graph.nodes:
        if node.op == "get_attr":
            parent[root(node)] = root(held.setdefault(str(node.target), node))
        elif graph.schema_name(node) == "aten::embedding":  # a table of several streams gives them one basis
            parent[root(node)] = root(
                held.setdefault(f"table {getattr(m.skip_casts(node.args[0]), 'target', node)}", node)
            )
        for source in same_basis(node):
            parent[root(source)] = root(node)
    classes: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in gm.graph.nodes:
        if _channels(node) > 1:
            classes.setdefault(root(node), {})[node] = None
    return list(classes.values())


def same_basis(node: fx.Node) -> list[fx.Node]:
    """The arguments whose channels (last axis) are those of a node's result, whatever orthogonal basis they are in."""
    if node.op != "call_function" or _channels(node) <= 1:
        return []
    args: list[Any] = list(node.args)
    rank = m.rank(node)
    if sites.keeps_channels(node) or is_call(node, aten.neg.default):
        return args[:1]
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        operands = [a for a in args[:2] if isinstance(a, fx.Node)]
        return operands if len(operands) == 2 and all(_channels(a) == _channels(node) for a in operands) else []
    if is_call(node, *m.MUL, *m.DIV):
        x, factor = args[:2]
        if is_call(node, *m.MUL) and isinstance(factor, fx.Node) and not _is_row_factor(factor):
            x, factor = factor, x
        return [x] if isinstance(x, fx.Node) and _is_row_factor(factor) and _channels(x) == _channels(node) else []
    if is_call(node, *_REDUCE) and (before := m.rank(args[0])) > 1:
        return args[:1] if args[1] and all(d % before != before - 1 for d in args[1]) else []
    if is_call(node, aten.cat.default):
        dim = args[1] if len(args) > 1 else 0
        return list(args[0]) if isinstance(dim, int) and dim % rank != rank - 1 else []
    return []


def _channels(node: Any) -> int:
    """The size of the last axis of floating values; 0 for everything else."""
    value = graph.val(node)
    if not isinstance(value, Tensor) or value.dim() < 1 or not value.is_floating_point():
        return 0
    last = m.shape(node)[-1]
    return last if isinstance(last, int) else 0


def _is_row_factor(value: Any) -> bool:
    """A number, or a tensor of one value for all channels."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float)
    found = graph.val(value)
    return not isinstance(found, Tensor) or found.dim() == 0 or m.shape(value)[-1] == 1


def _is_sum(node: fx.Node, members: Mapping[fx.Node, None]) -> bool:
    return is_call(node, aten.add.Tensor) and all(a in members for a in node.args[:2])


class _BlockedError(Exception):
    """Why a stream's basis cannot be changed."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def _stream(
    gm: fx.GraphModule, members: Mapping[fx.Node, None], folded: bool, shared: Collection[fx.Node]
) -> Stream | Note:
    stream = Stream(_channels(next(iter(members))))
    try:
        for node in members:
            if not same_basis(node):
                for part in _written(node, members, shared):
                    stream.writers[part] = node
            for user in node.users:
                _read(gm, stream, node, user, members, folded, shared)
        _check_heads(stream, shared)
    except _BlockedError as blocked:
        return sites.note(blocked.node, f"the residual stream cannot be rotated: {blocked.reason}")
    return stream


def _written(node: fx.Node, members: Mapping[fx.Node, None], shared: Collection[fx.Node]) -> Iterator[Part]:
    """The stored tensors that a value of the stream comes from."""
    name = graph.schema_name(node)
    if node.op == "get_attr":
        yield Part(str(node.target), m.rank(node) - 1)
    elif name == "aten::embedding":
        table = m.skip_casts(node.args[0])
        if not (isinstance(table, fx.Node) and table.op == "get_attr"):
            raise _BlockedError(node, f"the table of %{node.name} is computed in the graph")
        allowed = {n for n in members if graph.schema_name(n) == "aten::embedding"}
        if foreign := sites.other_user(table, allowed | {n for n in shared if _table(n) == table.target}):
            raise _BlockedError(node, f"its table {table.target} is also used by %{foreign.name} (untie them)")
        yield Part(str(table.target), 1)
    elif sites.is_linear(node):
        weight = sites.weight_of(node)
        if isinstance(weight, str):
            yield from _kernel(node, weight)
            return
        yield Part(weight.weight, weight.out)
        if weight.bias is not None:
            yield Part(weight.bias, 0)
    elif node.target in _NORMS or isinstance(sites.norm_of(node), Norm) or _is_shifted_norm(node):
        raise _BlockedError(node, _POST_NORM)
    else:
        what = "an input of the graph" if node.op == "placeholder" else f"%{node.name} ({graph.op_name(node)})"
        raise _BlockedError(node, f"{what} is part of it")


def _kernel(node: fx.Node, reason: str) -> Iterator[Part]:
    """A convolution's kernel [N, ...] that is reshaped to [N, K]: only its outputs are known."""
    source = graph.weight_of(node)
    operand: Any = node.args[1]
    bias = m.skip_casts(node.args[2]) if len(node.args) > 2 else None
    named = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    if source is None or not is_call(operand, *m.RESHAPES) or operand.args[0] is not source or not named:
        raise _BlockedError(node, reason)
    users = [u for n in node.graph.nodes if n.op == "get_attr" and n.target == source.target for u in n.users]
    if users != [operand] or list(operand.users) != [node] or m.shape(source)[0] != m.shape(operand)[0]:
        raise _BlockedError(node, reason)
    yield Part(str(source.target), 0)
    if bias is not None:
        yield Part(str(bias.target), 0)


def _is_shifted_norm(node: fx.Node) -> bool:
    return is_call(node, aten.add.Tensor) and any(
        isinstance(a, fx.Node) and a.target in _NORMS and norm_value(a)[0] is node for a in node.args[:2]
    )


def _read(
    gm: fx.GraphModule, stream: Stream, node: fx.Node, user: fx.Node, members: Mapping[fx.Node, None], folded: bool,
    shared: Collection[fx.Node],
) -> None:  # fmt: skip
    if sites.reads_size(user) or (user in members and node in same_basis(user)):
        return
    if user.target in _NORMS and user.args[0] is node:
        _read_norm(gm, stream, user, folded, shared)
    elif graph.schema_name(user) == "aten::embedding" and user.args[0] is node:
        raise _BlockedError(user, f"its table is part of %{node.name}")
    elif sites.is_linear(user) and user.args[0] is node and node not in user.args[1:]:
        stream.direct.append(user)
        if user in shared:
            stream.heads[user] = None
        else:
            _reader(stream, user)
    else:
        what = "it is an output of the model" if user.op == "output" else f"%{user.name} reads it"
        raise _BlockedError(node, what)


def _read_norm(gm: fx.GraphModule, stream: Stream, norm: fx.Node, folded: bool, shared: Collection[fx.Node]) -> None:
    a = m.arguments(norm)
    if len(a["normalized_shape"]) != 1:
        raise _BlockedError(norm, f"%{norm.name} is a norm over several axes")
    value, shift = norm_value(norm)
    parameters = sites.norm_of(value) if shift is None else sites.norm_of(m.skip_casts(_other(value, shift)))
    if isinstance(parameters, str) and parameters != "the norm has no weight":
        raise _BlockedError(norm, parameters)
    linears, others = sites.readers(value)
    if others and is_call(others[0], aten.add.Tensor):
        raise _BlockedError(norm, _POST_NORM)
    if others:
        raise _BlockedError(norm, f"%{others[0].name} reads the result of the norm %{norm.name}, not only linears")
    heads = _heads_behind(norm, linears, shared, shifted=shift is not None)
    if folded and isinstance(parameters, Norm) and not heads:
        gain = graph.get_tensor(gm, parameters.weight).detach()
        if not bool((gain == (0.0 if parameters.plus_one else 1.0)).all()):
            raise _BlockedError(
                norm, f"the weight of the norm %{norm.name} is not folded into the linears that read it"
            )
    stream.norms.append(norm)
    if shift is not None:
        stream.shifts[Part(shift, 0)] = norm
    stream.heads |= dict.fromkeys(heads, parameters if isinstance(parameters, Norm) else None)
    for linear in linears if not heads else ():
        _reader(stream, linear)


def _heads_behind(
    norm: fx.Node, linears: list[fx.Node], shared: Collection[fx.Node], *, shifted: bool
) -> list[fx.Node]:
    """The linears behind a norm that share the table: all or none, since its weight acts on the one, and is folded into
    the other."""
    heads = [linear for linear in linears if linear in shared]
    if heads and (len(heads) < len(linears) or shifted):
        raise _BlockedError(norm, f"%{heads[0].name} shares the table, and is not all that the norm %{norm.name} feeds")
    return heads


def _other(value: fx.Node, shift: str) -> Any:
    """The operand of an addition that is not the vector `shift`."""
    return next(x for x, held in m.orders(value) if str(getattr(m.skip_casts(held), "target", "")) == shift)


def _reader(stream: Stream, node: fx.Node) -> None:
    weight = sites.weight_of(node)
    if isinstance(weight, str):
        raise _BlockedError(node, f"%{node.name} reads it, and {weight}")
    stream.readers[Part(weight.weight, weight.inp)] = node


def _is_plain(node: fx.Node) -> bool:
    """A linear that reads a stored weight as it is."""
    weight = node.args[1] if graph.schema_name(node) == "aten::linear" else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _table(head: fx.Node) -> Any:
    return head.args[1].target  # type: ignore[union-attr]


def _check_heads(stream: Stream, shared: Collection[fx.Node]) -> None:
    """Who shares a table of this stream reads this stream, and who reads it shares a table of its own, always behind
    the same norm."""
    tables = {part.weight for part in stream.writers}
    norms: dict[str, Norm | None] = {}
    for node in shared:
        if (_table(node) in tables) != (node in stream.heads):
            raise _BlockedError(node, f"%{node.name} shares a table of another stream")
        if node in stream.heads and norms.setdefault(graph.fqn_of(node), stream.heads[node]) != stream.heads[node]:
            raise _BlockedError(node, f"%{node.name} shares the table, and is called behind another norm, too")
