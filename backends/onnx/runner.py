"""A file's session on torch's memory, by names: inputs are read where they lie, outputs written where asked."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from qfx import processor
from qfx.backends.onnx.export import verify
from qfx.backends.onnx.session import DISABLED, as_torch, input_place
from qfx.backends.onnx.session_options import FLOATS_KEY, INTEGERS_KEY, LEVEL, apart, checked, options, saturation_note
from qfx.backends.onnx.values import ONNX_TYPE
from qfx.errors import explain, first_line, warn

_FOLDER = "session.model_external_initializers_file_folder_path"
_TORCH = {
    "tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8, "tensor(int16)": torch.int16,
}  # fmt: skip


class Runner:
    """A verified file in a session.

    threads: None for torch's number of threads now. entries: session options, see `session_options.checked`. Raises
    ValueError for others, and for a file that is cut short or altered.
    """

    def __init__(self, path: Path, threads: int | None = None, entries: Mapping[str, str] | None = None) -> None:
        count, given = _count(threads), checked(entries)
        self.metadata = verify(path)
        if FLOATS_KEY in self.metadata:
            given = {LEVEL: "1"} | given
        chosen = options(count, given)
        # A value's memory is free once the value was read. Else ONNX Runtime keeps it for the next value of that size,
        # to the end of the call, attention's and the MLP's together.
        chosen.enable_mem_reuse = False
        source: str | bytes = str(path)
        if INTEGERS_KEY in self.metadata and processor.saturates():
            warn(str(saturation_note(path.name)))
            source = _apart(path)
            chosen.add_session_config_entry(_FOLDER, str(path.parent))
        try:
            self.session = ort.InferenceSession(
                source, chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED[:1]
            )
        except Exception as error:  # of ONNX Runtime's own kinds
            what = f"ONNX Runtime {ort.__version__} does not open {path}: {type(error).__name__}: {first_line(error)}"
            raise ValueError(explain(what, next_step="copy the file again, or export it anew")) from error
        self.inputs = {i.name: _TORCH[i.type] for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self._bound = threading.local()
        self._bool = {o.name for o in self.session.get_outputs() if o.type == "tensor(bool)"}

    def run(self, feeds: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs by name. into: contiguous tensors that outputs are written into, of exactly their shapes.

        Raises ValueError for inputs that are missing, unknown, or of another dtype or shape.
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
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # of ONNX Runtime's own kinds
            self._check_shapes(feeds, error)
            raise
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

    def _check_shapes(self, feeds: Mapping[str, Tensor], error: Exception) -> None:
        """Raises ValueError where the shape of an input does not fit, or two differ in a size that has one name."""
        sizes: dict[str, int] = {}
        wrong = []
        for value in self.session.get_inputs():
            shape = tuple(feeds[value.name].shape)
            if len(shape) != len(value.shape) or not all(
                due is None or size == (due if isinstance(due, int) else sizes.setdefault(due, size))
                for due, size in zip(value.shape, shape, strict=True)
            ):
                wrong.append(value)
        if not wrong:
            return
        raise ValueError(
            explain(
                "the shapes of the inputs do not fit the file",
                expected=", ".join(f"{value.name} [{', '.join(map(str, value.shape))}]" for value in wrong),
                found=", ".join(f"{value.name} {list(feeds[value.name].shape)}" for value in wrong),
                next_step="numbers are sizes of the example: export with another one (args=), or fill up to them",
            )
        ) from error


def _apart(path: Path) -> bytes:
    """The model, its external weights left where they lie, as the exact path of integer products takes it."""
    model = onnx.load(str(path), load_external_data=False)
    apart(model.graph)
    serialized: bytes = model.SerializeToString()
    return serialized


def _count(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(explain("the number of threads", expected="a positive int, or None", found=repr(threads)))
    return threads
