"""Whether a traced graph computes what the model does at sizes other than the example's.

A forward that looks at a size (`if length % block: pad`) is traced for the branch that the example takes. torch.export
notes such conditions and lets the graph be used anywhere. Here the sizes for which a condition does not hold are tried:
where the branch not taken would have given the same (padding by nothing), the graph is as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.capture import Captured
from qfx.conditions import conditions, hold, is_number, sizes_of
from qfx.errors import Note
from qfx.graph import op_name, val

_MOST = 40  # sizes up to this, or twice the example's, are looked at
_LOOKED_AT = 256  # of longer examples so many of these sizes: a condition of audio takes a second for each thousand
_TRIED = 3
_NEAR = 1e-2  # relative difference of results that rounding of floats may make


def other_sizes(
    captured: Captured, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> list[Note]:
    """A note for each size of an input that varies, and at which the captured graph fails or gives other results, and
    one where only the first axes vary, or none.

    captured: as `capture_export(module, args, kwargs)` gave it. The module is called for sizes of which a condition
    says that they might differ, at most three for each that varies; for most models these are none.
    """
    notes = []
    if captured.fixed:
        what = f"in the file {captured.fixed}"
        notes.append(Note(name, what, "give an example (args=) of the size that is needed", minor=True))
    for symbol, where in _varying(captured).items():
        suspect = _suspects(captured, symbol)
        tried = [suspect[i * (len(suspect) - 1) // max(1, _TRIED - 1)] for i in range(_TRIED)] if suspect else []
        bad = [size for size in dict.fromkeys(tried) if not _holds(captured, module, args, kwargs, symbol, size)]
        if bad:
            example = _values(captured)[symbol]
            what = (
                f"its forward looks at the size of {where}, and the graph holds for sizes like the example's "
                f"({example}) only: not for {', '.join(map(str, bad))}"
            )
            step = "give an example (args=) of the size that is needed, and fill inputs up to it"
            notes.append(Note(name, what, step, minor=True))
    return notes


def fixed_sizes(captured: Captured, name: str) -> list[Note]:
    """A note where the first axis of an input of two axes or more, mostly the batch, or the length of token ids has
    become a number of the graph: torch.export fixes what a forward computes with in Python (a loop over samples, or
    over tokens), and tells nobody.

    captured: as `capture_export(..., dynamic=True)` gave it.
    """
    inputs = [(op_name(n), val(n)) for n in captured.gm.graph.find_nodes(op="placeholder")]
    told = [(x, axis, v.shape[axis]) for x, v in inputs if isinstance(v, Tensor) and v.dim() > 1 for axis in _axes(x)]
    fixed = [(x, axis, int(size)) for x, axis, size in told if is_number(size) and size > 1]
    if captured.fixed or not fixed:
        return []
    what = ", ".join(f"dimension {axis} of {x!r} ({size})" for x, axis, size in fixed)
    reason = f"its forward computes with the size of {what}, which is fixed in the graph"
    return [Note(name, reason, "give an example (args=) of the size that is needed", minor=True)]


def _axes(name: str) -> tuple[int, ...]:
    """The axes of an input that mostly vary: of others the second may be features, or pixels of one size."""
    return (0, 1) if name.endswith("input_ids") else (0,)


def _values(captured: Captured) -> dict[Any, int]:
    """The example's size for each symbol."""
    return sizes_of(captured.environment)


def _varying(captured: Captured) -> dict[Any, str]:
    """Symbol -> the first dimension of an input that it is the size of."""
    found: dict[Any, str] = {}
    for node in captured.gm.graph.nodes:
        value = val(node) if node.op == "placeholder" else None
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if expr is not None and expr.is_Symbol:
                found.setdefault(expr, f"dimension {axis} of {op_name(node)!r}")
    return found


def _suspects(captured: Captured, symbol: Any) -> list[int]:
    """Sizes from 2 on for which a condition of the trace does not hold; of an example of many, some of them."""
    env, values = captured.environment, _values(captured)
    guards = [guard for guard in conditions(env) if symbol in guard.free_symbols]
    span = env.var_to_range[symbol]
    return [
        size
        for size in _looked_at(values[symbol])
        if not (span.lower <= size <= span.upper and hold(guards, {**values, symbol: size}))
    ]


def _looked_at(example: int) -> list[int]:
    """All sizes from 2 to twice the example's; of more than _LOOKED_AT small ones, those around the example, where one
    in each block of up to 64 is, and others spread over the whole."""
    most = max(_MOST, 2 * example)
    if most <= _LOOKED_AT:
        return list(range(2, most + 1))
    part = _LOOKED_AT // 4
    spread = (2 + i * (most - 2) // (part - 1) for i in range(part))
    return sorted({*range(2, 2 + part), *range(example - part, example + part), *spread})


def _holds(
    captured: Captured, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], symbol: Any, size: int
) -> bool:
    """Whether graph and module give the same at this size of a symbol. Where the module fails, the graph may."""
    values = {**_values(captured), symbol: size}
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    nodes = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    for index, node in zip(captured.inputs, nodes, strict=True):
        if isinstance(flat[index], Tensor):
            flat[index] = _resized(flat[index], [_size(s, values) for s in val(node).shape])
    given, named = pytree.tree_unflatten(flat, spec)
    return same_as(captured, module, given, named)


def same_as(captured: Captured, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether graph and module give the same for a call. Where the module fails, the graph may."""
    flat = pytree.tree_leaves((tuple(args), dict(kwargs)))
    try:
        with torch.no_grad():
            wanted = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]
    except Exception:  # noqa: BLE001  (any model's own code)
        return True
    try:
        with torch.no_grad():
            found = [x for x in captured.gm(*(flat[i] for i in captured.inputs)) if isinstance(x, Tensor)]
    except Exception:  # noqa: BLE001  (a trace for other sizes fails in any operator)
        return False
    return len(found) != len(wanted) or all(_near(a, b) for a, b in zip(found, wanted, strict=True))


def _size(size: Any, values: Mapping[Any, int]) -> int:
    expr = size.node.expr if isinstance(size, torch.SymInt) else None
    return int(size) if expr is None else int(expr.xreplace({s: sympy.Integer(v) for s, v in values.items()}))


def _resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Elements of x, again and again where there are more."""
    for axis, size in enumerate(shape):
        if size != x.shape[axis]:
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    same = (a == b) | (a.isnan() & b.isnan())  # scores of what is masked are infinite
    wanted = b.masked_fill(~b.isfinite(), 0)
    return float((a - b).masked_fill(same, 0).double().norm()) <= _NEAR * float(wanted.double().norm()) + 1e-6
