"""A table that is an embedding and the last layer's weight lies in a model once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning
from qfx.recipe import Recipe
from tests.backends.onnx.checks import in_ort, sqnr

IDS = torch.randint(0, 90, (3, 5), generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An embedding, a linear and the embedding again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(90, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 90, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.linear(self.embedding(ids)))
        return y


def tables(path: Path) -> int:
    """How many tensors of the table's size a file holds."""
    return sum(int(np.prod(t.dims)) >= 90 * 64 for t in onnx.load(str(path)).graph.initializer)


def written(model: Any, path: Path, runtime: str = "onnxruntime", **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.export_onnx(model, (IDS,), path, runtime=runtime, **options).path


@pytest.mark.parametrize(
    ("w", "width"),
    [
        pytest.param(w, width, marks=[] if width == 100 or w in ("i8/ch", "u4/g128") else pytest.mark.slow)
        for w in ("i8/ch", "u8/ch", "i8", "i4/g32", "u4/g128", "u2/g64", "i3/g32", "u8/g16")
        for width in (96, 128, 100)
    ],
)
def test_once_and_right(tmp_path: Path, w: str, width: int) -> None:
    rules = [{"target": "linear", "w": "i8/ch"}, {"target": "tied", "w": w}]
    model = qfx.quantize(Tied(width).eval(), Recipe.parse({"name": "tied", "rules": rules}), data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx")
    with torch.no_grad():
        assert sqnr(model(IDS), in_ort(path, ids=IDS)) > 35
    graph = onnx.load(str(path)).graph
    (gather,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    (head,) = (node for node in graph.node if node.op_type == "MatMulNBits" and node.input[1] == gather.input[0])
    held = {t.name: t for t in graph.initializer}
    assert len(held[head.input[1]].dims) == 3
    bits = {"i3/g32": 4}.get(w, int(w[1]))
    padded = {"u4/g128": 128, "u2/g64": 128, "u8/g16": -(-width // 16) * 16}.get(w, 128 if width > 96 else 96)
    if "/g" in w:
        assert np.prod(held[head.input[1]].dims) == 90 * padded * bits // 8
    others = sum(np.prod(t.dims) >= 90 * width * bits // 8 and t.data_type != 1 for t in graph.initializer)
    assert others == 2  # the table, and the linear's own weight, which is as large
    assert not any(t.data_type == 1 and np.prod(t.dims) >= 90 * width // 4 for t in graph.initializer)


@pytest.mark.parametrize("w", ["i4/g32", "u4/g128", "u2/g64", "i3/g32", "i8/ch", "nf4/g32", "f8e4m3/ch", "i4/g20"])
def test_by_the_standard_as_well(tmp_path: Path, w: str) -> None:
    """The table lies twice there, as rows and as columns, but never in floats."""
    rules = [{"target": "linear", "w": "i8/ch"}, {"target": "tied", "w": w}]
    model = qfx.quantize(Tied(100).eval(), Recipe.parse({"name": "tied", "rules": rules}), data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx", "standard")
    graph = onnx.load(str(path)).graph
    assert {node.domain for node in graph.node} == {""}
    assert not any(t.data_type == 1 and np.prod(t.dims) >= 90 * 100 // 4 for t in graph.initializer)
    with torch.no_grad():
        wanted = model(IDS)
    assert sqnr(wanted, in_ort(path, ids=IDS)) > 35
    assert sqnr(wanted, in_openvino(path)) > 110


def in_openvino(path: Path) -> Tensor:
    import openvino

    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return torch.from_numpy(np.array(core.compile_model(core.read_model(str(path)), "CPU", exact)([IDS.numpy()])[0]))


@pytest.mark.parametrize("recipe", ["w4a16", "w2a16"])
def test_presets_store_a_tied_table_once(tmp_path: Path, recipe: str) -> None:
    model = qfx.quantize(Tied(256).eval(), recipe, data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx")
    with torch.no_grad():
        assert sqnr(model(IDS), in_ort(path, ids=IDS)) > 35
    assert sum(np.prod(t.dims) == 90 * 128 for t in onnx.load(str(path)).graph.initializer) == 1


def test_beside_the_file_it_has_two_names_and_one_place(tmp_path: Path) -> None:
    """ONNX Runtime lets go of what it packs where nothing else has its name; the bytes are there once."""
    model = qfx.quantize(Tied(256).eval(), "w4a16", data=[(IDS,)])
    inside = written(model, tmp_path / "inside.onnx")
    path = written(model, tmp_path / "m.onnx", external_bytes=0)
    graph = onnx.load(str(path), load_external_data=False).graph
    (gather,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    held = {t.name: t for t in graph.initializer}
    table = held[gather.input[0]]
    (head,) = (held[n.input[1]] for n in graph.node if n.op_type == "MatMulNBits" and 90 in held[n.input[1]].dims)
    assert table.name == f"{head.name}.second"
    assert list(table.dims) == list(head.dims)
    assert list(table.external_data) == list(head.external_data)
    places = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "offset"]
    assert len(places) == len(set(places)) + 1
    assert inside.stat().st_size > (tmp_path / "m.onnx.data").stat().st_size - 4096 * len(places)
    assert not any(t.name.endswith(".second") for t in onnx.load(str(inside)).graph.initializer)
    assert torch.equal(in_ort(path, ids=IDS), in_ort(inside, ids=IDS))


def test_compiled_too() -> None:
    """One tensor in the session serves both, and the report says what runs."""
    compiled = torch.compile(Tied(256).eval(), backend="qfx", options={"recipe": "w4a16", "cache": False})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", QfxWarning)
        compiled(IDS)
    rows = {row.node: row for row in qfx.report(compiled)}
    assert rows["embedding"].kernel == "GatherBlockQuantized 4-bit"
    assert rows["embedding"].asked == rows["head"].asked == "w=u4/g32/f16"
    assert rows["head"].kernel == "MatMulNBits 4-bit, blocks of 32, 8-bit activations"
    assert rows["head"].shared
    torch._dynamo.reset()


def test_two_formats_are_stored_twice_and_told() -> None:
    rules = [{"target": "linear", "w": "i4/g32"}, {"target": "embedding", "w": "i8/ch"}]
    with pytest.warns(QfxWarning, match=r"stored twice(.|\n)*a rule with target 'tied'"):
        qfx.quantize(Tied(96).eval(), Recipe.parse({"name": "two", "rules": rules}), data=[(IDS,)])


def test_other_tables_stay_rows(tmp_path: Path) -> None:
    """With 8-bit activations the last layer reads columns, and rows are gathered as they are stored."""
    model = qfx.quantize(Tied(128).eval(), "w8a8", data=[(IDS,)])
    path = qfx.export_onnx(model, (IDS,), tmp_path / "m.onnx").path
    assert tables(path) == 3
