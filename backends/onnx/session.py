"""Sessions: an ONNX graph run by ONNX Runtime on torch's own memory.

Inputs are bound where they lie (made contiguous if they are not), weights above 1 KiB stay in torch's memory, outputs
are handed over without a copy. Every call has its own binding, so calls may come from several threads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice as _OrtDevice
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue as _OrtValue
from torch import Tensor

from qfx.backends.onnx.values import ONNX_TYPE

# SkipLayerNormalization is slower on the CPU than Add and LayerNormalization. The second makes integer kernels of
# DequantizeLinear and MatMul, with activations rounded to 8 bits: here the graph itself says where that shall happen.
DISABLED = ["SkipLayerNormFusion", "QDQSelectorActionTransformer"]
_ERROR = 3


def options(threads: int) -> Any:
    """Session options that change nothing outside their session."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level = _ERROR
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return chosen


class SessionError(RuntimeError):
    """ONNX Runtime refused a model; `node` is the FX node that it names (or ""), `reason` its first line."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        match = _NODE.search(str(error))
        self.node = match.group(1) if match else ""
        self.reason = f"ONNX Runtime refuses it: {str(error).splitlines()[0]}"


_NODE = re.compile(r"""[Nn]ode(?: with name|,|:)?\s*\(?['"]?([^'"/()\s]+)/\d+""")


class Session:
    """A model and the weights it uses, ready to run. `run` takes and gives torch tensors.

    in_place: outputs that are written into the memory of an input (see the file of that name) where it is contiguous.
    """

    def __init__(
        self, model: onnx.ModelProto, weights: dict[str, Tensor], in_place: dict[int, int] | None = None
    ) -> None:
        self._in_place = in_place or {}
        chosen = options(torch.get_num_threads())
        if weights:
            names = list(weights)
            chosen.add_external_initializers(names, [_wrap(weights[name]) for name in names])
        self._weights = weights
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
            )
        except Exception as error:
            raise SessionError(error) from error
        self.inputs = [i.name for i in model.graph.input]
        self.outputs = [o.name for o in model.graph.output]
        self._bool = [o.type.tensor_type.elem_type == onnx.TensorProto.BOOL for o in model.graph.output]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in the order of the graph. The inputs are read where they lie."""
        binding = self._session.io_binding()
        inner = binding._iobinding  # the wrapper's own bind functions look the device up at each call
        kept = []
        for name, tensor in zip(self.inputs, inputs, strict=True):
            data = tensor.contiguous()
            kept.append(data)
            place = data.data_ptr() or _EMPTY.ctypes.data
            inner.bind_input(name, _CPU, ONNX_TYPE[data.dtype], tuple(data.shape), place)
        for i, name in enumerate(self.outputs):
            source = inputs[self._in_place[i]] if i in self._in_place else None
            if source is None or not source.is_contiguous() or not source.numel():
                inner.bind_output(name, _CPU)
            else:
                inner.bind_output(name, _CPU, ONNX_TYPE[source.dtype], tuple(source.shape), source.data_ptr())
        self._session.run_with_iobinding(binding)
        results = inner.get_outputs()
        return [self._result(results, i, inputs) for i in range(len(self.outputs))]

    def _result(self, results: Any, i: int, inputs: Sequence[Tensor]) -> Tensor:
        source = inputs[self._in_place[i]] if i in self._in_place else None
        if source is not None and results[i].data_ptr() == source.data_ptr():
            return source
        return _tensor(results, i, self._bool[i])


_CPU = _OrtDevice(_OrtDevice.cpu(), _OrtDevice.default_memory(), 0)
_EMPTY = np.zeros(16, dtype=np.uint8)


def _wrap(tensor: Tensor) -> Any:
    """An OrtValue on the tensor's memory, which it keeps alive."""
    is_bool = tensor.dtype == torch.bool
    data = tensor.view(torch.uint8) if is_bool else tensor
    return ort.OrtValue(_OrtValue.from_dlpack(data.__dlpack__(), is_bool))


def _tensor(values: Any, index: int, is_bool: bool) -> Tensor:
    tensor = torch.utils.dlpack.from_dlpack(values[index].to_dlpack())
    return tensor.view(torch.bool) if is_bool else tensor
