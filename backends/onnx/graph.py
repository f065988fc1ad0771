"""From the nodes of a stage to an ONNX model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import sympy
import torch
from onnx import helper
from torch import Tensor, fx

from qfx import processor
from qfx.backends.onnx.branch import read_by
from qfx.backends.onnx.build import MICROSOFT, OPSET, Builder, Later
from qfx.backends.onnx.gqa import TOTAL
from qfx.backends.onnx.in_place import in_place
from qfx.backends.onnx.partition import Stage
from qfx.backends.onnx.session_options import apart
from qfx.backends.onnx.symbols import UnresolvedError
from qfx.backends.onnx.table import EMIT, bound_arguments, op_key
from qfx.backends.onnx.values import ONNX_TYPE, Value, computed, dim_of, dims_of, is_number
from qfx.errors import Note
from qfx.passes.kv_cache import shared

# The IR version that ONNX Runtime 1.31 and its predecessors read.
IR_VERSION = 10
SizeOf = tuple[fx.Node, int | None]  # a tensor and one of its dimensions, or an integer (None)


@dataclass
class StageModel:
    """A model, the weights that stay outside of it, what to feed it and what it gives.

    inputs: nodes, in the order of the model's inputs. sizes: further integer inputs after them.
    outputs: the nodes whose values the model's outputs are. in_place: outputs that may be written into an input.
    fused: nodes that the kernel of another node computes as well, by their names.
    """

    model: onnx.ModelProto
    weights: dict[str, Tensor]
    inputs: list[fx.Node]
    sizes: list[SizeOf]
    outputs: list[fx.Node]
    notes: list[Note]
    in_place: dict[int, int]
    fused: dict[str, str] = field(default_factory=dict)


class _StandIn(Builder):
    """A builder in which every argument and every symbol is known: to see whether a node has an ONNX form."""

    def raw(self, name: str, element: int, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
        return Value(name, torch.uint8, shape)

    def derived(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
        return Value(name, dtype, shape)

    def weight(self, tensor: Tensor, name: str, key: Any = None) -> Value:
        return Value(name, computed(tensor.dtype), tuple(tensor.shape))

    def value_of(self, node: fx.Node) -> Any:
        fake = self.tensor(node) if node.op == "get_attr" else node.meta.get("val")
        if isinstance(fake, Tensor):
            return Value(node.name, computed(fake.dtype), dims_of(fake.shape))
        if isinstance(fake, tuple | list):
            return tuple(self._part(f"{node.name}.{i}", one) for i, one in enumerate(fake))
        return super().value_of(node)

    def _part(self, name: str, fake: Any) -> Value | None:
        """One of several outputs; None where it is no tensor: an operator that changes its input may give nothing."""
        return Value(name, computed(fake.dtype), dims_of(fake.shape)) if isinstance(fake, Tensor) else None


def reason_against(gm: fx.GraphModule, node: fx.Node, runtime: str = "session") -> str | None:
    """Why a call_function node has no ONNX form; None where it has one."""
    builder = _StandIn(gm, runtime)
    fakes = [n.meta.get("val") for n in [node, *node.all_input_nodes] if n.op != "get_attr"]
    for symbol in {s for f in fakes for s in _symbols(f)}:
        builder.symbols.known[symbol] = Value(str(symbol), torch.int64, (1,))
    unknown = next((f for f in _tensors(fakes) if f.dtype not in ONNX_TYPE), None)
    if unknown is not None:
        return f"no ONNX type for {unknown.dtype}"
    try:
        emit_node(builder, node)
    except (NotImplementedError, UnresolvedError) as error:
        return str(error)
    return None


def emit_node(b: Builder, node: fx.Node) -> None:
    """Lower one call_function node. Raises NotImplementedError or UnresolvedError where it has no ONNX form."""
    b.node = node
    fake = node.meta.get("val")
    if node.target is operator.getitem:
        source = b.value_of(node.args[0])  # type: ignore[arg-type]
        b.values[node] = source[node.args[1]]
        return
    key = op_key(node.target)
    if key not in EMIT:
        if is_number(fake):
            b.dim(dim_of(fake))
            return
        inner = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args else None
        raise NotImplementedError(f"no ONNX form for {inner if isinstance(inner, torch._ops.OpOverload) else key}")
    args, keywords = bound_arguments(node)
    given = {k: _argument(b, v) for k, v in keywords.items()}
    b.values[node] = b.finish(EMIT[key](b, *[_argument(b, a) for a in args], **given))
    for value, one in zip(_as_list(b.values[node]), _as_list(fake), strict=True):
        _carry_new(b, value, one)


def build_stage(gm: fx.GraphModule, stage: Stage, carriers: dict[sympy.Symbol, SizeOf]) -> StageModel:
    """The ONNX model of an ONNX stage. `carriers`: where symbols can be read that no input of the stage has."""
    b, built = emit_stage(gm, stage, carriers)
    weights = {name: made(weight) for name, weight in b.external.items()}
    if processor.saturates():
        weights |= {new: weights[old] for new, old in apart(built.model.graph).items() if old in weights}
    return replace(built, weights=weights)


def made(weight: Tensor | Later) -> Tensor:
    """A weight that may still have to be made."""
    return weight() if isinstance(weight, Later) else weight


def emit_stage(
    gm: fx.GraphModule,
    stage: Stage,
    carriers: dict[sympy.Symbol, SizeOf],
    runtime: str = "session",
    *,
    prefill: bool = False,
) -> tuple[Builder, StageModel]:
    """The builder of a stage, whose `external` weights are not all made yet, and the model without weights."""
    b = Builder(gm, runtime, prefill=prefill)
    for node in stage.inputs:
        _declare(b, node)
    _cached_lengths(b, gm, stage)
    sizes = _missing_sizes(b, stage, carriers)
    for node in stage.nodes:
        emit_node(b, node)
    b.node = None
    taken = {i.name for i in b.inputs}
    for node in stage.outputs:
        _output(b, node, taken)
    model = StageModel(
        model=_model(b),
        weights={},
        inputs=list(stage.inputs),
        sizes=sizes,
        outputs=list(stage.outputs),
        notes=b.notes,
        in_place=in_place(gm, stage.inputs, stage.outputs),
        fused=b.fused,
    )
    return b, model


def _argument(b: Builder, argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        if argument.op == "get_attr" and b.tensor(argument).dtype not in ONNX_TYPE:
            return _foreign(b, argument)
        if argument.op == "get_attr" and argument not in b.values and not isinstance(b, _StandIn):
            name = str(argument.target)
            b.values[argument] = b.weight(b.tensor(argument), name)
        return b.value_of(argument)
    if isinstance(argument, list | tuple):
        return [_argument(b, a) for a in argument]
    if isinstance(argument, torch.SymInt | torch.SymFloat):
        return dim_of(argument)
    return argument


def _foreign(b: Builder, node: fx.Node) -> None:
    """Packed tensors of types that ONNX has not (float8): qfx's own operators read them at lowering, others cannot."""
    assert b.node is not None
    if not op_key(b.node.target).startswith("qfx."):
        raise NotImplementedError(f"no ONNX type for {b.tensor(node).dtype}")


