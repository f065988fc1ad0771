"""Scales in files: stored as the model stores them, made f32 when the file is loaded, with the same numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning
from qfx.recipe import Recipe
from tests.backends.onnx.checks import in_ort, sqnr

F32, F16, BF16, F8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
X = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two linears, whose rows are of several blocks and of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(256, 96), nn.Linear(96, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def written(path: Path, w: str, runtime: str = "onnxruntime", x: str = "none") -> tuple[Any, Path]:
    recipe = Recipe.parse({"name": "scales", "rules": [{"target": "linear", "w": w, "x": x}]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        model = qfx.quantize(Net().eval(), recipe)
        return model, qfx.export_onnx(model, (X,), path, runtime=runtime).path


def scale_types(path: Path) -> set[int]:
    """Element types of what is as large as one scale for each group or row, biases and small constants apart."""
    found = {t.data_type for t in onnx.load(str(path)).graph.initializer if "scale" in t.name or "factor" in t.name}
    return {int(kind) for kind in found}


def loaded(path: Path, **entries: str) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
@pytest.mark.parametrize(
    ("w", "held"),
    [
        ("u4/g32/f16", F16), ("i4/g64/bf16", BF16), ("u2/g64/f16", F16), ("u3/g32/f16", F16), ("u8/g32/f16", F16),
        ("nf4/g64/f16", F16), ("nf4/g32/bf16", BF16), ("f4e2m1/g32/e8m0", BF16), ("i4/ch/f16", F16), ("i4/f16", F16),
        ("u4/g32", F32), ("nf4/g64", F32), ("nf4/ch", F32), ("f4e2m1/g16/e4m3", F8), ("i8/ch", F32),
    ],
)  # fmt: skip
def test_scales_lie_in_the_type_of_the_model(tmp_path: Path, w: str, held: int, runtime: str) -> None:
    """The negative control are the formats with scales in f32."""
    model, path = written(tmp_path / "m.onnx", w, runtime)
    assert scale_types(path) == {held}
    with torch.no_grad():
        assert sqnr(model(X), in_ort(path, x=X)) > 34
    graph = loaded(path)
    made = {name for node in graph.node if node.op_type in ("Cast", "Expand") for name in node.output}
    assert not any(name in made for node in graph.node if node.op_type == "MatMulNBits" for name in node.input)


@pytest.mark.parametrize("w", ["u4/g32/f16", "i4/g64/bf16", "i8/ch", "u4/ch/f16"])
def test_what_a_file_computes_is_what_the_session_computes(tmp_path: Path, w: str) -> None:
    """Bit for bit: a cast from 16 bits and a repetition change no value."""
    model, path = written(tmp_path / "m.onnx", w)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", QfxWarning)
        compiled: Any = torch.compile(model, backend="qfx", options={"cache": False})
        assert torch.equal(compiled(X), in_ort(path, x=X))
    torch._dynamo.reset()


def test_one_scale_a_row_is_stored_once_a_row(tmp_path: Path) -> None:
    """MatMulNBits wants one for each block; they are repeated when the file is loaded, not in each call."""
    _, path = written(tmp_path / "m.onnx", "i8/ch")
    graph = onnx.load(str(path)).graph
    scales = [list(t.dims) for t in graph.initializer if "scale" in t.name]
    assert sorted(scales) == [[40, 1], [96, 1]]
    assert Counter(node.op_type for node in loaded(path).node)["Expand"] == 0


@pytest.mark.parametrize("w", ["u4/g32/f16", "i8/ch"])
def test_the_control_sees_a_scale_that_is_off(tmp_path: Path, w: str) -> None:
    model, path = written(tmp_path / "m.onnx", w)
    file = onnx.load(str(path))
    scale = next(t for t in file.graph.initializer if "scale" in t.name)
    values = onnx.numpy_helper.to_array(scale).copy()
    values[:, 0] *= 2
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(file, str(path))
    with torch.no_grad():
        assert sqnr(model(X), in_ort(path, x=X)) < 20


def test_8_bits_beside_floats_store_one_scale(tmp_path: Path) -> None:
    """The product of the upper halves has 16 times the scale of the lower ones."""
    model, path = written(tmp_path / "m.onnx", "u8/g32/f16", x="f32")
    graph = onnx.load(str(path)).graph
    assert sum(t.data_type == F16 for t in graph.initializer) == 2
    assert [node.op_type for node in loaded(path).node].count("MatMulNBits") == 4
    with torch.no_grad():
        assert sqnr(model(X), in_ort(path, x=X)) > 100
