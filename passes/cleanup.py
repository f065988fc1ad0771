"""What does nothing goes, and what says one thing in several ways says it in one, so that equal graphs print equally.

    %dropout: f32[2,4] = aten.dropout(%x, 0.1, False)
    %add: f32[2,4] = aten.add.Tensor(%dropout, 0)
    %clone: f32[2,4] = aten.clone(%add, memory_format=torch.contiguous_format)
    %view: f32[8] = aten.view(%clone, [8])
    %layer_norm: f32[8] = aten.layer_norm(%view, [8], @w, @b, 1e-05, False)
    ->
    %reshape: f32[8] = aten.reshape(%x, [8])
    %layer_norm: f32[8] = aten.layer_norm(%reshape, [8], @w, @b)

Afterwards a graph has `aten.reshape` where it had view or _unsafe_view, which need strides that rewrites do not keep;
sizes of equal expression come from one node; identical calls are made once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val
from qfx.passes import _match as m
from qfx.passes._build import matched, replace, replace_by_number

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default)
_VIEWS = (*m.RESHAPES, *m.TRANSPOSES, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default)
# What gives its operand or a view of it in torch, too, where it does nothing; all else gives memory of its own.
_SHARING = {*_VIEWS, *_SQUEEZES, *_DROPOUTS, aten.alias.default, aten.detach.default}
# Arguments that change how something is computed or placed, not its value, with the values that mean "as usual".
_IRRELEVANT = {"cudnn_enable": (True, False), "cudnn_enabled": (True, False), "pin_memory": (None, False)}


def cleanup(gm: fx.GraphModule, *, training: bool = False) -> bool:
    """Drop what does nothing and bring calls to one spelling. `training` keeps detach, which gradients see."""
    changed = 0
    seen: dict[Any, fx.Node] = {}
    keeps = set(gm.meta.get("qfx_mutations", {}).values())
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            if isinstance(val(node), torch.SymInt):
                seen.setdefault(_size_key(node), node)
            continue
        number = m.known(val(node))
        if isinstance(number, int) and isinstance(val(node), torch.SymInt):
            replace_by_number(node, number)
            changed += 1
            continue
        changed += _canonical_arguments(node) + _one_spelling(node)
        same = _identity(node, training)
        if same is None or (node.target not in _SHARING and _escapes(node, same, keeps)):
            same = _earlier(node, seen)
        if same is not None and same is not node:
            replace(node, same)
            changed += 1
    return matched(gm, "cleanup", changed)


def _identity(node: fx.Node, training: bool) -> Any:
    """What `node` equals for all inputs: its operand; None where it computes something."""
    x = node.args[0] if node.args else None
    if node.target is aten.cat.default:
        return _single_operand(node)
    if not isinstance(x, fx.Node) or not isinstance(val(x), Tensor) or not isinstance(val(node), Tensor):
        return None
    if node.target in _DROPOUTS:
        return x if node.args[2] is False or node.args[1] == 0 else None
    if node.target is aten.alias.default or (node.target is aten.detach.default and not training):
        return x
    if node.target in (*_COPIES, *m.CASTS):
        return x if m.dtype(x) == m.dtype(node) and val(x).device == val(node).device else None
    return _same_elements(node, x)


def _same_elements(node: fx.Node, x: fx.Node) -> Any:
    """What `node` equals where it only turns, cuts, reshapes or adds nothing to its operand x."""
    if node.target is aten.transpose.int and is_call(x, aten.transpose.int) and _swaps(node) == _swaps(x):
        return x.args[0]
    if node.target in _SQUEEZES:  # x.squeeze(1).unsqueeze(1)
        x = m.skip(x, *_SQUEEZES)
        return x if m.same_sizes(m.shape(x), m.shape(node)) else None
    if m.dtype(x) != m.dtype(node) or not m.same_sizes(m.shape(x), m.shape(node)):
        return None
    if node.target in (aten.expand.default, *m.RESHAPES):
        return x
    if node.target is aten.slice.Tensor:
        return x if len(node.args) < 5 or node.args[4] == 1 else None
    return _neutral(node)


def _swaps(node: fx.Node) -> set[int]:
    return {d % m.rank(node) for d in node.args[1:3] if isinstance(d, int)}


def _neutral(node: fx.Node) -> Any:
    """x of x + 0, x - 0, x * 1, x / 1."""
    for targets, neutral in ((m.ADD, 0.0), (m.SUB, 0.0), (m.MUL, 1.0), (m.DIV, 1.0)):
        if m.plain_binary(node, *targets) and m.number(node.args[1]) == neutral:
            return node.args[0]
    return None


def _single_operand(node: fx.Node) -> Any:
    """The operand of a concatenation in which all others are empty (a cache's first step); else drop the empty ones."""
    parts, rest = node.args[0], node.args[1:]
    assert isinstance(parts, list | tuple)
    dim = rest[0] if rest else 0
    assert isinstance(dim, int)
    full = [p for p in parts if not _is_empty(p, dim, m.rank(node))]
    if not full or len({m.dtype(p) for p in parts}) > 1:
        return None
    if len(full) == 1:
        return full[0]
    if len(full) < len(parts):
        node.args = (full, *rest)
    return None


def _is_empty(part: Any, dim: int, rank: int) -> bool:
    sizes = m.shape(part)
    legacy = len(sizes) == 1 and rank > 1
    return bool(sizes) and m.same_size(sizes[0 if legacy else dim], 0)


def _escapes(node: fx.Node, source: fx.Node, keeps: set[str]) -> bool:
    """Would an output share memory with an input, parameter or other output were `node`, whose own is new, dropped?"""
    below: Any = node
    root: Any = source
    shared = _reaches_output(root, node)
    while is_call(root, *_VIEWS):
        below, root = root, root.args[0]
        shared = shared or _reaches_output(root, below)
    if root.op == "placeholder" and root.name in keeps:
        return True
    return (shared or root.op in ("placeholder", "get_attr")) and _reaches_output(node)


def _reaches_output(node: fx.Node, besides: fx.Node | None = None) -> bool:
    """Is a node or a view of it an output, on a path that does not start at `besides`?"""
    users = [user for user in node.users if user is not besides]
    return any(user.op == "output" or (is_call(user, *_VIEWS) and _reaches_output(user)) for user in users)


def _one_spelling(node: fx.Node) -> int:
    """view becomes reshape, of several reshapes only the last stays; a permute of two becomes transpose."""
    if node.target is aten.permute.default:
        return _as_transpose(node)
    if node.target is aten.type_as.default and val(node.args[0]).device == val(node).device:
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": m.dtype(node)}
        return 1
    if node.target not in m.RESHAPES:
        return 0
    inner = m.skip(node.args[0], *m.RESHAPES)
    changed = node.target is not aten.reshape.default or inner is not node.args[0]
    node.target = aten.reshape.default
    node.args = (inner, node.args[1])
    return int(changed)


def _as_transpose(node: fx.Node) -> int:
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    order = [d % len(dims) for d in dims]  # type: ignore[operator]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) != 2:
        return 0
    node.target = aten.transpose.int
    node.args = (node.args[0], *moved)
    return 1


def _canonical_arguments(node: fx.Node) -> int:
    """Arguments in the order of the schema, positional where they may be, without trailing defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    given = {**{a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}, **node.kwargs}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    wanted = 0
    for argument in node.target._schema.arguments:
        value = given.get(argument.name, argument.default_value)
        usual = argument.name not in given or _is_default(argument, value)
        if argument.kwarg_only:
            if not usual:
                kwargs[argument.name] = value
            continue
        args.append(argument.default_value if usual and argument.has_default_value() else value)
        if not usual or not argument.has_default_value():
            wanted = len(args)
    before = (tuple(node.args), dict(node.kwargs))
    node.args, node.kwargs = tuple(args[:wanted]), kwargs
    return int(before != (tuple(node.args), dict(node.kwargs)))


def _is_default(argument: Any, value: Any) -> bool:
    if isinstance(value, fx.Node) or not argument.has_default_value():
        return False
    if argument.name in _IRRELEVANT and value in _IRRELEVANT[argument.name]:
        return True
    default = argument.default_value
    return bool(type(value) is type(default) and value == default)


def _size_key(node: fx.Node) -> Any:
    return ("size", str(val(node).node.expr))


def _earlier(node: fx.Node, seen: dict[Any, fx.Node]) -> fx.Node | None:
    """An earlier node that gives the same: a size of equal expression, or the same call."""
    if isinstance(val(node), torch.SymInt):
        return seen.setdefault(_size_key(node), node)
    if not _is_pure(node) or any(user.op == "output" for user in node.users):
        return None
    key = (node.target, _frozen(node.args), _frozen(node.kwargs))
    return seen.setdefault(key, node)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    random = torch.Tag.nondeterministic_seeded in target.tags or torch.Tag.nondeterministic_bitwise in target.tags
    return target.namespace == "aten" and not random and "empty" not in target._opname and not node.is_impure()


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return value if isinstance(value, fx.Node) else (type(value), value)
