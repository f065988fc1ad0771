"""Small questions for matching by hand: what a call does, whichever overload or argument order spells it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val

aten = torch.ops.aten

ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)
POW = (aten.pow.Tensor_Scalar,)
CASTS = (aten._to_copy.default, aten.to.dtype)
SAME_VALUE = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def skip(node: Any, *targets: Any) -> Any:
    """Walk up through calls of `targets` by their first argument."""
    while is_call(node, *targets):
        node = node.args[0]
    return node


def skip_casts(node: Any) -> Any:
    """Walk up through casts and copies."""
    return skip(node, *CASTS, *SAME_VALUE)


_WIDER: dict[torch.dtype | None, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def skip_upcasts(node: Any) -> Any:
    """Walk up through casts that lose nothing."""
    while is_call(node, *CASTS, *SAME_VALUE):
        source = node.args[0]
        if dtype(source) != dtype(node) and dtype(node) not in _WIDER.get(dtype(source), ()):
            break
        node = source
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The one call that reads a node; None where there are more, or it is an output."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def number(value: Any) -> float | None:
    """A constant: a Python number, or a node that fills a tensor with one. None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    value = skip_casts(value)
    if is_call(value, aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
        return number(value.args[0 if value.target is aten.scalar_tensor.default else 1])
    return None


def is_number(value: Any, expected: float) -> bool:
    """Is it this constant, to one part in a million?"""
    found = number(value)
    return found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=0.0)


def plain_binary(node: Any, *targets: Any) -> bool:
    """Is it such a call with alpha 1 and without a rounding mode?"""
    return is_call(node, *targets) and is_number(node.kwargs.get("alpha", 1), 1.0) and len(node.args) == 2


def orders(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both orders of the operands of a commutative call."""
    a, b = node.args[:2]
    yield a, b
    yield b, a


def with_constant(node: Any, *targets: Any) -> tuple[fx.Node, float] | None:
    """(tensor, constant) of a commutative call of a tensor and a constant."""
    if not plain_binary(node, *targets):
        return None
    for a, b in orders(node):
        constant = number(b)
        if constant is not None and isinstance(a, fx.Node) and isinstance(val(a), Tensor):
            return a, constant
    return None


def scaled(node: Any) -> tuple[fx.Node, float] | None:
    """(tensor, factor) of a multiplication or division by a constant."""
    found = with_constant(node, *MUL)
    if found is None and plain_binary(node, *DIV):
        divisor = number(node.args[1])
        if divisor and isinstance(node.args[0], fx.Node):
            found = node.args[0], 1.0 / divisor
    return found


def operand(node: Any, test: Callable[[Any], bool], *targets: Any) -> tuple[Any, Any] | None:
    """(operand that passes the test, the other one) of a commutative call, whichever side it stands on."""
    if not plain_binary(node, *targets):
        return None
    return next(((a, b) for a, b in orders(node) if test(a)), None)


def known(size: Any) -> Any:
    """A size as a plain number where it is known (a symbol may have been specialised to one), else as it is."""
    found = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if found is None else found


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor, as plain numbers where known; () where it has none."""
    value = val(node)
    return tuple(known(size) for size in value.shape) if isinstance(value, Tensor) else ()


def rank(node: Any) -> int:
    """Number of dimensions of a node's tensor; -1 where it has none."""
    value = val(node)
    return value.dim() if isinstance(value, Tensor) else -1


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor; None where it has none."""
    value = val(node)
    return value.dtype if isinstance(value, Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes known to be equal? Symbolic sizes are compared by expression, so that no guard is added."""
    a, b = known(val(a)), known(val(b))
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return False
    return bool(a == b)


def same_sizes(a: Any, b: Any) -> bool:
    """Are all sizes of two shapes known to be equal?"""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_last(dim: int, node: Any) -> bool:
    """Does `dim` name the last dimension of a node's tensor?"""
    return dim in (-1, rank(node) - 1)


def elements(part: Any) -> tuple[fx.Node, range] | None:
    """(x, which elements of x's last dimension) of a slice or of a piece of a split; None where a size is a symbol."""
    piece = part.args[1] if is_call(part, operator.getitem) else None
    cut, kinds = (part, (aten.slice.Tensor,)) if piece is None else (part.args[0], _SPLITS)
    if not is_call(cut, *kinds) or (piece or 0) < 0:
        return None
    given = arguments(cut)
    x, dim, sizes = given.pop("self"), given.pop("dim"), given.pop("split_sizes", [])
    width = shape(x)[-1]
    if not is_last(dim, x) or not all(isinstance(each, int | None) for each in (width, *sizes, *given.values())):
        return None
    if piece is None:
        return x, range(width)[given["start"] : given["end"] : given["step"]]
    size = given.get("split_size") or -(-width // given.get("chunks", 1))
    sizes = sizes or [size] * (piece + 1)
    start = sum(sizes[:piece])
    return x, range(width)[start : start + sizes[piece]]


def whole(first: Any, second: Any, *, interleaved: bool = False) -> fx.Node | None:
    """x where two nodes are the first and the second half of its last dimension, however they are cut.

    `interleaved`: where they are its even and its odd elements. None for anything else.
    """
    one, other = elements(first), elements(second)
    if one is None or other is None or one[0] is not other[0]:
        return None
    x, every = one[0], range(shape(one[0])[-1])
    middle = len(every) // 2
    halves = (every[::2], every[1::2]) if interleaved else (every[:middle], every[middle:])
    return x if len(every) % 2 == 0 and (one[1], other[1]) == halves else None
