"""OpenVINO sessions: torch's memory at the boundary, threads as torch has them, refusals that say why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qfx.backends.openvino.session import Session, SessionError

KINDS = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}
KINDS |= {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16, torch.uint8: TensorProto.UINT8}


def file(path: Path, node: onnx.NodeProto, given: torch.dtype, made: torch.dtype, shape: list[int | str]) -> Path:
    x, y = (helper.make_tensor_value_info(n, KINDS[d], shape) for n, d in (("x", given), ("y", made)))
    graph = helper.make_graph([node], "test", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def relu(path: Path, shape: list[int | str]) -> Session:
    return Session(
        file(path / "relu.onnx", helper.make_node("Relu", ["x"], ["y"]), torch.float32, torch.float32, shape)
    )


@pytest.mark.parametrize("shape", [[3, 4], ["n", 4], ["n", "m"]])
def test_results_stay_what_they_are_after_the_next_call(tmp_path: Path, shape: list[int | str]) -> None:
    session = relu(tmp_path, shape)
    xs = [torch.randn(3, 4) for _ in range(3)]
    found = [session.run([x])[0] for x in xs]
    for x, y in zip(xs, found, strict=True):
        assert torch.allclose(y, x.relu(), atol=2e-2) and y.data_ptr() != x.data_ptr()
    assert len({y.data_ptr() for y in found}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_type_comes_back(tmp_path: Path, dtype: torch.dtype, dynamic: bool) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    shape: list[int | str] = ["n", 5] if dynamic else [2, 5]
    x = (torch.arange(10).reshape(2, 5) % 2).to(dtype)
    y = Session(file(tmp_path / "same.onnx", node, dtype, dtype, shape)).run([x])[0]
    assert y.dtype == dtype and torch.equal(y, x)


def test_inputs_that_are_not_contiguous(tmp_path: Path) -> None:
    x = torch.randn(4, 3).T
    assert torch.allclose(relu(tmp_path, [3, 4]).run([x])[0], x.relu(), atol=2e-2)


@pytest.mark.parametrize("shape", [[3, 4], ["n", "m"]])
def test_a_tensor_changed_in_place_is_read_again(tmp_path: Path, shape: list[int | str]) -> None:
    session, x = relu(tmp_path, shape), torch.ones(3, 4)
    first = session.run([x])[0]
    x.fill_(5.0)
    assert torch.equal(session.run([x])[0], torch.full((3, 4), 5.0)) and torch.equal(first, torch.ones(3, 4))


def test_another_shape_of_the_same_memory(tmp_path: Path) -> None:
    session, x = relu(tmp_path, ["n", "m"]), torch.arange(-6.0, 6.0)
    for shape in ((3, 4), (4, 3), (2, 6), (4, 3)):
        assert torch.equal(session.run([x.view(shape)])[0], x.view(shape).relu())


def test_a_part_of_the_same_memory(tmp_path: Path) -> None:
    session, x = relu(tmp_path, [2, 4]), torch.arange(-8.0, 8.0).view(4, 4)
    for first in (0, 2, 1):
        rows = x[first : first + 2]
        assert torch.equal(session.run([rows])[0], rows.relu())


def test_memory_that_was_freed_and_used_again(tmp_path: Path) -> None:
    session = relu(tmp_path, [64, 64])
    places = set()
    for i in range(20):  # the allocator gives the same places again
        x = torch.full((64, 64), float(i))
        places.add(x.data_ptr())
        assert torch.equal(session.run([x])[0], x)
        del x
    assert len(places) < 20, "no place came twice: this tests nothing"


def test_an_input_that_needs_gradients(tmp_path: Path) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = relu(tmp_path, [3, 4]).run([x])[0]
    assert torch.allclose(y, x.detach().relu(), atol=2e-2) and not y.requires_grad


def test_what_lies_where_it_did_is_not_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, x = relu(tmp_path, [3, 4]), torch.randn(3, 4)
    told: list[object] = []
    session.run([x])
    inputs = session._requests.bound.inputs
    tell = inputs._tell

    def listening(*given: object) -> None:
        told.append(given)
        tell(*given)

    monkeypatch.setattr(inputs, "_tell", listening)
    session.run([x])
    assert not told
    other = x.clone()
    session.run([other])
    assert len(told) == 1


def test_a_refused_input_leaves_the_session_usable(tmp_path: Path) -> None:
    session, x = relu(tmp_path, [3, 4]), torch.randn(3, 4)
    expected = session.run([x])[0]
    with pytest.raises(RuntimeError):
        session.run([torch.randn(2, 4)])
    assert torch.equal(session.run([x])[0], expected)


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert relu(tmp_path, ["n", 4]).run([torch.zeros(0, 4)])[0].shape == (0, 4)


@pytest.mark.usefixtures("own_threads")
def test_threads_follow_torch_and_the_last_two_are_kept(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    session, x = relu(tmp_path, [3, 4]), torch.randn(3, 4)
    seen = []
    for count in (1, 2, 1, 3, 1):
        torch.set_num_threads(count)
        assert torch.allclose(session.run([x])[0], x.relu(), atol=2e-2)
        seen.append(list(session._compiled))
    assert seen == [[1], [1, 2], [1, 2], [2, 3], [3, 1]]
    made = [c.get_property("INFERENCE_NUM_THREADS") for c in session._compiled.values()]
    assert made == [min(count, len(os.sched_getaffinity(0))) for count in (3, 1)], "no more than there are processors"


def test_calls_from_several_threads(tmp_path: Path) -> None:
    session = relu(tmp_path, ["n", 8])
    wrong: list[Tensor] = []

    def work(seed: int) -> None:
        x = torch.randn(seed + 1, 8, generator=torch.Generator().manual_seed(seed))
        for _ in range(50):
            y = session.run([x])[0]
            if not torch.allclose(y, x.relu(), atol=2e-2):
                wrong.append(y)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(SessionError) as caught:
        Session(path)
    assert caught.value.reason.startswith("OpenVINO refuses it: ")


def test_an_operator_that_it_does_not_have(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="com.microsoft")
    path = file(tmp_path / "other.onnx", node, torch.float32, torch.float32, [2])
    with pytest.raises(SessionError, match="NoSuchOperator"):
        Session(path)


_GATED = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
import qfx

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((64, 128), (64, 128), (128, 64)))

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
model, x = Gated().eval(), torch.randn(2, 8, 64)
float_rule = {"name": "float", "rules": [{"target": "linear", "w": "f32"}]}
fast = torch.compile(model, backend="qfx", options={"backend": "openvino", "recipe": float_rule, "cache": False})
with torch.no_grad():
    assert (fast(x) - model(x)).abs().max() < float(sys.argv[2])
"""


@pytest.mark.parametrize(("threads", "error"), [(1, 1e-5), (2, 5e-2)])
def test_a_gated_mlp_in_float_runs_in_one_thread(threads: int, error: float) -> None:
    """In a process of its own: OpenVINO's kernel for it, in bf16, ends the process where there is one thread."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _GATED, str(threads), str(error)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
