"""The builder: ONNX nodes, cached constants, weights, and the values of FX nodes.

Every ONNX node is named `<FX node>/<number>`, so that what ONNX Runtime executes can be told per FX node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import sympy
import torch
from onnx import helper
from torch import Tensor, fx

from qfx.backends.onnx.kernel_types import fallback_type
from qfx.backends.onnx.symbols import Symbols
from qfx.backends.onnx.values import ONNX_TYPE, Dim, Value, computed, dim_of, dims_of, is_number, is_static
from qfx.errors import Note, source_line
from qfx.graph import fqn_of, get_tensor
from qfx.storage.spill import flat_bytes

OPSET = 21
MICROSOFT = "com.microsoft"
_INLINE_BYTES = 1024
_COMPARED_BYTES = 64 * 1024


@dataclass(frozen=True)
class Later:
    """A weight that is made when it is called for: what no node uses in the end is never made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> Tensor:
        """The tensor, contiguous."""
        tensor = self.make().detach().contiguous()
        found = (tensor.dtype, tuple(tensor.shape))
        assert found == (self.dtype, self.shape), (found, self.dtype, self.shape)
        return tensor


class Builder:
    """Collects one ONNX graph. `node` is the FX node being lowered; `notes` are for the user.

    runtime: "session" (of this process; weights that have no kernel are unpacked at once), "onnxruntime" (a file; its
    own operators where they are faster) or "standard" (a file; operators of ai.onnx only). prefill: weight-only
    products of many rows are computed by 8-bit integers (see the module `prefill`).
    """

    def __init__(self, root: torch.nn.Module, runtime: str = "session", *, prefill: bool = False) -> None:
        self.root = root
        self.prefill = prefill
        self.runtime = runtime
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.external: dict[str, Tensor | Later] = {}
        self.types: dict[str, int] = {}  # ONNX element type by the name of a value
        self.values: dict[fx.Node, Any] = {}
        self.notes: list[Note] = []
        self.symbols = Symbols(self)
        self.node: fx.Node | None = None
        self.memo: dict[Any, Any] = {}
        # A value under another view: (name of the view, permutation or shape that takes it back) -> the value.
        self.views: dict[tuple[str, tuple[Any, ...]], Value] = {}
        self.fused: dict[str, str] = {}  # FX node -> the FX node whose kernel computes it as well
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._weights: dict[Any, Value] = {}
        self._counts: dict[str, int] = {}

    @property
    def standard(self) -> bool:
        """Only operators of ai.onnx may be used."""
        return self.runtime == "standard"

    @property
    def portable(self) -> bool:
        """The graph goes to a file, which programs of other ages read too."""
        return self.runtime != "session"

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def op(
        self, op_type: str, *inputs: Value | None, dtype: torch.dtype | None = None, domain: str = "", **attrs: Any
    ) -> Value:
        """One node with one output of `dtype` (where not given: that of its data input).

        Inputs of a dtype for which ONNX Runtime has no kernel are computed in a wider one.
        """
        first = 1 if op_type == "Where" else 0  # the condition of Where is no data
        main = inputs[first]
        assert main is not None, f"{op_type} without its first input"
        dtype = dtype or main.dtype
        wide = fallback_type(op_type, main.dtype)
        if wide is None:
            result = self.ops(op_type, *inputs, dtypes=[dtype], domain=domain, **attrs)[0]
            return Value(result.name, dtype, _shape_after(op_type, inputs))
        wider = list(inputs[:first])
        wider += [self.cast(v, wide) if v is not None and v.dtype == main.dtype else v for v in inputs[first:]]
        if main.dtype == torch.float64:
            self.note(f"{op_type} is computed in f32 instead of f64", "none: ONNX Runtime has no f64 kernel for it")
        if dtype != main.dtype:
            return self.ops(op_type, *wider, dtypes=[dtype], domain=domain, **attrs)[0]
        return self.cast(self.ops(op_type, *wider, dtypes=[wide], domain=domain, **attrs)[0], dtype)

    def ops(
        self, op_type: str, *inputs: Value | None, dtypes: Sequence[torch.dtype], domain: str = "", **attrs: Any
    ) -> list[Value]:
        """One node with several outputs."""
        owner = self.node.name if self.node is not None else "graph"
        number = self._counts.get(owner, 0)
        self._counts[owner] = number + 1
        name = f"{owner}/{number}"
        outputs = [Value(name if len(dtypes) == 1 else f"{name}.{i}", t) for i, t in enumerate(dtypes)]
        self.types |= {o.name: ONNX_TYPE[o.dtype] for o in outputs}
        names = ["" if v is None else v.name for v in inputs]
        while names and not names[-1]:
            names.pop()
        given = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(
            helper.make_node(op_type, names, [o.name for o in outputs], name=name, domain=domain or None, **given)
        )
        return outputs

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """The value in another dtype; itself where it has it."""
        if value.dtype == dtype:
            return value
        cast = self.ops("Cast", value, dtypes=[dtype], to=ONNX_TYPE[dtype])[0]
        return Value(cast.name, dtype, value.shape)

    # ---- constants and weights ---------------------------------------------------------------------------------------

    def const(self, data: Any, dtype: torch.dtype) -> Value:
        """A small constant (number, list or numpy array) as an initializer, one per content."""
        array = np.asarray(torch.as_tensor(data).to(dtype).numpy())
        key = (array.tobytes(), dtype, array.shape)
        if key not in self._constants:
            name = self._unique(f"constant_{len(self._constants)}")
            tensor = helper.make_tensor(name, ONNX_TYPE[dtype], array.shape, array.tobytes(), raw=True)
            self.initializers[name] = tensor
            self._constants[key] = Value(name, dtype, tuple(array.shape))
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> Value:
        """int64 [n] constant."""
        return self.const(np.asarray(list(values), dtype=np.int64), torch.int64)

    def forget(self, names: Collection[str]) -> None:
        """Sizes that these values hold are computed anew."""
        self._constants = {key: value for key, value in self._constants.items() if value.name not in names}

    def weight(self, tensor: Tensor, name: str, key: Any = None) -> Value:
        """A tensor of the model as an initializer. Large ones stay in torch's memory (external to the model)."""
        key = key if key is not None else name
        if key in self._weights:
            return self._weights[key]
        data = tensor.detach()
        data = data.to(computed(data.dtype)).contiguous()
        same = _content(data)
        if same in self._weights:  # scales of linears with one input, and other small tensors, once
            return self._weights[same]
        name = self._unique(name)
        if data.numel() * data.element_size() <= _INLINE_BYTES:
            array = data.cpu().numpy()
            self.initializers[name] = helper.make_tensor(
                name, ONNX_TYPE[data.dtype], data.shape, array.tobytes(), raw=True
            )
        else:
            self.initializers[name] = _external(name, ONNX_TYPE[data.dtype], data.shape)
            self.external[name] = data
        value = Value(name, data.dtype, tuple(data.shape))
        self._weights[key] = value
        if same is not None:
            self._weights[same] = value
        return value

    def derived(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
        """An initializer computed from the model's tensors, once per name."""
        if name in self._weights:
            return self._weights[name]
        later = Later(dtype, shape, make)
        if later.nbytes <= _COMPARED_BYTES:
            return self.weight(later(), name)
        unique = self._unique(name)
        self.initializers[unique] = _external(unique, ONNX_TYPE[dtype], shape)
        self.external[unique] = later
        self._weights[name] = Value(unique, dtype, shape)
        return self._weights[name]

    def raw(self, name: str, element: int, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
        """An initializer of a type that no Value has (int4, float8, 16-bit floats); `make` gives its bytes, uint8.

        Its Value counts as uint8: only operators whose result has another type read it.
        """
        if name in self._weights:
            return self._weights[name]
        count = math.prod(shape)
        four = element in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        half = element in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        size = -(-count // 2) if four else count * 2 if half else count
        unique = self._unique(name)
        self.external[unique] = Later(torch.uint8, (size,), lambda: make().reshape(-1))
        self.initializers[unique] = _external(unique, element, shape)
        self._weights[name] = Value(unique, torch.uint8, shape)
        return self._weights[name]

    def tensor(self, node: fx.Node) -> Tensor:
        """The model's tensor behind a get_attr node."""
        return get_tensor(self.root, str(node.target))

    def _unique(self, name: str) -> str:
        """A name for an initializer, which neither another one has nor an input."""
        number, base = 0, name
        while name in self.initializers or any(name == value.name for value in self.inputs):
            number += 1
            name = f"{base}.{number}"
        return name

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def dim(self, size: Dim) -> Value:
        """A size as int64 [1]. Raises UnresolvedError where no input carries its symbols."""
        return self.symbols.value(size)

    def shape(self, sizes: Sequence[Dim]) -> Value:
        """Sizes as one int64 vector: a constant where all are known."""
        if is_static(sizes):
            return self.ints([int(s) for s in sizes])
        key = ("shape", *sizes)
        if key not in self._constants:
            self._constants[key] = self.op("Concat", *[self.dim(s) for s in sizes], axis=0)
        return self._constants[key]

    def scalar(self, number: Any, dtype: torch.dtype) -> Value:
        """A Python number, a size expression or a 0-dimensional value as a 0-dimensional value of `dtype`."""
        if isinstance(number, Value):
            return self.cast(number, dtype)
        if isinstance(number, sympy.Expr):
            key = ("scalar", number, dtype)
            if key not in self._constants:
                flat = self.op("Reshape", self.dim(number), self.ints([]))
                self._constants[key] = self.cast(Value(flat.name, flat.dtype, ()), dtype)
            return self._constants[key]
        return self.const(number, dtype)

    def reshape(self, value: Value, sizes: Sequence[Dim]) -> Value:
        """Reshape to `sizes`. Sizes that the input has at the same place are copied and not computed."""
        sizes = tuple(sizes)
        if value.shape is not None and tuple(value.shape) == sizes:
            return value
        if value.shape is not None and not is_static(sizes) and 0 not in sizes:
            copied = [0 if i < len(value.shape) and value.shape[i] == s else s for i, s in enumerate(sizes)]
            if is_static(copied):
                result = self.op("Reshape", value, self.ints([int(s) for s in copied]))
                return Value(result.name, result.dtype, sizes)
        result = self.op(
            "Reshape", value, self.shape(sizes), allowzero=1 if 0 in sizes or not is_static(sizes) else None
        )
        return Value(result.name, result.dtype, sizes)

    # ---- FX ----------------------------------------------------------------------------------------------------------

    def value_of(self, node: fx.Node) -> Any:
        """What an argument node stands for: a Value, a tuple of Values, or a number (size expression)."""
        fake = node.meta.get("val")
        if is_number(fake):
            return dim_of(fake)
        if isinstance(fake, bool):
            return fake
        return self.values[node]

    def has(self, node: fx.Node) -> bool:
        """Is the node's value at hand in this stage?"""
        return node in self.values

    @property
    def out(self) -> Any:
        """The fake result of the node being lowered."""
        assert self.node is not None
        return self.node.meta["val"]

    @property
    def out_dims(self) -> tuple[Dim, ...]:
        """The shape of the node being lowered."""
        return dims_of(self.out.shape)

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype in which the node being lowered is computed."""
        return computed(self.out.dtype)

    def finish(self, result: Any) -> Any:
        """The node's result in the dtype and with the shape that torch gives it."""
        if isinstance(result, tuple | list):
            return tuple(_typed(self, value, one) for value, one in zip(result, self.out, strict=True))
        return _typed(self, result, self.out)

    def note(self, reason: str, next_step: str) -> None:
        """Tell the user how the node being lowered is computed, where its result is as asked all the same."""
        assert self.node is not None
        self.notes.append(Note(fqn_of(self.node), reason, next_step, source_line(self.node) or "", minor=True))


def _content(data: Tensor) -> tuple[Any, ...] | None:
    """What a small tensor holds; None for a large one."""
    if data.numel() * data.element_size() > _COMPARED_BYTES or data.device.type != "cpu":
        return None
    return (data.dtype, tuple(data.shape), flat_bytes(data).numpy().tobytes())


_ELEMENTWISE = {
    "Abs",
    "Neg",
    "Sign",
    "Exp",
    "Log",
    "Sqrt",
    "Not",
    "Floor",
    "Round",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Max",
    "Min",
    "Pow",
}


def _shape_after(op_type: str, inputs: Sequence[Value | None]) -> tuple[Dim, ...] | None:
    """The shape of an element-wise result where the shapes of its inputs are known and fit, else None."""
    if op_type not in _ELEMENTWISE:
        return None
    shapes = [v.shape for v in inputs if v is not None and v.shape is not None]
    if len(shapes) < sum(v is not None for v in inputs):
        return None
    common = broadcast(shapes)
    fits = all(size in (1, due) for shape in shapes for size, due in zip(shape[::-1], common[::-1], strict=False))
    return common if fits else None


def broadcast(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The common shape of shapes that fit each other."""
    rank = max(len(s) for s in shapes)
    common: list[Dim] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            common[i] = size if common[i] == 1 else common[i]
    return tuple(common)


def _typed(b: Builder, value: Value, fake: Tensor) -> Value:
    if not isinstance(fake, Tensor):
        return value
    value = b.cast(value, computed(fake.dtype))
    return Value(value.name, value.dtype, dims_of(fake.shape))


def _external(name: str, element: int, shape: Sequence[int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = element
    tensor.dims.extend(shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    location = tensor.external_data.add()
    location.key, location.value = "location", "weights"
    return tensor