def _outside(b: Builder, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an input or output. A file takes and gives f32 for f16 and bf16: it computes in f32, and numpy, by
    which programs feed it, knows no bf16."""
    return computed(dtype) if b.portable else dtype


def _declare(b: Builder, node: fx.Node) -> None:
    """A graph input for a value from outside the stage."""
    fake = node.meta["val"]
    name = node.name
    if isinstance(fake, Tensor):
        dtype = _outside(b, fake.dtype)
        b.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], [_label(d) for d in dims_of(fake.shape)]))
        value = b.cast(Value(name, dtype, dims_of(fake.shape)), computed(dtype))
        b.values[node] = value
        for axis, size in enumerate(value.dims):
            b.symbols.carry(size, _reader(b, value, axis))
    elif is_number(fake):
        dtype = torch.float64 if isinstance(fake, torch.SymFloat | float) else torch.int64
        b.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], [1]))
        size = dim_of(fake)
        if not isinstance(size, int | float):
            b.symbols.known[size] = Value(name, dtype, (1,))
    else:
        b.inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []))
        b.values[node] = Value(name, torch.bool, ())


def _cached_lengths(b: Builder, gm: fx.GraphModule, stage: Stage) -> None:
    """The number of cached tokens is that of the mask less that of the new ones: a cache's memory may be longer."""
    past = shared(gm)
    if not past:
        return
    inputs = {node.name: node for node in stage.inputs}
    total, new = (_reader(b, b.values[inputs[past[key]]], 1)() for key in ("total", "new"))
    b.memo[TOTAL] = Value(total.name, torch.int64, (1,))
    length = Value(b.op("Sub", total, new).name, torch.int64, (1,))
    for name in past["names"]:
        symbol = dims_of(inputs[name].meta["val"].shape)[2]
        if isinstance(symbol, sympy.Symbol):
            b.symbols.known[symbol] = length


def _reader(b: Builder, value: Value, axis: int) -> Callable[[], Value]:
    return lambda: b.op("Shape", value, dtype=torch.int64, start=axis, end=axis + 1)


def _missing_sizes(b: Builder, stage: Stage, carriers: dict[sympy.Symbol, SizeOf]) -> list[SizeOf]:
    """Integer inputs for symbols that the stage uses, does not make itself, and no input of it carries."""
    made = {s for n in stage.nodes for s in _symbols(n.meta.get("val")) if carriers.get(s, (None,))[0] is n}
    needed = {s for n in stage.nodes for s in _symbols(n.meta.get("val"))}
    missing = sorted((s for s in needed - made if s not in b.symbols.sources and s not in b.symbols.known), key=str)
    sizes = []
    for symbol in missing:
        if symbol not in carriers:
            continue
        name = f"size_{symbol}"
        b.inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]))
        b.symbols.known[symbol] = Value(name, torch.int64, (1,))
        sizes.append(carriers[symbol])
    return sizes


