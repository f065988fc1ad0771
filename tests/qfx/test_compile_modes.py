"""torch.compile(backend="qfx"): eval and train, with and without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx.errors import QfxWarning
from qfx.measuring.measure import sqnr_db
from qfx.options import checked_mode
from tests.qfx.conftest import Counts

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TRAINING = r"is for inference, and the model is in train\(\) mode[\s\S]*model.eval\(\)[\s\S]*QAT \(qfx.prepare_qat\)"


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.drop, self.out = nn.Linear(16, 16), nn.Dropout(dropout), nn.Linear(16, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.drop(torch.relu(self.fc(x))))
        return out


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        torch._dynamo.graph_break()
        out: Tensor = self.out(x)
        return out


@pytest.mark.parametrize(("kind", "graphs"), [(Net, 1), (Broken, 2)])
def test_with_gradients_enabled_outputs_are_detached_and_a_warning_says_so(kind: type[Net], graphs: int) -> None:
    model, x = kind(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx")
    with pytest.warns(QfxWarning) as said:
        found = fast(x)
    assert len(said) == graphs
    for warning in said:
        assert "gives detached outputs\n  source: " in str(warning.message)
        assert "next step: call the model under torch.no_grad()" in str(warning.message)
        assert warning.filename == __file__, "the warning points to the model's own code"
    assert not found.requires_grad and sqnr_db(model(x).detach(), found) > 30
    fast(x)  # said once: a warning now would be an error


def test_inputs_with_gradients_are_told_too() -> None:
    model = Net().requires_grad_(requires_grad=False)
    fast, x = torch.compile(model, backend="qfx"), torch.randn(3, 16, requires_grad=True)
    with pytest.warns(QfxWarning, match="detached outputs"):
        assert not fast(x).requires_grad
    plain = torch.compile(model, backend="qfx")
    assert not plain(x.detach()).requires_grad  # nothing to warn about


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_nothing_to_say(mode: Callable[[], Any], counts: Counts) -> None:
    model, x = Net(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx")
    with mode():
        assert sqnr_db(model(x), fast(x)) > 30
        assert sqnr_db(model(x), fast(x)) > 30
    assert counts.graphs == 1


def test_no_grad_and_inference_mode_in_turn(counts: Counts) -> None:
    model, x = Net(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx")
    found = []
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(fast(x))
    assert all(torch.equal(found[0], other) for other in found)
    assert counts.graphs == 2, "one for each mode"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_train_mode_is_refused(dropout: float, mode: Callable[[], Any]) -> None:
    model, x = Net(dropout).train(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx")
    with mode(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=TRAINING) as refused:
        fast(x)
    assert isinstance(refused.value.inner_exception, ValueError)


@torch.no_grad()
def test_what_torch_export_made_refuses_eval_and_is_told_by_its_dropouts() -> None:
    model, x = Net(0.5), torch.randn(3, 16)
    exported = torch.export.export(model, (x,)).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    assert sqnr_db(model(x), torch.compile(exported, backend="qfx", options={"strict": True})(x)) > 30
    noisy = torch.export.export(model.train(), (x,)).module()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=TRAINING):
        torch.compile(noisy, backend="qfx")(x)


def test_a_dropout_that_is_active_without_a_module_in_train_mode_is_refused() -> None:
    def noisy(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)

    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=TRAINING):
        torch.compile(noisy, backend="qfx")(torch.randn(3))

    def quiet(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=False) + nn.functional.dropout(x, 0.0, training=True)

    with torch.no_grad():
        x = torch.randn(3)
        assert torch.allclose(torch.compile(quiet, backend="qfx")(x), 2 * x)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: nn.functional.dropout(input=x, p=0.5, training=False),
        lambda x: torch.dropout(input=x, p=0.5, train=False),
        lambda x: torch.dropout(x, 0.5, train=False),
    ],
)
def test_a_dropout_may_be_called_by_names(drop: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        x = torch.randn(3)
        assert torch.equal(torch.compile(lambda x: drop(x) * 2, backend="qfx", options={"strict": True})(x), 2 * x)


@pytest.mark.parametrize("build", [Net, lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()])
def test_switches_between_eval_and_train(build: Callable[[], nn.Module]) -> None:
    model, x = build(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx")
    with torch.no_grad():
        before = fast(x)
    for mode in (torch.no_grad, torch.inference_mode, nullcontext):
        model.train()
        with mode(), pytest.raises((ValueError, torch._dynamo.exc.BackendCompilerFailed), match=TRAINING):
            fast(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(fast(x), before)


def test_a_part_in_train_mode_is_refused() -> None:
    model = Net(0.5)
    model.drop.train()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=TRAINING):
        torch.compile(model, backend="qfx")(torch.randn(3, 16))


GLOBAL = Net()


def over_a_global(x: Tensor) -> Tensor:
    out: Tensor = GLOBAL(x) + 1
    return out


@pytest.mark.parametrize("place", ["closure", "global"])
def test_a_function_over_a_model(place: str) -> None:
    model, x = GLOBAL if place == "global" else Net(), torch.randn(3, 16)
    fast = torch.compile(over_a_global if place == "global" else lambda x: model(x) + 1, backend="qfx")
    with torch.no_grad():
        assert sqnr_db(model(x) + 1, fast(x)) > 30
    model.train()
    with torch.no_grad(), pytest.raises((ValueError, torch._dynamo.exc.BackendCompilerFailed), match=TRAINING):
        fast(x)
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert sqnr_db(model(x) + 1, fast(x)) > 30


@torch.no_grad()
def test_inductors_mode_is_for_the_graphs_on_a_gpu() -> None:
    class Apart(Net):
        """A model on a GPU, pretended, that computes something on the CPU in a graph of its own."""

        far: Tensor

        def __init__(self) -> None:
            super().__init__()
            with FakeTensorMode():
                self.register_buffer("far", torch.empty(2, device="cuda"))

    x = torch.randn(3, 16)
    near, apart = (torch.compile(model, backend="qfx", mode="reduce-overhead") for model in (Net(), Apart()))
    assert sqnr_db(Net()(x), apart(x)) > 30
    with pytest.raises(Exception, match=r"mode 'reduce-overhead' is Inductor's"):
        near(x)
    with pytest.raises(ValueError, match="unknown mode 'fast'"):
        checked_mode("fast", [x], Apart())
