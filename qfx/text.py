"""Stable text of a graph: one node a line, equal graphs print equally.

    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=i8/tok w=i4/g128

Parameters are written inline as `@fqn`; symbolic sizes are named s0, s1, ... in order of appearance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx import annotation

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}


class _Symbols:
    """Canonical names for symbolic sizes, in order of first appearance."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def text(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.names.setdefault(str(symbol), f"s{len(self.names)}")
        replaced = {s: type(s)(self.names[str(s)], integer=True) for s in expression.free_symbols}
        return str(expression.xreplace(replaced)).replace(" ", "")


def dump(gm: fx.GraphModule) -> str:
    """The graph as text: inputs, calls and outputs; the annotation of a node stands behind it as a comment."""
    symbols = _Symbols()
    lines = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        line = f"%{node.name}: {type_text(node.meta.get('val'), symbols)} = {_call(node)}"
        note = annotation.text(node)
        lines.append(f"{line}  # {note}" if note else line)
    return "\n".join(lines) + "\n"


def type_text(value: Any, symbols: _Symbols | None = None) -> str:
    """`f32[2,s0]` for tensors, `int` for sizes, `(a, b)` for several."""
    symbols = symbols or _Symbols()
    if isinstance(value, torch.Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype))}[{','.join(symbols.text(s) for s in value.shape)}]"
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return f"int {symbols.text(value)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(type_text(v, symbols) for v in value)})"
    return type(value).__name__


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        name = f"{target.namespace}.{target._opname}{overload}"
    else:
        name = getattr(target, "__name__", str(target))
    words = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in sorted(node.kwargs.items())]
    return f"{name}({', '.join(words)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    return "end" if value == 2**63 - 1 and isinstance(value, int) else str(value)
