"""What exact rewrites share: records of sites, the parameters behind linears and norms, and who reads a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn

from qfx import graph
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.graph import is_call
from qfx.passes import _match as m

aten = torch.ops.aten
ATTENTION = ("aten::scaled_dot_product_attention", "qfx::attention")

_SAME = (*m.CASTS, *m.SAME_VALUE)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


class Piece:
    """Base of what sites consist of: frozen dataclasses of plain values and tuples of such."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From its part of a record, where tuples may be lists."""
        return cls(**{key: _as_tuple(value) for key, value in record.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Weight(Piece):
    """A linear's weight as it is stored.

    name: FQN of the node. weight: FQN of the tensor. bias: of the bias, if any. inp, out: axes of the input and output
    channels (GPT-2 stores them the other way round; experts have a third axis).
    """

    name: str
    weight: str
    bias: str | None
    inp: int
    out: int


@dataclass(frozen=True)
class Norm(Piece):
    """Parameters of a norm: FQNs of weight and bias; plus_one where the factor is 1 + weight (Gemma)."""

    weight: str
    bias: str | None = None
    plus_one: bool = False


class Record:
    """Base of sites, frozen dataclasses that can be written as JSON-able records and read back."""

    NAME: ClassVar[str] = ""
    NESTED: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    TENSORS: ClassVar[tuple[str, ...]] = ()  # keys of the record that name the tensors which `apply` takes

    def to_record(self) -> dict[str, Any]:
        """{"name": of the rewrite, field: value, ...}."""
        return {"name": self.NAME, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The site of a record; further keys of the record are left alone. ValueError where it is another rewrite's."""
        if record.get("name") != cls.NAME:
            raise ValueError(f"expected a record of {cls.NAME!r}, found {record.get('name')!r}")
        try:
            fields = {
                f.name: record[f.name]
                for f in dataclasses.fields(cls)  # type: ignore[arg-type]
                if f.name in record or f.default is dataclasses.MISSING  # those with a default came later
            }
            for key, value in fields.items():
                build = cls.NESTED.get(key, lambda item: item)
                if isinstance(value, list | tuple):
                    fields[key] = tuple(build(item) for item in value)
                elif value is not None:
                    fields[key] = build(value)
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"a rewrite {cls.NAME!r} of the plan cannot be read: {type(error).__name__}: {error}"
            raise ValueError(explain(what, found=dict(record), next_step="plan again")) from error

    def present(self, module: nn.Module) -> bool:
        """Whether `module` holds the parameters; False for a graph that holds none of them, since it is another part.

        Raises UnsupportedError where only some are there.
        """
        held: list[Any] = []  # Weight, Norm, Part: with a `weight` and perhaps a `bias`
        for key in self.NESTED:
            value = getattr(self, key)
            held += value if isinstance(value, tuple) else [] if value is None else [value]
        names = [name for part in held for name in (part.weight, part.bias) if name is not None]
        missing = [name for name in names if not holds(module, name)]
        if len(missing) == len(names) and isinstance(module, fx.GraphModule):
            return False
        if missing:
            raise UnsupportedError(
                explain(
                    f"the plan's rewrite {self.NAME!r} does not fit the model",
                    expected=", ".join(names),
                    found=f"{', '.join(missing)} missing",
                    next_step="plan again for this model; a model that is compiled in several graphs can be rewritten "
                    "with qfx.quantize instead",
                )
            )
        return True


def holds(module: nn.Module, fqn: str) -> bool:
    """Is there a tensor of this name?"""
    try:
        graph.get_tensor(module, fqn)
    except (AttributeError, AssertionError):
        return False
    return True


def note(node: fx.Node, reason: str, next_step: str = "nothing, or leave the rewrite out of the recipe") -> Note:
    """A refusal."""
    return Note(graph.fqn_of(node), reason, next_step, source_line(node) or "")


def is_linear(node: Any) -> bool:
    """A linear, or a grouped one (experts)."""
    return isinstance(node, fx.Node) and graph.schema_name(node) in ("aten::linear", "qfx::grouped_linear")


def weight_of(node: fx.Node) -> Weight | str:
    """The stored weight of a linear, or the reason why it cannot be edited: computed, tied or used elsewhere, too."""
    source: Any = node.args[1]
    steps: list[fx.Node] = []
    while is_call(source, *_SAME, *m.TRANSPOSES):
        steps.append(source)
        source = source.args[0]
    if not (isinstance(source, fx.Node) and source.op == "get_attr"):
        return (
            "its weight is a convolution's"
            if graph.weight_of(node) is not None
            else "its weight is computed in the graph"
        )
    axes = list(range(m.rank(source)))
    for step in reversed(steps):
        axes = _permuted(axes, step)
    bias = node.args[2] if len(node.args) > 2 and not is_call(node, torch.ops.qfx.grouped_linear.default) else None
    bias = m.skip_casts(bias)
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return "its bias is computed in the graph"
    if foreign := other_user(source, {node}):
        tied = " (the rewrite 'untie' separates them)" if graph.schema_name(foreign) == "aten::embedding" else ""
        return f"its weight {source.target} is also used by %{foreign.name}{tied}"
    if bias is not None and (foreign := other_user(bias, {node})):
        return f"its bias {bias.target} is also used by %{foreign.name}"
    fqn = None if bias is None else str(bias.target)
    return Weight(graph.fqn_of(node), str(source.target), fqn, axes[-1], axes[-2])


def _permuted(axes: list[int], step: fx.Node) -> list[int]:
    if step.target is aten.t.default:
        return axes[::-1]
    if step.target is aten.transpose.int:
        a, b = (int(d) for d in step.args[1:3])  # type: ignore[arg-type]
        axes[a], axes[b] = axes[b], axes[a]
    elif step.target is aten.permute.default:
        return [axes[int(d)] for d in step.args[1]]  # type: ignore[union-attr, arg-type]
    return axes


def other_user(source: fx.Node, allowed: set[fx.Node]) -> fx.Node | None:
    """A node that is not allowed to read the parameter of a get_attr node, and does (transposed or cast, too)."""
    gets = [n for n in source.graph.nodes if n.op == "get_attr" and n.target == source.target]
    todo: list[fx.Node] = [user for get in gets for user in get.users]
    while todo:
        user = todo.pop()
        if user in allowed:
            continue
        if not is_call(user, *_SAME, *m.TRANSPOSES):
            return user
        todo += user.users
    return None


def norm_of(node: fx.Node) -> Norm | str | None:
    """The norm whose result `node` is; None where it is none, a reason where its parameters cannot be edited.

    Seen are layer_norm and rms_norm over the last axis, and a product of one without weight and its gain.
    """
    found = _norm_parts(node)
    if found is None:
        return None
    gain, bias, users = found
    if gain is None:
        return "the norm has no weight"
    plus_one = False
    added = m.skip_casts(gain)
    with_one = m.with_constant(added, *m.ADD)
    if with_one is not None and with_one[1] == 1.0:
        plus_one, gain = True, with_one[0]
        users.add(added)
    gain, bias = m.skip_casts(gain), m.skip_casts(bias)
    for value in (gain, bias):
        if value is None:
            continue
        if not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return "the norm's weight is computed in the graph"
        if foreign := other_user(value, users):
            return f"the norm's {value.target} is also used by %{foreign.name}"
    return Norm(str(gain.target), None if bias is None else str(bias.target), plus_one)


def _norm_parts(node: fx.Node) -> tuple[Any, Any, set[fx.Node]] | None:
    """(weight, bias, nodes that may read them), before anything is looked through."""
    if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        a = m.arguments(node)
        if len(a["normalized_shape"]) != 1:
            return None
        return a["weight"], a.get("bias"), {node}
    if not is_call(node, aten.mul.Tensor):
        return None
    for x, gain in m.orders(node):
        inner = m.skip_casts(x)
        if not is_call(inner, aten.layer_norm.default, aten.rms_norm.default):
            continue
        a = m.arguments(inner)
        if a["weight"] is None and a.get("bias") is None and len(inner.users) == 1 and m.rank(gain) == 1:
            return gain, None, {node}
    return None


def keeps_channels(node: Any) -> bool:
    """Does a call move or pick rows only, so that the last axis of its result is that of its first argument?"""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.args):
        return False
    x = node.args[0]
    rank = m.rank(x)
    if not isinstance(x, fx.Node) or rank < 1:
        return False
    if node.target in _SAME or (node.target in _DROPOUTS and node.args[2] is False):
        return True
    if node.target in m.RESHAPES or is_call(node, aten.expand.default):
        return m.rank(node) >= 1 and m.same_size(m.shape(node)[-1], m.shape(x)[-1])
    if node.target in m.TRANSPOSES:
        order = _permuted(list(range(rank)), node)
        return order[-1] == rank - 1
    if is_call(node, aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.squeeze.dim):
        dim = node.args[1] if len(node.args) > 1 else 0
        return isinstance(dim, int) and dim % rank != rank - 1
    if is_call(node, aten.unsqueeze.default):
        return isinstance(node.args[1], int) and node.args[1] not in (-1, rank)
    if is_call(node, aten.index.Tensor):
        return isinstance(node.args[1], list | tuple) and len(node.args[1]) < rank
    return False


def origin(value: Any) -> Any:
    """Up through calls that only move or pick rows."""
    while keeps_channels(value):
        value = value.args[0]
    return value


def reads_size(node: fx.Node) -> bool:
    """Does a call read only the sizes and the type of its tensor?"""
    name = graph.schema_name(node).removeprefix("aten::")
    return name.startswith(("sym_", "new_")) or name.endswith("_like")


def readers(value: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """(linears whose input the value is, everything else that reads it), through calls that only move rows.

    Who reads only its sizes is left out.
    """
    linears: dict[fx.Node, None] = {}
    others: dict[fx.Node, None] = {}
    todo = [(value, user) for user in value.users]
    while todo:
        at, user = todo.pop(0)
        if reads_size(user):
            continue
        if keeps_channels(user) and user.args[0] is at and user.all_input_nodes.count(at) == 1:
            todo += [(user, further) for further in user.users]
        elif is_linear(user) and user.args[0] is at and at not in (*user.args[1:], *user.kwargs.values()):
            linears[user] = None
        else:
            others[user] = None
    return list(linears), list(others)
