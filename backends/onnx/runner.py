"""A file's session on torch's memory, by names: inputs are read where they lie, outputs written where asked."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from qfx.backends.onnx.export import verify
from qfx.backends.onnx.session import DISABLED, as_torch, input_place, options
from qfx.backends.onnx.values import ONNX_TYPE
from qfx.errors import explain

_TORCH = {
    "tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8,
}  # fmt: skip


class Runner:
    """A verified file in a session. threads: None for torch's number of threads now."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.metadata = verify(path)
        chosen = options(torch.get_num_threads() if threads is None else threads)
        self.session = ort.InferenceSession(
            str(path), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED[:1]
        )
        self.inputs = {i.name: _TORCH[i.type] for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self._bound = threading.local()
        self._bool = {o.name for o in self.session.get_outputs() if o.type == "tensor(bool)"}

    def run(self, feeds: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs by name. into: contiguous tensors that outputs are written into, of exactly their shapes.

        Raises ValueError for inputs that are missing, unknown or of another dtype.
        """
        self._check(feeds)
        into = into or {}
        binding, places = self._binding()
        kept = []
        for name, tensor in feeds.items():
            data = tensor.detach().contiguous()
            kept.append(data)
            place = (input_place(data), tuple(data.shape))
            if places.get(name) != place:
                binding.bind_input(name, "cpu", 0, ONNX_TYPE[data.dtype], place[1], place[0])
                places[name] = place
        for name in self.outputs:
            target = into.get(name)
            if target is None:
                binding.bind_output(name, "cpu")
                places.pop(name, None)
                continue
            place = (target.data_ptr(), tuple(target.shape))
            if places.get(name) != place:
                binding.bind_output(name, "cpu", 0, ONNX_TYPE[target.dtype], place[1], place[0])
                places[name] = place
        self.session.run_with_iobinding(binding)
        found = binding._iobinding.get_outputs()
        return {
            name: into[name] if name in into else as_torch(found, i, name in self._bool)
            for i, name in enumerate(self.outputs)
        }

    def _binding(self) -> tuple[Any, dict[str, tuple[int, tuple[int, ...]]]]:
        """This thread's binding, and where what it has bound lies: most of a decoder's cache lies where it did."""
        if not hasattr(self._bound, "binding"):
            self._bound.binding, self._bound.places = self.session.io_binding(), {}
        return self._bound.binding, self._bound.places

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        wrong = [n for n, t in feeds.items() if n in self.inputs and t.dtype != self.inputs[n]]
        if feeds.keys() == self.inputs.keys() and not wrong:
            return
        lacking, unknown = self.inputs.keys() - feeds.keys(), feeds.keys() - self.inputs.keys()
        raise ValueError(
            explain(
                "the inputs do not fit the file",
                expected=", ".join(f"{n} {t}" for n, t in self.inputs.items() if n in lacking or n in wrong)
                or "none of the unknown ones",
                found=", ".join([*(f"{n} {feeds[n].dtype}" for n in wrong), *(f"unknown {n}" for n in unknown)])
                or "nothing",
                next_step="give every input by its name",
            )
        )
