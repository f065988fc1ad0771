"""Sessions: an ONNX graph run by ONNX Runtime on torch's own memory.

Inputs are bound where they lie (made contiguous if they are not), weights above 1 KiB stay in torch's memory, outputs
are handed over without a copy. Every call has its own binding, so calls may come from several threads.

A session has as many threads as torch has at the call (torch.set_num_threads): where that changes, another session of
the same model is made and kept beside the last one. A model that was saved is optimized already, and its weights are
mapped from the file, most of them packed for the kernels: making a session of it copies little.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as _state
from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice as _OrtDevice
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue as _OrtValue
from torch import Tensor

from qfx.backends.onnx.session_options import options as options  # noqa: PLC0414  (also known here)
from qfx.backends.onnx.values import ONNX_TYPE
from qfx.errors import first_line, warn

# SkipLayerNormalization is slower on the CPU than Add and LayerNormalization. The second makes integer kernels of
# DequantizeLinear and MatMul, with activations rounded to 8 bits: here the graph itself says where that shall happen.
DISABLED = ["SkipLayerNormFusion", "QDQSelectorActionTransformer"]
# Kernels that pack one weight, each by itself. MatMulNBits puts scales into the packed weight after that was saved:
# read back, it gives wrong numbers.
_PACKS_ALONE = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"}
_PACKS_ALONE |= {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv"}
_MOST = 2  # sessions of one model, for different numbers of threads


class SessionError(RuntimeError):
    """ONNX Runtime refused a model; `node` is the FX node that it names (or ""), `reason` its first line."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        match = _NODE.search(str(error))
        self.node = match.group(1) if match else ""
        self.reason = f"ONNX Runtime refuses it: {first_line(error)}"


_NODE = re.compile(r"""[Nn]ode(?: with name|,|:)?\s*\(?['"]?([^'"/()\s]+)/\d+""")


class Session:
    """A model and the weights it uses, ready to run. `run` takes and gives torch tensors.

    in_place: outputs that are written into the memory of an input (see the file of that name) where it is contiguous.
    save: where to write the optimized model, `<name>.onnx`, with its weights as the kernels want them, `<name>.data`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: dict[str, Tensor],
        in_place: dict[int, int] | None = None,
        save: Path | None = None,
    ) -> None:
        def create(threads: int, to: Path | None = None, *, packed: bool = False) -> Any:
            chosen = options(threads)
            if weights:
                names = list(weights)
                chosen.add_external_initializers(names, [_wrap(weights[name]) for name in names])
            if to is not None:
                _saved_to(chosen, to, packed=packed)
            return ort.InferenceSession(
                model.SerializeToString(), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
            )

        def saving(threads: int) -> Any:
            if not any(n.op_type == "MatMulNBits" for n in model.graph.node):
                session = create(threads, save, packed=True)
                if save is None or _packed_alone(save.with_suffix(".onnx")):
                    return session
            return create(threads, save)

        self._start(create, in_place, first=saving)

    @classmethod
    def open(cls, path: Path, in_place: dict[int, int] | None = None) -> Session:
        """A session of a saved model. Raises SessionError where ONNX Runtime cannot read it."""

        def create(threads: int) -> Any:
            chosen = options(threads)
            chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return ort.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])

        self = cls.__new__(cls)
        self._start(create, in_place)
        return self

    def _start(
        self, create: Callable[[int], Any], in_place: dict[int, int] | None, first: Callable[[int], Any] | None = None
    ) -> None:
        self._create = create
        self._in_place = in_place or {}
        self._lock = threading.Lock()
        self._sessions: dict[int, Any] = {}
        try:
            session = self._sessions[torch.get_num_threads()] = (first or create)(torch.get_num_threads())
        except Exception as error:
            raise SessionError(error) from error
        self.inputs = [i.name for i in session.get_inputs()]
        self.outputs = [o.name for o in session.get_outputs()]
        self._bool = [o.type == "tensor(bool)" for o in session.get_outputs()]

    def _for_threads(self, threads: int) -> Any:
        """A session with another number of threads; the one before stays, older ones go."""
        with self._lock:
            if threads in self._sessions:
                return self._sessions[threads]
            try:
                made = self._create(threads)
            except Exception as error:  # noqa: BLE001  (the saved model is gone: what there is goes on)
                count, made = list(self._sessions.items())[-1]
                warn(
                    f"no session with {threads} thread(s) can be made, the one with {count} goes on: "
                    f"{first_line(error)}; next step: compile the model again"
                )
            self._sessions = dict([*list(self._sessions.items())[1 - _MOST :], (threads, made)])
            return made

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in the order of the graph. The inputs are read where they lie."""
        threads = torch.get_num_threads()
        session = self._sessions.get(threads) or self._for_threads(threads)
        binding = session.io_binding()
        inner = binding._iobinding  # the wrapper's own bind functions look the device up at each call
        kept = []
        for name, tensor in zip(self.inputs, inputs, strict=True):
            data = tensor.contiguous()
            kept.append(data)
            inner.bind_input(name, _CPU, ONNX_TYPE[data.dtype], tuple(data.shape), input_place(data))
        for i, name in enumerate(self.outputs):
            source = inputs[self._in_place[i]] if i in self._in_place else None
            if source is None or not source.is_contiguous() or not source.numel():
                inner.bind_output(name, _CPU)
            else:
                inner.bind_output(name, _CPU, ONNX_TYPE[source.dtype], tuple(source.shape), source.data_ptr())
        session.run_with_iobinding(binding)
        results = inner.get_outputs()
        return [self._result(results, i, inputs) for i in range(len(self.outputs))]

    def _result(self, results: Any, i: int, inputs: Sequence[Tensor]) -> Tensor:
        source = inputs[self._in_place[i]] if i in self._in_place else None
        if source is not None and results[i].data_ptr() == source.data_ptr():
            return source
        return as_torch(results, i, self._bool[i])


