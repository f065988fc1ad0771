"""Every pair of formats as a file: in ONNX Runtime as it comes, in OpenVINO, each against the reference kernels."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning
from qfx.exported import Exported
from qfx.recipe import Recipe
from tests.backends.onnx.checks import in_ort, sqnr

EXACT, ROUNDED = 120.0, 45.0  # dB; MatMulNBits, which ONNX Runtime makes of blocked weights, rounds its activations
# (input, weight) -> what the file holds the weight as; K = 72 is no multiple of the groups
INTEGER = {
    ("i8/tok", "i8/ch"): "INT8", ("u8/tok", "u8/ch"): "INT8", ("u8/dyn", "i8/ch"): "INT8", ("i8/dyn", "i8"): "INT8",
    ("i8", "i8/ch"): "INT8", ("u8", "i8/ch"): "INT8", ("u8", "u8/ch"): "UINT8", ("i8/tok", "i4/ch"): "INT8",
}  # fmt: skip
BLOCKED = {
    ("", "i8/ch"): "INT8", ("", "i8/g32"): "INT8", ("", "u8/g32"): "UINT8", ("", "i4/g32"): "INT4",
    ("", "u4/g32"): "UINT4", ("", "i4/ch"): "INT4", ("", "i2/g64"): "INT4", ("", "u2/g32"): "UINT4",
    ("", "i3/g32"): "INT4", ("", "i6/ch"): "INT8", ("", "i8/b32x32"): "INT8", ("i8", "i4/g32"): "INT4",
    ("i8/tok", "i4/g32"): "INT4",
}  # fmt: skip
TABLES = {
    ("", "nf4/g64"): "UINT4", ("", "f8e4m3/ch"): "FLOAT8E4M3FN", ("", "f8e5m2/ch"): "FLOAT8E5M2",
    ("", "f4e2m1/g32/e8m0"): "UINT4", ("", "f4e2m1/g16/e4m3"): "UINT4",
}  # fmt: skip
ROWS = {**INTEGER, **BLOCKED, **TABLES}


class Model(nn.Module):
    """An embedding, a norm and two linears, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(50, 72), nn.LayerNorm(72)
        self.up, self.down = nn.Linear(72, 96), nn.Linear(96, 72, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))


@cache
def quantized(x: str, w: str) -> tuple[nn.Module, Tensor]:
    """The live model in these formats and its output, by the reference kernels."""
    rule = {"target": "linear", "w": w, **({"x": x} if x else {})}
    recipe = Recipe.parse({"name": "row", "rules": [rule, {"target": "embedding", "w": "i8/ch"}]})
    model = qfx.quantize(Model().eval(), recipe, data=[(IDS,)])
    with torch.no_grad():
        return model, model(IDS)


def exported(x: str, w: str, path: Path, runtime: str) -> Exported:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.export_onnx(quantized(x, w)[0], (IDS,), path, runtime=runtime)


def in_openvino(path: Path, **config: str) -> tuple[Tensor, Any]:
    import openvino

    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {**exact, **config})
    return torch.from_numpy(np.array(compiled([IDS.numpy()])[0])), compiled


def held(path: Path) -> set[str]:
    """Element types of the file's tensors of a weight's size."""
    graph = onnx.load(str(path)).graph
    return {TensorProto.DataType.Name(t.data_type) for t in graph.initializer if np.prod(t.dims) >= 72 * 96}


@pytest.mark.parametrize(("x", "w"), ROWS)
def test_for_onnx_runtime(tmp_path: Path, x: str, w: str) -> None:
    path = exported(x, w, tmp_path / "m.onnx", "onnxruntime").path
    assert sqnr(quantized(x, w)[1], in_ort(path, ids=IDS)) > (ROUNDED if (x, w) in BLOCKED else EXACT)
    assert "FLOAT" not in held(path)


@pytest.mark.parametrize(("x", "w"), ROWS)
def test_by_the_standard(tmp_path: Path, x: str, w: str) -> None:
    """In both programs; only the standard's operators, and the codes stay."""
    path = exported(x, w, tmp_path / "m.onnx", "standard").path
    assert sqnr(quantized(x, w)[1], in_ort(path, ids=IDS)) > (ROUNDED if (x, w) in BLOCKED else EXACT)
    assert sqnr(quantized(x, w)[1], in_openvino(path)[0]) > EXACT
    model = onnx.load(str(path))
    assert {node.domain for node in model.graph.node} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert held(path) == {ROWS[x, w]}
    onnx.checker.check_model(str(path), full_check=True)


def test_the_control_sees_another_weight(tmp_path: Path) -> None:
    path = exported("i8/tok", "i8/ch", tmp_path / "m.onnx", "standard").path
    assert sqnr(quantized("", "i2/g64")[1], in_ort(path, ids=IDS)) < 20


def test_static_runs_in_integers(tmp_path: Path) -> None:
    """What both programs make of Q, DQ, MatMul: products of 8-bit integers."""
    path = exported("u8", "i8/ch", tmp_path / "m.onnx", "standard").path
    _, compiled = in_openvino(path, INFERENCE_PRECISION_HINT="f32")
    products = [
        op
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    assert {op.get_rt_info()["runtimePrecision"].astype(str) for op in products} == {"u8"}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2
    assert "MatMul" not in kinds
