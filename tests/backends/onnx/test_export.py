"""Files of an export: whole or not at all, checked, deterministic, their weights made one by one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor, nn

import qfx
from qfx.backends.onnx import export
from qfx.backends.onnx.export import verify
from tests.backends.onnx.checks import in_ort


class Model(nn.Module):
    """Two linears; `logits` is one of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.down(torch.relu(self.up(x)))
        return {"logits": y, "states": [x + 1, y * 2 if scale is None else y * scale]}


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def write(folder: Path, **options: Any) -> Path:
    return qfx.export_onnx(Model().eval(), (X,), folder / "m.onnx", recipe="w8a8", **options).path


def test_names_shapes_and_documents(tmp_path: Path) -> None:
    model = onnx.load(str(write(tmp_path)))
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["logits", "states.0", "states.1"]
    sizes = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "x_dim1", 64]
    assert "up: linear" in {node.doc_string for node in model.graph.node}
    assert model.producer_name == "qfx"


class _Named(nn.Module):
    """A parameter that is called like the input."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.ones(64))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input * 2 + self.input


def test_an_input_is_called_as_the_forward_calls_it(tmp_path: Path) -> None:
    """FX has no values called `input`, as that of torch.nn's own modules is."""
    written = qfx.export_onnx(nn.Sequential(nn.Linear(64, 32), nn.ReLU()).eval(), X, tmp_path / "m.onnx")
    assert written.inputs == ("input",)
    assert in_ort(written.path, input=X).shape == (2, 5, 32)
    model = _Named()
    named = qfx.export_onnx(model, X, tmp_path / "n.onnx")  # a parameter has the name: one of them has another
    found = in_ort(named.path, **{named.inputs[0]: X})
    torch.testing.assert_close(found, model(X).detach())