def _packed_alone(path: Path) -> bool:
    """Whether all packed weights in a saved model are of kernels that pack each by itself."""
    graph = onnx.load(str(path), load_external_data=False).graph
    packed = {t.name for t in graph.initializer if any(e.key.startswith("prepacked") for e in t.external_data)}
    return all(n.op_type in _PACKS_ALONE for n in graph.node if packed.intersection(n.input))


def _saved_to(chosen: Any, path: Path, *, packed: bool) -> None:
    """Let the session that is made write its optimized model and its weights, as the kernels want them if `packed`."""
    chosen.optimized_model_filepath = str(path.with_suffix(".onnx"))
    for key, value in {
        "optimized_model_external_initializers_file_name": path.with_suffix(".data").name,
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
        "save_external_prepacked_constant_initializers": "1" if packed else "0",
    }.items():
        chosen.add_session_config_entry(f"session.{key}", value)


def input_place(tensor: Tensor) -> int:
    """Where a contiguous tensor lies; an address for one that holds nothing."""
    return tensor.data_ptr() or int(_EMPTY.ctypes.data)


_CPU = _OrtDevice(_OrtDevice.cpu(), _OrtDevice.default_memory(), 0)
_EMPTY = np.zeros(16, dtype=np.uint8)
_BOOLEANS_ARE_BYTES = hasattr(_state, "is_dlpack_uint8_tensor")  # in DLPack, before ONNX Runtime 1.32


def _wrap(tensor: Tensor) -> Any:
    """An OrtValue on the tensor's memory, which it keeps alive."""
    if tensor.dtype == torch.bool and _BOOLEANS_ARE_BYTES:
        return ort.OrtValue(_OrtValue.from_dlpack(tensor.view(torch.uint8).__dlpack__(), True))
    return ort.OrtValue(_OrtValue.from_dlpack(tensor.__dlpack__()))


def as_torch(values: Any, index: int, is_bool: bool) -> Tensor:
    """One of the values that a session gives, in the same memory; booleans come as bytes before 1.32."""
    tensor = torch.utils.dlpack.from_dlpack(values[index].to_dlpack())
    return tensor.view(torch.bool) if is_bool else tensor
