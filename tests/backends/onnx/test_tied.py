"""A table that is an embedding and the last layer's weight lies in a model once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends.onnx import lower, quant_weights
from qfx.errors import QfxWarning
from qfx.recipe import Recipe
from tests.backends.onnx.checks import in_ort, sqnr
from tests.graphs import capture

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


def loaded(path: Path, **entries: str) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static"])
@pytest.mark.parametrize("width", [64, 100])
def test_beside_integer_activations_it_lies_as_rows(tmp_path: Path, recipe: str, width: int) -> None:
    """The last layer reads columns: the rows are turned when the file is loaded, and no call turns them."""
    model = qfx.quantize(Tied(width).eval(), recipe, data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx")
    assert tables(path) == (1 if width * width < 90 * 64 else 2)  # the linear's own weight may be as large
    graph = onnx.load(str(path)).graph
    (turned,) = (node for node in graph.node if node.op_type == "Transpose" and "codes" in node.input[0])
    (gather,) = (n for n in graph.node if n.op_type == "Gather" and n.input[0] == turned.input[0])
    held = {t.name: t for t in graph.initializer}
    assert list(held[gather.input[0]].dims) == [90, width]
    assert sum(t.data_type == 1 and np.prod(t.dims) == 90 for t in graph.initializer) == 1, "one scale a row, once"
    kinds = [node.op_type for node in loaded(path).node]
    assert "Transpose" not in kinds
    assert kinds.count("MatMulIntegerToFloat") == 2
    with torch.no_grad():
        assert sqnr(model(IDS), in_ort(path, ids=IDS)) > 100


def test_the_control_sees_a_table_that_is_not_turned(tmp_path: Path) -> None:
    """Of as many rows as columns: codes read the wrong way fit, and give other numbers."""
    model = qfx.quantize(Tied(90).eval(), "w8a8", data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx")
    file = onnx.load(str(path))
    (turned,) = (node for node in file.graph.node if node.op_type == "Transpose" and "codes" in node.input[0])
    turned.op_type = "Identity"
    del turned.attribute[:]
    onnx.save(file, str(path))
    with torch.no_grad():
        assert sqnr(model(IDS), in_ort(path, ids=IDS)) < 10


def test_where_sums_would_overflow_it_is_turned_too(tmp_path: Path) -> None:
    """The exact path of processors without VNNI makes u8 weights of the turned table."""
    model = qfx.quantize(Tied(100).eval(), "w8a8", data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx")
    graph = loaded(path, x64quantprecision="1")
    held = {t.name: t.data_type for t in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert [held[node.input[1]] for node in products] == [onnx.TensorProto.UINT8] * 2
    assert "Transpose" not in {node.op_type for node in graph.node}


class TwoHeads(Tied):
    """The table is read by two products."""

    def forward(self, ids: Tensor) -> Tensor:
        y = self.linear(self.embedding(ids))
        both: Tensor = self.head(y) + nn.functional.linear(torch.tanh(y), self.head.weight)
        return both


def test_a_second_product_has_columns_of_its_own(tmp_path: Path) -> None:
    path = written(TwoHeads(64).eval(), tmp_path / "m.onnx", recipe="w8a8")
    graph = onnx.load(str(path)).graph
    assert sum(node.op_type == "Transpose" for node in graph.node) == 1
    assert sum(sorted(t.dims) == [64, 90] for t in graph.initializer) == 2
    assert "Transpose" not in {node.op_type for node in loaded(path, x64quantprecision="1").node}


def test_tables_that_onnx_runtime_would_turn_in_each_call_lie_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_weights, "MOST_FOLDED", 90 * 64 - 1)
    model = qfx.quantize(Tied(64).eval(), "w8a8", data=[(IDS,)])
    graph = onnx.load(str(written(model, tmp_path / "m.onnx"))).graph
    assert sorted(sorted(t.dims) for t in graph.initializer if np.prod(t.dims) == 90 * 64) == [[64, 90], [64, 90]]
    assert not any(node.op_type == "Transpose" for node in graph.node)


def test_turned_tables_have_two_names_and_one_place(tmp_path: Path) -> None:
    model = qfx.quantize(Tied(256).eval(), "w8a8", data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx", external_bytes=0)
    graph = onnx.load(str(path), load_external_data=False).graph
    held = {t.name: t for t in graph.initializer}
    (turned,) = (node for node in graph.node if node.op_type == "Transpose" and node.input[0] in held)
    (gather,) = (n for n in graph.node if n.op_type == "Gather" and n.input[0].startswith(turned.input[0]))
    assert gather.input[0] == f"{turned.input[0]}.second"
    assert list(held[gather.input[0]].external_data) == list(held[turned.input[0]].external_data)
    inside = written(model, tmp_path / "inside.onnx")
    assert torch.equal(in_ort(path, ids=IDS), in_ort(inside, ids=IDS))
    assert qfx.onnx.check(path)["qfx.runtime"] == "onnxruntime"


def test_other_programs_find_one_name(tmp_path: Path) -> None:
    """They may hold in memory what each name stands for."""
    model = qfx.quantize(Tied(256).eval(), "w8a8", data=[(IDS,)])
    path = written(model, tmp_path / "m.onnx", "standard", external_bytes=0)
    graph = onnx.load(str(path), load_external_data=False).graph
    assert sum(sorted(t.dims) == [90, 256] for t in graph.initializer) == 1
    with torch.no_grad():
        assert sqnr(model(IDS), in_ort(path, ids=IDS)) > 100
        assert sqnr(model(IDS), in_openvino(path)) > 100


def test_compiled_the_session_turns_the_models_own_memory() -> None:
    """No copy as columns is held for the session, in which the product of integers stays."""
    model = qfx.quantize(Tied(100).eval(), "w8a8", data=[(IDS,)])
    gm = capture(model, IDS)
    (built,) = lower(gm).models
    assert sorted(sorted(w.shape) for w in built.weights.values() if w.numel() == 90 * 100) == [[90, 100]]
    compiled: Any = torch.compile(model, backend="qfx", options={"cache": False})
    with torch.no_grad():
        assert sqnr(model(IDS), compiled(IDS)) > 100
    rows = {row.node: row for row in qfx.report(compiled)}
    assert rows["head"].kernel.startswith("MatMulIntegerToFloat u8 x s8")
    assert rows["embedding"].kernel == "Gather int8"
    torch._dynamo.reset()


def test_by_the_standard_weights_of_fixed_scales_stay_columns(tmp_path: Path) -> None:
    """OpenVINO multiplies integers only where they lie as columns, or are turned by no other node."""
    model = qfx.quantize(Tied(100).eval(), "w8a8-static", data=[(IDS,)])
    graph = onnx.load(str(written(model, tmp_path / "m.onnx", "standard"))).graph
    assert sorted(list(t.dims) for t in graph.initializer if np.prod(t.dims) == 90 * 100) == [[90, 100], [100, 90]]


def test_kept_on_disk_it_is_turned_already(tmp_path: Path) -> None:
    """What a later process opens holds the packed columns and the rows, and turns nothing."""
    model, found = qfx.quantize(Tied(100).eval(), "w8a8", data=[(IDS,)]), []
    for _ in range(2):
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="qfx", options={"cache": str(tmp_path)})
        with torch.no_grad():
            found.append(compiled(IDS))
    assert torch.equal(*found)
    (saved,) = tmp_path.rglob("0.onnx")
    kinds = [node.op_type for node in onnx.load(str(saved), load_external_data=False).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2
    assert "Transpose" not in kinds
    torch._dynamo.reset()
