"""`lower`: a graph in normal form to one OpenVINO model, by way of a file of standard ONNX operators."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from qfx import graph
from qfx.annotation import each
from qfx.backends.onnx import lowering as onnx_lowering
from qfx.backends.onnx.export import write
from qfx.backends.onnx.lowering import as_tensor
from qfx.backends.openvino.session import Session, SessionError
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.graph import let_go
from qfx.names import is_within
from qfx.ops.heads import read

_X_FORMAT = 8  # among the arguments of qfx::linear
_FLOATS = ("_f32", "_bf16", "_f16")
_LINEARS = ("aten::linear", "qfx::linear")
# Operations that carry values from one place to another; what computes is told before them.
_MOVES = {"Reorder", "Transpose", "Reshape", "Convert", "Const", "Parameter", "Result", "Input", "Output", "Concat"}


def lower(gm: fx.GraphModule) -> OpenVinoLowered:
    """Lower a graph in normal form to OpenVINO on the CPU.

    Raises UnsupportedError where a node has no form in the standard operators, or OpenVINO does not take the model.
    """
    builder, built = onnx_lowering.build(gm, runtime="standard")
    results: Sequence[Any] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        names = [f"output_{i}" for i in range(len(built.outputs))]
        write(builder, built, path, outputs=names, documents={}, metadata={})
        try:
            session = Session(path)
        except SessionError as error:
            raise UnsupportedError(
                explain(
                    f"the graph cannot be run by OpenVINO: {error.reason}",
                    next_step="leave the option 'backend' out: ONNX Runtime runs it",
                )
            ) from error
    lowered = OpenVinoLowered(gm, built, session, results)
    let_go(gm)
    return lowered


class OpenVinoLowered:
    """A lowered graph: call it with the placeholders' values in order; it returns the outputs as a flat tuple.

    kernels: for each call_function node what executes it, read back from OpenVINO's own model. notes: what runs
    otherwise than the graph says.
    """

    def __init__(self, gm: fx.GraphModule, built: Any, session: Session, results: Sequence[Any]) -> None:
        self._session = session
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        self._names = [n.name for n in calls]
        weights = ((n.name, graph.weight_of(n)) for n in calls)
        self._weights = {name: str(weight.target) for name, weight in weights if weight is not None}
        self._linears = {n.name for n in calls if graph.schema_name(n) in _LINEARS}
        places = {n.name: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
        made = {n.name: i for i, n in enumerate(built.outputs)}
        self._count = len(places)
        self._inputs = [places[n.name] for n in built.inputs]
        self._sizes = [(places[n.name], axis) for n, axis in built.sizes]
        self._numbers = [i for i, n in enumerate(built.outputs) if not isinstance(n.meta["val"], Tensor)]
        self._results = [(made[r.name], None) if isinstance(r, fx.Node) else (None, r) for r in results]
        self.notes = [*built.notes, *self._precision(), *self._in_float(gm)]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run. Raises ValueError where the number of inputs differs from the placeholders."""
        if len(inputs) != self._count:
            raise ValueError(f"expected {self._count} inputs in placeholder order, found {len(inputs)}")
        feeds = [as_tensor(inputs[i]) for i in self._inputs]
        for i, axis in self._sizes:
            feeds.append(as_tensor(inputs[i] if axis is None else inputs[i].shape[axis]))
        values: list[Any] = self._session.run(feeds)
        for i in self._numbers:
            values[i] = values[i].item()
        return tuple([constant if i is None else values[i] for i, constant in self._results])

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Node name -> the OpenVINO kernels that compute it; "" where nothing of it is left."""
        main: dict[str, list[str]] = {name: [] for name in self._names}
        rest: dict[str, list[str]] = {name: [] for name in self._names}
        products: dict[str, list[str]] = {}  # by the weight that each reads
        others: list[str] = []  # of a linear that neither name nor weight tells
        for operation in self._session.executed.get_ordered_ops():
            info = operation.get_rt_info()
            kind, kernel = (_text(info, key) for key in ("layerType", "primitiveType"))
            owners = dict.fromkeys(_owner(name) for name in _text(info, "originalLayersNames").split(","))
            for owner in owners:
                if owner in main:
                    (rest if kind in _MOVES else main)[owner].append(f"{kind} {kernel}".strip())
            if _is_product(kind):
                constants = _constants(operation)
                for weight in constants:
                    products.setdefault(weight, []).append(f"{kind} {kernel}".strip())
                known = any(is_within(held, weight) for held in constants for weight in self._weights.values())
                if kind == "FullyConnected" and not known and self._linears.isdisjoint(owners):
                    others.append(f"{kind} {kernel}".strip())
        for name, weight in self._weights.items():
            if not main[name]:  # OpenVINO gives a product behind a norm the norm's name
                main[name] = [k for held, found in products.items() if is_within(held, weight) for k in found]
            if not main[name] and name in self._linears:  # other constants, too, where it scales them by the norm's
                main[name] = others
        return {name: _told(main[name] or rest[name]) for name in self._names}

    def _precision(self) -> list[Note]:
        kind = self._session.computes_in
        if kind == "f32":
            return []
        reason = f"what is not quantized is computed in {kind}, which OpenVINO chooses on this processor"
        return [Note("graph", reason, "backend='onnx' computes it in f32", minor=True)]

    def _in_float(self, gm: fx.GraphModule) -> list[Note]:
        """Products of rounded operands that OpenVINO computes in float: the same result, without the speed."""
        notes = []
        for node in gm.graph.nodes:
            asked = _integers(node)
            if not asked:
                continue
            kernels = [k for k in self.kernels[node.name].removeprefix("OpenVINO ").split(", ") if _is_product(k)]
            if any(k.lower().endswith(_FLOATS) for k in kernels):
                reason = f"OpenVINO multiplies its {asked} in float: {kernels[0]}"
                step = "take fixed scales (w8a8-static, w8a8-smooth), or leave the option 'backend' out"
                step = step if asked.startswith("x=") else "leave the option 'backend' out"
                notes.append(Note(graph.fqn_of(node), reason, step, source_line(node) or "", minor=True))
        return notes


def _integers(node: fx.Node) -> str:
    """The formats of rounded operands whose products are meant to be of integers; "" where there are none."""
    name = graph.schema_name(node)
    if name == "qfx::linear":
        x = str(node.args[_X_FORMAT] or "")
        return f"x={x}" if _of_integers(x) else ""
    if name != "qfx::quantized_attention":
        return ""
    texts = {role: str(text) for role, text in zip("qkvp", node.args[-4:], strict=True)}
    pairs = [(a, b) for a, b in ("qk", "pv") if all(_of_integers(texts[role]) for role in (a, b))]
    return " ".join(f"{role}={texts[role]}" for pair in pairs for role in pair)


def _of_integers(text: str) -> bool:
    """Whether the format, or that of each head, is one of integers."""
    formats = read(text)
    return formats is not None and all(fmt.is_integer for fmt in each(formats))


def _is_product(kernel: str) -> bool:
    return kernel.partition(" ")[0] in ("FullyConnected", "MatMul")


def _constants(operation: Any) -> list[str]:
    """The names of the constants that an operation reads, as they are or moved."""
    found, todo = [], [value.get_node() for value in operation.input_values()]
    while todo:
        source = todo.pop()
        kind = _text(source.get_rt_info(), "layerType")
        if kind == "Const":
            found += _text(source.get_rt_info(), "originalLayersNames").split(",")
        elif kind in _MOVES:
            todo += [value.get_node() for value in source.input_values()]
    return found


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _owner(name: str) -> str:
    """The FX node whose ONNX node or value has this name."""
    return name.strip().split("/")[0]


def _told(kernels: list[str]) -> str:
    found = list(dict.fromkeys(kernels))
    return "OpenVINO " + ", ".join(found) if found else ""
