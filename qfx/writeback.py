"""Write a plan into the live module by FQN: rewrites applied, weights packed, one at a time.

A layout says how the module holds the weight that the graph saw: `linear` [N, K], `transposed` [K, N], `embedding`,
`patch` (a convolution kernel used as a linear), `experts` [E, N, K], `experts-transposed` [E, K, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.errors import Note, UnsupportedError, explain
from qfx.format import Format
from qfx.modules import QuantConv, QuantEmbedding, QuantLinear, pack_parameter
from qfx.packing import Packed
from qfx.passes.rewrites import apply_record
from qfx.plan import Plan
from qfx.rounding import round_weight


def layout_of(node: fx.Node) -> str:
    """How the module holds the weight of a linear-like node."""
    if graph.schema_name(node) == "aten::embedding":
        return "embedding"
    weight = graph.weight_of(node)
    assert weight is not None
    operand = node.args[1]
    assert isinstance(operand, fx.Node)
    shape, held = tuple(operand.meta["val"].shape), tuple(weight.meta["val"].shape)
    swapped = _transposes(operand) % 2 == 1
    if graph.schema_name(node) == "qfx::grouped_linear":
        return "experts-transposed" if swapped else "experts"
    if len(held) > 2:
        return "patch" if not swapped and torch.Size(held[1:]).numel() == shape[-1] else "unknown"
    return "transposed" if swapped else "linear"


def write_back(model: nn.Module, plan: Plan) -> tuple[nn.Module, list[Note]]:
    """Quantize `model` in place by its plan; returns it (or its replacement where it is a bare nn.Linear) and notes.

    Raises UnsupportedError, before anything is changed, where a planned name cannot be written back.
    """
    sites = {fqn: _site(model, fqn, plan) for fqn, roles in plan.annotations.items() if "w" in roles}
    for record in plan.rewrites:
        apply_record(model, record, plan.tensors)
    packed: dict[Any, Packed] = {}
    notes: list[Note] = []
    for fqn, (owner, leaf) in sites.items():
        replacement = _write(model, owner, leaf, fqn, plan, packed, notes)
        if replacement is not None:
            model = replacement
    _share_tables(model, packed)
    return model, notes


def _share_tables(model: nn.Module, packed: Mapping[Any, Packed]) -> None:
    """Other modules that hold a table which was packed under another name (T5's `shared`) get the packed one, too."""
    tables = {pointer: p for (pointer, _, transposed), p in packed.items() if not transposed}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            weight = module._parameters.get("weight")
            if not isinstance(module, nn.Embedding) or weight is None or weight.data_ptr() not in tables:
                continue
            table = tables[weight.data_ptr()]
            new = _table(module, table)
            if new is None:
                pack_parameter(module, "weight", table)
            else:
                setattr(parent, name, new.train(module.training))


def _table(module: nn.Module, packed: Packed) -> QuantEmbedding | None:
    """The packed embedding in place of an nn.Embedding; None where its own forward must stay."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return None
    return None if module.max_norm is not None else QuantEmbedding(packed, module.padding_idx, dtype=module.weight.dtype)


def _site(model: nn.Module, fqn: str, plan: Plan) -> tuple[str, str]:
    """Owner module and name of the parameter that a planned FQN means."""
    for owner, leaf in ((fqn, "weight"), tuple(fqn.rpartition(".")[::2])):
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(module._parameters.get(leaf), Tensor) and plan.layouts.get(fqn) != "unknown":
            _check_smooth(module, fqn, leaf, plan)
            return owner, leaf
    raise UnsupportedError(
        explain(
            f"{fqn!r} cannot be written back into the live module",
            expected=f"a parameter of {type(model).__name__} under that name, used as a linear weight or a table",
            found=f"layout {plan.layouts.get(fqn, 'not known')!r} and no such parameter",
            next_step="add the name to the recipe's ignore list, or quantize the graph with torch.compile(backend='qfx')",
        )
    )


def _check_smooth(module: nn.Module, fqn: str, leaf: str, plan: Plan) -> None:
    """An explicit division of the input needs a module that can be replaced by one that divides."""
    if f"{fqn}/smooth" in plan.tensors and not (leaf == "weight" and _is_linear(module, plan.layouts.get(fqn, "linear"))):
        raise UnsupportedError(
            explain(
                f"the plan divides the input of {fqn!r}, which {type(module).__name__} feeds by itself",
                expected="an nn.Linear or Conv1D that can be replaced",
                next_step="add the name to the recipe's ignore list and plan again",
            )
        )


def _write(
    model: nn.Module, owner: str, leaf: str, fqn: str, plan: Plan, packed: dict[Any, Packed], notes: list[Note]
) -> nn.Module | None:
    module = model.get_submodule(owner)
    weight = module._parameters[leaf]
    assert weight is not None
    layout = plan.layouts.get(fqn, "linear")
    fmt, x = plan.formats(fqn)["w"], plan.formats(fqn).get("x")
    assert isinstance(fmt, Format) and not isinstance(x, tuple)
    value = _oriented(weight.detach(), layout)
    key = (weight.data_ptr(), str(fmt), layout.endswith("transposed"))
    if key not in packed:
        packed[key] = round_weight(value, fmt, plan.recipe.rounding, name=fqn)
    new = _replacement(module, layout, packed[key], x, fqn, plan) if leaf == "weight" else None
    if new is None:
        static = x is not None and not x.dynamic
        if static or (x is not None and not layout.startswith("experts")):
            notes.append(
                Note(fqn, f"{type(module).__name__} reads its weight itself: runs weight-only, not x={x}", "see the report")
            )
        hint = str(x) if x is not None and x.dynamic else ""
        pack_parameter(module, leaf, packed[key], transposed=layout.endswith("transposed"), x_format=hint)
        return None
    if not owner:
        return new
    parent, _, name = owner.rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(module.training))
    return None


def _replacement(module: nn.Module, layout: str, packed: Packed, x: Format | None, fqn: str, plan: Plan) -> nn.Module | None:
    """The quantized module that takes the place of a float one; None where its own forward must stay."""
    dtype = module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    bias = module._parameters.get("bias")
    kind = type(module)
    if layout == "embedding":
        return _table(module, packed)
    tensors = {leaf: plan.tensors.get(f"{fqn}/{leaf}") for leaf in ("x_scale", "x_zero", "smooth")}
    formats: dict[str, Any] = {"x_format": str(x) if x else "", "dtype": dtype, **tensors}
    if layout == "patch":
        return QuantConv(packed, module, **formats) if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) else None
    return QuantLinear(packed, bias, **formats) if _is_linear(module, layout) else None


def _is_linear(module: nn.Module, layout: str) -> bool:
    """nn.Linear with its own forward, or a Conv1D: a leaf module of a [K, N] weight and a bias, called with x alone."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return layout == "transposed" and not list(module.children()) and set(module._parameters) == {"weight", "bias"}


def _oriented(weight: Tensor, layout: str) -> Tensor:
    if layout.endswith("transposed"):
        return weight.transpose(-2, -1).contiguous()
    return weight.flatten(1) if layout == "patch" else weight


def _transposes(node: fx.Node) -> int:
    count = 0
    while node.op == "call_function":
        name = graph.op_name(node)
        if name in ("t", "transpose"):
            count += 1
        elif name == "permute":
            count += list(node.args[1]) != list(range(len(node.args[1])))  # type: ignore[arg-type]
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node = inner
    return count