def _carry_new(b: Builder, value: Any, fake: Any) -> None:
    """Sizes that depend on data (nonzero, item) are read from the value that has them."""
    if isinstance(fake, Tensor):
        for axis, size in enumerate(value.dims):
            if isinstance(size, sympy.Symbol) and size not in b.symbols.sources and size not in b.symbols.known:
                b.symbols.carry(size, _reader(b, value, axis))
    elif isinstance(fake, torch.SymInt | torch.SymFloat) and isinstance(value, Value):
        b.symbols.known[fake.node.expr] = value


def _output(b: Builder, node: fx.Node, taken: set[str]) -> None:
    """A graph output with a name of its own, in the dtype that torch gives the value (a file: see `_outside`)."""
    fake = node.meta["val"]
    if is_number(fake):
        value = b.dim(dim_of(fake))
        dtype, shape = value.dtype, [1]
    else:
        value = _argument(b, node)
        dtype = _outside(b, fake.dtype) if isinstance(fake, Tensor) else value.dtype
        shape = [_label(d) for d in value.dims]
    if value.dtype != dtype:
        value = b.cast(value, dtype)
    if value.name in taken or value.name in b.initializers:
        value = b.op("Identity", value)
    taken.add(value.name)
    b.outputs.append(helper.make_tensor_value_info(value.name, ONNX_TYPE[dtype], shape))


def _model(b: Builder) -> onnx.ModelProto:
    used = {o.name for o in b.outputs}
    nodes = []
    for node in reversed(b.nodes):
        if used.intersection(node.output):
            nodes.append(node)
            used.update(read_by(node))
    kept = [t for name, t in b.initializers.items() if name in used]
    graph = helper.make_graph(nodes[::-1], "qfx", b.inputs, b.outputs, kept)
    b.external = {name: tensor for name, tensor in b.external.items() if name in used}  # and drop the rest
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qfx")


def _label(size: Any) -> Any:
    return size if isinstance(size, int) else str(size).replace(" ", "")


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _tensors(fakes: Sequence[Any]) -> list[Tensor]:
    return [t for f in fakes for t in _as_list(f) if isinstance(t, Tensor)]


def _symbols(fake: Any) -> set[sympy.Symbol]:
    """Free symbols of a fake value's sizes."""
    found: set[sympy.Symbol] = set()
    for one in _as_list(fake):
        sizes = (
            one.shape if isinstance(one, Tensor) else [one] if isinstance(one, torch.SymInt | torch.SymFloat) else []
        )
        for size in sizes:
            if isinstance(size, torch.SymInt | torch.SymFloat):
                found |= size.node.expr.free_symbols
    return found


def carriers_of(gm: fx.GraphModule) -> dict[sympy.Symbol, SizeOf]:
    """For each symbol the first value that carries it: (tensor, dimension), or (integer, None)."""
    found: dict[sympy.Symbol, SizeOf] = {}
    for node in gm.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, torch.SymInt) and isinstance(fake.node.expr, sympy.Symbol):
            found.setdefault(fake.node.expr, (node, None))
        elif isinstance(fake, Tensor):
            for axis, size in enumerate(dims_of(fake.shape)):
                if isinstance(size, sympy.Symbol):
                    found.setdefault(size, (node, axis))
    return found