def test_weights_beside_a_model_go_with_it(tmp_path: Path) -> None:
    write(tmp_path, external_bytes=0)
    write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    (tmp_path / "m.onnx.data").write_bytes(b"of another program")
    write(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_metadata_tells_the_formats(tmp_path: Path) -> None:
    metadata = verify(write(tmp_path))
    assert json.loads(metadata["qfx.formats"]) == {n: {"x": "i8/tok", "w": "i8/ch"} for n in ("up", "down")}
    assert metadata["qfx.runtime"] == "onnxruntime"
    assert json.loads(metadata["qfx.versions"])["qfx"] == qfx.__version__


@pytest.mark.parametrize("external", [0, 1 << 30])
def test_bytes_are_the_same_each_time(tmp_path: Path, external: int) -> None:
    first, second = (write(tmp_path / name, external_bytes=external) for name in ("a", "b"))
    names = sorted(p.name for p in first.parent.iterdir())
    assert names == (["m.onnx"] if external else ["m.onnx", "m.onnx.data"])
    for name in names:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


def test_large_weights_beside_the_model_begin_at_pages(tmp_path: Path) -> None:
    """Many small ones would take more bytes between them than in them."""
    path = tmp_path / "m.onnx"
    model = nn.Sequential(nn.Linear(256, 300), nn.LayerNorm(300), nn.Linear(300, 256), nn.Linear(256, 8)).eval()
    written = qfx.export_onnx(model, torch.randn(2, 256), path, recipe="w8a8", external_bytes=0)
    found = onnx.load(str(path), load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in found.graph.initializer if t.external_data]
    assert {e["location"] for e in entries} == {"m.onnx.data"}
    places = sorted((int(e["offset"]), int(e["length"])) for e in entries)
    large, small = ([offset for offset, size in places if (size >= 1 << 16) == many] for many in (True, False))
    assert len(large) == 2
    assert len(small) >= 3
    assert all(offset % 4096 == 0 for offset in large)
    assert all(offset % 64 == 0 for offset in small)
    between = written.files[1].stat().st_size - sum(size for _, size in places)
    assert max(large) < min(small), "else a large one begins at a page again after each small one"
    assert 0 <= between < 2 * 4096 + 64 * len(small)
    onnx.checker.check_model(str(path))


def test_what_is_cut_short_altered_or_missing_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, external_bytes=0)
    beside = tmp_path / "m.onnx.data"
    whole, model = beside.read_bytes(), path.read_bytes()
    beside.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"m\.onnx\.data was altered or is cut short"):
        verify(path)
    beside.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="sha256"):
        verify(path)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="which is missing"):
        verify(path)
    beside.write_bytes(whole)
    assert verify(path)
    path.write_bytes(model[: len(model) // 2])
    with pytest.raises(ValueError, match="no ONNX model can be read"):
        verify(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        verify(tmp_path / "other.onnx")


@pytest.mark.parametrize("external", [0, 1 << 30])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: int) -> None:
    path = write(tmp_path, external_bytes=external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_write_weights" if external == 0 else "_serialized", full)
    with pytest.raises(OSError, match="the disk is full; nothing was changed"):
        write(tmp_path, external_bytes=external)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert verify(path)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a folder is needed here"):
        write(tmp_path / "file")


def test_one_flipped_bit_of_a_weight_in_the_file_is_told(tmp_path: Path) -> None:
    """Of those that are written in parts, and of those that the model holds itself."""
    path = write(tmp_path)
    whole = path.read_bytes()
    held = [t.raw_data for t in onnx.load(str(path)).graph.initializer if whole.count(t.raw_data) == 1]
    assert verify(path) and {64 * 96, 4 * 96} <= {len(raw) for raw in held}, "a weight and its scales or bias"
    for raw in held:
        data = bytearray(whole)
        data[whole.index(raw)] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"m\.onnx was altered(.|\n)*weights that are not those"):
            verify(path)
    model = onnx.ModelProto.FromString(whole)
    path.write_bytes(model.SerializeToString())
    assert verify(path), "other programs may write it again"


def test_small_weights_lie_in_the_file_and_others_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1 << 20)
    for width, count in ((512, 1), (1536, 2)):
        linear = nn.Linear(width, width).eval()
        files = qfx.export_onnx(linear, (torch.ones(2, width),), tmp_path / f"{width}.onnx", recipe="w8a8").files
        assert len(files) == count


def test_what_protobuf_cannot_hold_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_MOST_INLINE", 1000)
    path = write(tmp_path, external_bytes=1 << 62)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1000
    assert verify(path)


def test_a_file_with_its_weights_is_what_protobuf_makes_of_it(tmp_path: Path) -> None:
    """The weights are written one by one; what reads the file sees one message."""
    path = write(tmp_path)
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    assert all(t.data_location == TensorProto.DEFAULT and not t.external_data for t in model.graph.initializer)
    parts = [len(part) for part in export._serialized(model, {})]
    assert sum(parts) == path.stat().st_size == len(model.SerializeToString())
    again = onnx.ModelProto.FromString(b"".join(export._serialized(model, {})))
    assert again == model


@given(value=st.integers(0, 2**40), name=st.text(max_size=300))
def test_fields_are_those_of_protobuf(value: int, name: str) -> None:
    message = TensorProto(name=name)
    text = name.encode()
    assert export._field(message, "name", len(text)) + text == message.SerializeToString() or not name
    assert _read(export._varint(value)) == value


def _read(data: bytes) -> int:
    assert all(byte & 128 for byte in data[:-1]) and data[-1] < 128
    return sum((byte & 127) << 7 * i for i, byte in enumerate(data))


@given(
    parts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    inside=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_what_is_written_in_parts_is_read_whole(parts: list[int], inside: list[bool]) -> None:
    model = onnx.ModelProto(ir_version=10, producer_name="any")
    model.graph.name = "g"
    weights = {}
    for i, size in enumerate(parts):
        tensor = model.graph.initializer.add(name=f"w{i}", data_type=TensorProto.UINT8, dims=[size])
        value = torch.arange(size).to(torch.uint8)
        if inside[i]:
            tensor.raw_data = value.numpy().tobytes()
        else:
            weights[tensor.name] = value
            tensor.data_location = TensorProto.EXTERNAL
    found = onnx.ModelProto.FromString(b"".join(export._serialized(model, weights)))
    assert found.producer_name == "any" and found.graph.name == "g"
    for i, tensor in enumerate(found.graph.initializer):
        assert (tensor.name, list(tensor.dims)) == (f"w{i}", [parts[i]])
        assert tensor.raw_data == torch.arange(parts[i]).to(torch.uint8).numpy().tobytes()
        assert tensor.data_location == TensorProto.DEFAULT


def test_the_checker_sees_the_model_without_its_weights(tmp_path: Path) -> None:
    model = onnx.load(str(write(tmp_path)))
    bare = export._without_weights(model)
    assert bare.ByteSize() < model.ByteSize() / 2
    assert bare.graph.node == model.graph.node and bare.opset_import == model.opset_import
    assert bare.metadata_props == model.metadata_props and bare.ir_version == model.ir_version
    names = {i.name for i in bare.graph.input} | {t.name for t in bare.graph.initializer}
    assert {t.name for t in model.graph.initializer} < names
    onnx.checker.check_model(bare)
