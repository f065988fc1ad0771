"""Which function lowers which operator. One table, put together from the files by theme."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.backends.onnx import (
    activation,
    attention,
    create,
    embedding,
    gqa,
    index,
    math,
    moe,
    nn,
    qmoe,
    quant,
    quantized_attention,
    quantized_kv,
    reduce,
    resize,
    rotation,
    shapes,
    special,
)
from qfx.backends.onnx.math import Emit

EMIT: dict[str, Emit] = {
    **math.EMIT,
    **shapes.EMIT,
    **special.EMIT,
    **create.EMIT,
    **reduce.EMIT,
    **resize.EMIT,
    **index.EMIT,
    **nn.EMIT,
    **activation.EMIT,
    **attention.EMIT,
    **gqa.EMIT,
    **quantized_attention.EMIT,
    **quantized_kv.EMIT,
    **moe.EMIT,
    **qmoe.EMIT,
    **quant.EMIT,
    **embedding.EMIT,
    **rotation.EMIT,
}


def op_key(target: Any) -> str:
    """`aten.add.Tensor`, or the plain name of a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def bound_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the order of the operator's schema, defaults filled in, and its keyword-only arguments.

    What only says where and how memory lies (device, layout, ...) is left out, as is the dtype: the fake result has it.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    values: list[Any] = []
    keywords: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
        if not argument.kwarg_only:
            values.append(value)
        elif argument.name not in _MEMORY:
            keywords[argument.name] = value
    return values, keywords


_MEMORY = {"dtype", "layout", "device", "pin_memory", "memory_format", "generator"}
