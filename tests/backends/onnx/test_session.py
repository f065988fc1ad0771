"""Sessions: threads follow torch's, nothing is copied at the boundary, what is saved runs the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor

from qfx.backends.onnx import session as module
from qfx.backends.onnx.session import Session, SessionError
from qfx.errors import QfxWarning

FLOAT = onnx.TensorProto.FLOAT


def model(nodes: list[Any], shape: list[Any], weights: dict[str, Tensor] | None = None) -> onnx.ModelProto:
    """x -> y, with weights that stay outside."""
    x, y = (helper.make_tensor_value_info(name, FLOAT, shape) for name in "xy")
    kept = []
    for name, tensor in (weights or {}).items():
        kind = {torch.float32: FLOAT, torch.uint8: onnx.TensorProto.UINT8, torch.bool: onnx.TensorProto.BOOL}
        proto = onnx.TensorProto(name=name, data_type=kind[tensor.dtype], dims=tensor.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        proto.external_data.add(key="location", value="weights")
        kept.append(proto)
    graph = helper.make_graph(nodes, "test", [x], [y], kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def matmul(size: int = 64) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    weights = {"w": torch.randn(size, size, generator=torch.Generator().manual_seed(1))}
    return model([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm/0")], ["n", size], weights), weights


def nbits(size: int = 64) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = {
        "w": torch.randint(0, 255, (size, 1, size // 2), dtype=torch.uint8, generator=generator),
        "s": torch.rand(size, 1, generator=generator),
        "v": torch.randint(0, 255, (size, 1, size // 2), dtype=torch.uint8, generator=generator),
    }
    given = {"K": size, "N": size, "bits": 4, "block_size": 64, "accuracy_level": 4, "domain": "com.microsoft"}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["h"], name="a/0", **given),
        helper.make_node("MatMulNBits", ["h", "v", "s"], ["y"], name="b/0", **given),
    ]
    return model(nodes, ["n", size], weights), weights


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads with which sessions were made."""
    found: list[int] = []
    options = module.options

    def counted(count: int) -> Any:
        found.append(count)
        return options(count)

    monkeypatch.setattr(module, "options", counted)
    return found


@pytest.mark.usefixtures("own_threads")
def test_sessions_have_the_threads_that_torch_has_at_the_call(created: list[int]) -> None:
    torch.set_num_threads(2)
    session, x = Session(*matmul()), torch.randn(3, 64)
    want = session.run([x])[0]
    for count in (1, 1, 2, 1):
        torch.set_num_threads(count)
        assert torch.equal(session.run([x])[0], want)
    assert created == [2, 1], "one session for each number, made once"
    torch.set_num_threads(3)
    session.run([x])
    torch.set_num_threads(2)
    session.run([x])
    assert created == [2, 1, 3, 2], "two are kept, the oldest goes"
    assert list(session._sessions) == [3, 2]


@pytest.mark.usefixtures("own_threads")
def test_a_saved_model_that_is_gone_goes_on_with_the_session_there_is(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    built, weights = matmul()
    Session(built, weights, save=tmp_path / "0")
    session, x = Session.open(tmp_path / "0.onnx"), torch.randn(3, 64)
    want = session.run([x])[0]
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(session.run([x])[0], want), "its files are mapped, removed or not"
    torch.set_num_threads(2)
    with pytest.warns(QfxWarning, match=r"no session with 2 thread\(s\) can be made, the one with 1 goes on"):
        assert torch.equal(session.run([x])[0], want)
    assert torch.equal(session.run([x])[0], want), "told once"


def test_weights_of_booleans_and_of_bytes_are_what_they_are() -> None:
    keep, other = torch.arange(2000) % 3 > 0, torch.arange(2000).to(torch.uint8)
    nodes = [
        helper.make_node("Cast", ["other"], ["o"], name="o/0", to=FLOAT),
        helper.make_node("Where", ["keep", "x", "o"], ["y"], name="y/0"),
    ]
    x = torch.randn(2, 2000)
    (y,) = Session(model(nodes, ["n", 2000], {"keep": keep, "other": other}), {"keep": keep, "other": other}).run([x])
    assert torch.equal(y, torch.where(keep, x, other.float()))


@pytest.mark.parametrize("make", [matmul, nbits])
def test_what_is_saved_runs_the_same(make: Any, tmp_path: Path) -> None:
    built, weights = make()
    first = Session(built, weights, save=tmp_path / "0")
    again, x = Session.open(tmp_path / "0.onnx"), torch.randn(5, 64)
    assert torch.equal(first.run([x])[0], again.run([x])[0])
    assert (again.inputs, again.outputs) == (first.inputs, first.outputs) == (["x"], ["y"])


def test_only_what_packs_alone_is_saved_packed(tmp_path: Path) -> None:
    for make, packed in ((matmul, True), (nbits, False)):
        built, weights = make()
        Session(built, weights, save=tmp_path / "0")
        saved = onnx.load(str(tmp_path / "0.onnx"), load_external_data=False)
        keys = {entry.key for t in saved.graph.initializer for entry in t.external_data}
        assert any(key.startswith("prepacked") for key in keys) == packed


def test_kernels_that_may_pack_otherwise_are_saved_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKS_ALONE", {"Gemm"})
    built, weights = matmul()
    first, x = Session(built, weights, save=tmp_path / "0"), torch.randn(2, 64)
    saved = onnx.load(str(tmp_path / "0.onnx"), load_external_data=False)
    assert not any(e.key.startswith("prepacked") for t in saved.graph.initializer for e in t.external_data)
    assert torch.equal(Session.open(tmp_path / "0.onnx").run([x])[0], first.run([x])[0])


def test_a_file_that_is_no_model_is_a_session_error(tmp_path: Path) -> None:
    (tmp_path / "0.onnx").write_bytes(b"nothing")
    with pytest.raises(SessionError, match="ONNX"):
        Session.open(tmp_path / "0.onnx")
    with pytest.raises(SessionError, match="NO_SUCHFILE"):
        Session.open(tmp_path / "none.onnx")


def test_contiguous_inputs_are_read_where_they_lie_and_outputs_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model([helper.make_node("Relu", ["x"], ["y"], name="relu/0")], ["n", 8]), {})
    bound: list[int] = []
    original = module.input_place

    def place(tensor: Tensor) -> int:
        bound.append(original(tensor))
        return bound[-1]

    monkeypatch.setattr(module, "input_place", place)
    x = torch.randn(3, 8)
    (y,) = session.run([x])
    assert bound == [x.data_ptr()], "the input is bound, not copied"
    assert torch.equal(y, x.relu()) and y.is_contiguous()
    strided = torch.randn(8, 3).t()
    (y,) = session.run([strided])
    assert bound[1] != strided.data_ptr() and torch.equal(y, strided.relu()), "others are made contiguous"
    (empty,) = session.run([torch.empty(0, 8)])
    assert empty.shape == (0, 8)


def test_large_inputs_and_outputs_cost_no_memory_of_their_own() -> None:
    session = Session(model([helper.make_node("Relu", ["x"], ["y"], name="relu/0")], ["n"]), {})
    x = torch.ones(16 << 20)
    session.run([x[:1024]])
    before = _anonymous()
    (y,) = session.run([x])
    assert _anonymous() - before < 1.3 * x.nbytes, "the output alone"
    assert y.sum() == x.numel()


def _anonymous() -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no /proc on this system")
    line = next(line for line in path.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
