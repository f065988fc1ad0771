"""The runner of files: memory that stays is bound once, memory that moves anew, and threads do not meet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends.onnx.runner import Runner


class Grown(nn.Module):
    """y = x + past, grown = 2 * past."""

    def forward(self, x: Tensor, past: Tensor) -> dict[str, Tensor]:
        return {"y": x + past, "grown": past * 2, "any": (x > 0).any(-1)}


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    qfx.export_onnx(Grown(), {"x": torch.ones(3, 4), "past": torch.ones(3, 4)}, tmp_path / "m.onnx")
    return Runner(tmp_path / "m.onnx", 1)


class Counting:
    """A binding that counts what is bound by name."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)

    def bind_input(self, name: str, *rest: Any) -> None:
        self.names.append(name)
        self.binding.bind_input(name, *rest)

    def bind_output(self, name: str, *rest: Any) -> None:
        self.names.append(name)
        self.binding.bind_output(name, *rest)


def test_what_lies_where_it_did_is_not_bound_again(runner: Runner) -> None:
    binding, places = runner._binding()
    counting = Counting(binding)
    runner._bound.binding = counting
    past, x, grown = torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    runner.run({"x": x, "past": past}, {"grown": grown})
    assert sorted(counting.names) == ["any", "grown", "past", "x", "y"]
    counting.names.clear()
    past += 1
    found = runner.run({"x": x, "past": past}, {"grown": grown})
    assert sorted(counting.names) == ["any", "y"]
    assert set(places) == {"x", "past", "grown"}
    assert torch.equal(found["y"], torch.full((3, 4), 2.0))
    assert torch.equal(grown, torch.full((3, 4), 4.0))


def test_values_that_were_read_leave_memory(runner: Runner) -> None:
    assert not runner.session.get_session_options().enable_mem_reuse


def test_memory_that_moved_is_found(runner: Runner) -> None:
    for value in (1.0, 2.0, 3.0):
        x, past = torch.full((2, 5), value), torch.full((2, 5), 10 * value)
        found = runner.run({"x": x, "past": past})
        assert torch.equal(found["y"], x + past)
        assert torch.equal(found["grown"], past * 2)
        assert found["any"].dtype == torch.bool


def test_results_stay_as_they_were_given(runner: Runner) -> None:
    first = runner.run({"x": torch.ones(2, 2), "past": torch.ones(2, 2)})
    kept = first["y"].clone()
    runner.run({"x": torch.zeros(2, 2), "past": torch.zeros(2, 2)})
    assert torch.equal(first["y"], kept)


def test_an_output_goes_where_each_call_asks(runner: Runner) -> None:
    feeds = {"x": torch.ones(2, 3), "past": torch.ones(2, 3)}
    own = torch.zeros(2, 3)
    assert runner.run(feeds, {"grown": own})["grown"] is own
    other = runner.run(feeds)["grown"]
    assert other.data_ptr() != own.data_ptr()
    own.zero_()
    runner.run(feeds, {"grown": own})
    assert torch.equal(own, torch.full((2, 3), 2.0))


def test_sizes_may_change_in_the_same_memory(runner: Runner) -> None:
    memory = torch.arange(12.0)
    for shape in ((3, 4), (2, 6), (4, 3)):
        x = memory.view(shape)
        assert torch.equal(runner.run({"x": x, "past": x})["y"], 2 * x)


def test_threads_have_bindings_of_their_own(runner: Runner) -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(50):
            found = runner.run({"x": torch.full((3, 3), value), "past": torch.full((3, 3), value)})
            if not bool((found["y"] == 2 * value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inputs_that_do_not_fit(runner: Runner) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"expected: past torch\.float32"):
        runner.run({"x": x})
    with pytest.raises(ValueError, match="unknown z"):
        runner.run({"x": x, "past": x, "z": x})
    with pytest.raises(ValueError, match=r"found: x torch\.float64"):
        runner.run({"x": x.double(), "past": x})


class Sound(nn.Module):
    """Samples as a microphone gives them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 2**15


def test_inputs_of_16_bit_integers(tmp_path: Path) -> None:
    x = torch.tensor([[-(2**15), 3, 2**15 - 1], [0, 1, 2]], dtype=torch.int16)
    loaded = qfx.onnx.load(qfx.export_onnx(Sound(), (x,), tmp_path / "m.onnx").path)
    torch.testing.assert_close(loaded(x=x)["output"], x.float() / 2**15)


def test_shapes_that_do_not_fit(runner: Runner, tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"expected: x \[batch, x_dim1\]\n  found: x \[4\]"):
        runner.run({"x": x[0], "past": x})
    with pytest.raises(ValueError, match=r"expected: past \[batch, x_dim1\]\n  found: past \[3, 4\]"):
        runner.run({"x": x, "past": torch.ones(3, 4)})
    assert torch.equal(runner.run({"x": x, "past": x})["y"], x * 2), "the next call is as any other"
    fixed = qfx.onnx.load(qfx.export_onnx(nn.ReLU(), (x[:1],), tmp_path / "fixed.onnx").path)
    with pytest.raises(ValueError, match=r"expected: input \[1, input_dim1\]\n  found: input \[2, 4\]"):
        fixed(input=x)


def test_a_file_that_onnx_runtime_refuses_is_named(tmp_path: Path) -> None:
    path = qfx.export_onnx(nn.Linear(8, 8).eval(), (torch.ones(2, 8),), tmp_path / "m.onnx", recipe="w8a8").path
    data = path.read_bytes()
    assert data.count(b"DynamicQuantizeMatMul") == 1 or data.count(b"MatMulInteger") == 1
    path.write_bytes(data.replace(b"MatMul", b"MatNul"))
    with pytest.raises(ValueError, match=r"ONNX Runtime .* does not open .*m\.onnx: .*MatNul(.|\n)*export it anew"):
        qfx.onnx.load(path)
