"""An OpenVINO model on torch's memory: inputs are read where they lie, outputs of known shape written where torch asks.

A request belongs to one thread, so calls may come from several. A model is compiled for as many threads as torch has at
the call; where that changes it is compiled again, and the last two are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

_TYPES: dict[torch.dtype, Any] = {
    torch.float32: ov.Type.f32, torch.float64: ov.Type.f64, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16,
    torch.int64: ov.Type.i64, torch.int32: ov.Type.i32, torch.int16: ov.Type.i16, torch.int8: ov.Type.i8,
    torch.uint8: ov.Type.u8, torch.bool: ov.Type.boolean,
}  # fmt: skip
_DTYPES = {kind.get_type_name(): dtype for dtype, kind in _TYPES.items()}
_VIEW = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}  # as numpy takes them
_Place = tuple[int, tuple[int, ...], torch.dtype]
_MOST = 2  # compiled models kept, for different numbers of threads


class SessionError(RuntimeError):
    """OpenVINO refused a model; `reason` is the first line of what it says."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.reason = f"OpenVINO refuses it: {lines[-1] if lines else type(error).__name__}"


class Session:
    """An ONNX file in OpenVINO. `run` takes and gives torch tensors, in the order of the file.

    Raises SessionError where OpenVINO does not take the file. The file is not needed afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._core, self._lock = ov.Core(), threading.Lock()
        self._compiled: dict[int, Any] = {}
        self._requests = threading.local()
        try:
            self._model = self._core.read_model(path)
            compiled = self._for_threads(torch.get_num_threads())
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise SessionError(error) from error
        self._outputs = [_known(output) for output in compiled.outputs]

    @property
    def executed(self) -> Any:
        """The model as executed: its operations carry `layerType`, `primitiveType` and the names they come from."""
        return list(self._compiled.values())[-1].get_runtime_model()

    @property
    def computes_in(self) -> str:
        """The type of what is not quantized: bf16, f16 or f32."""
        text: str = list(self._compiled.values())[-1].get_property("INFERENCE_PRECISION_HINT").to_string()
        return text

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in the order of the file. The inputs are read where they lie (made contiguous if they are not)."""
        bound = self._request(self._for_threads(torch.get_num_threads()))
        kept = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in inputs]
        for i, tensor in enumerate(kept):
            bound.inputs.bind(i, tensor)
        found: list[Any] = [None] * len(self._outputs)
        for i, known in enumerate(self._outputs):
            if known is not None:
                found[i] = torch.empty(known[0], dtype=known[1])
                bound.outputs.bind(i, found[i])
        bound.request.infer()
        return [_copied(bound.request.get_output_tensor(i)) if t is None else t for i, t in enumerate(found)]

    def _for_threads(self, threads: int) -> Any:
        found = self._compiled.get(threads)
        if found is not None:
            return found
        with self._lock:
            if threads not in self._compiled:
                settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
                settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # else floats before packed weights become 8 bits
                if threads == 1 and _has_float_gate(self._model):
                    settings["INFERENCE_PRECISION_HINT"] = "f32"
                made = self._core.compile_model(self._model, "CPU", settings)
                self._compiled = dict([*list(self._compiled.items())[1 - _MOST :], (threads, made)])
            return self._compiled[threads]

    def _request(self, compiled: Any) -> _Bound:
        """This thread's request of a compiled model."""
        bound: _Bound | None = getattr(self._requests, "bound", None)
        if bound is None or bound.owner is not compiled:
            bound = self._requests.bound = _Bound(compiled)
        return bound


class _Bound:
    """A request of a compiled model, and what it reads and writes."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.request = owner, owner.create_infer_request()
        self.inputs = _Ends(self.request.set_input_tensor)
        self.outputs = _Ends(self.request.set_output_tensor)


class _Ends:
    """Where the inputs of a request lie, or its outputs: `tell` is called only where that changed."""

    def __init__(self, tell: Callable[[int, Any], None]) -> None:
        self._tell = tell
        self._places: dict[int, _Place] = {}

    def bind(self, i: int, tensor: Tensor) -> None:
        """The i-th is this tensor, which is contiguous."""
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if self._places.get(i) != place:
            self._tell(i, _shared(tensor))
            self._places[i] = place


def _has_float_gate(model: Any) -> bool:
    """Whether a gated MLP, down(act(gate(x)) * up(x)), has a weight in float.

    Where it computes in bf16, OpenVINO (seen in 2026.4) makes one kernel of such an MLP, LLMMLP, and for one thread
    divides by zero while it compiles it, which ends the process. In f32 it makes no such kernel.
    """
    return any(
        op.get_type_name() == "MatMul"
        and op.input_value(0).get_node().get_type_name() == "Multiply"
        and _is_constant(op.input_value(1).get_node())
        for op in model.get_ops()
    )


def _is_constant(op: Any) -> bool:
    """Whether an operation gives a stored weight, as it is or cast or transposed."""
    while op.get_type_name() in ("Convert", "Transpose", "Reshape"):
        op = op.input_value(0).get_node()
    return bool(op.get_type_name() == "Constant")


def _known(output: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of an output whose shape no input changes."""
    shape = output.partial_shape
    return (tuple(shape.to_shape()), _DTYPES[output.element_type.get_type_name()]) if shape.is_static else None


def _shared(tensor: Tensor) -> Any:
    """An OpenVINO tensor on the memory of a contiguous one."""
    array = tensor.detach().view(_VIEW.get(tensor.dtype, tensor.dtype)).numpy()
    if not array.size:
        return ov.Tensor(_TYPES[tensor.dtype], ov.Shape(list(tensor.shape)))
    return ov.Tensor(array, ov.Shape(list(tensor.shape)), _TYPES[tensor.dtype])


def _copied(result: Any) -> Tensor:
    """A result whose memory belongs to the request."""
    dtype = _DTYPES[result.element_type.get_type_name()]
    array = np.array(result.data.view(np.int16) if dtype == torch.bfloat16 else result.data)
    return torch.from_numpy(array).view(dtype) if dtype in _VIEW else torch.from_numpy(array)
