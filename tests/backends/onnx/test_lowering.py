"""`lower` as a whole: torch between sessions, strict refusal, odd outputs, threads, kernels, weights in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.library import Library, register_fake

from qfx.backends import onnx, reference
from qfx.backends.onnx import lower, supports
from qfx.backends.onnx.kernels import optimized_graph
from qfx.capture import capture_export
from qfx.errors import UnsupportedError
from tests.backends.onnx.checks import check, floats, integers, same, traced
from tests.graphs import Function


@pytest.fixture
def strange() -> Iterator[Any]:
    """Operators that ONNX cannot know: strange::roll2, and strange::pair with two results."""
    library = Library("strange", "FRAGMENT")
    library.define("roll2(Tensor x) -> Tensor")
    library.define("pair(Tensor x, SymInt n) -> (Tensor, Tensor)")
    library.impl("roll2", lambda x: x.roll(2, -1) * 3, "CompositeExplicitAutograd")
    library.impl("pair", lambda x, n: (x + n, x[:n] - 1), "CompositeExplicitAutograd")
    register_fake("strange::roll2", torch.empty_like, lib=library)
    register_fake("strange::pair", lambda x, n: (torch.empty_like(x), x.new_empty((n, *x.shape[1:]))), lib=library)
    yield torch.ops.strange
    library._destroy()


def x2(n: int) -> list[Tensor]:
    return [floats(n, 6)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_an_unknown_operator_runs_in_torch_between_sessions(strange: Any, dynamic: bool) -> None:
    def function(x: Tensor) -> tuple[Any, ...]:
        y = strange.roll2(x.exp() + x.shape[0])
        first, second = strange.pair(y * 2, x.shape[0] // 2)
        z = first.sum(-1) + y[:, 0] * x.shape[0]
        return z, second @ x.t(), strange.roll2(z)[None], x.shape[0] * 2, y

    lowered = check(function, x2, dynamic=dynamic, strict=False)
    reasons = [note.reason for note in lowered.notes]
    assert reasons == [
        "runs in torch: no ONNX form for strange.roll2.default",
        "runs in torch: no ONNX form for strange.pair.default",
        "runs in torch: no ONNX form for strange.roll2.default",
    ]
    assert not any(note.minor for note in lowered.notes)
    assert len(lowered.models) == 4
    assert lowered.kernels["roll2"] == "torch strange.roll2.default"
    assert lowered.kernels["exp"] == "Exp"


def test_a_weight_that_an_earlier_session_turned(strange: Any) -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        turned = own.weight.t()
        return nn.functional.linear(strange.roll2(nn.functional.linear(x, turned)), turned)

    net, x = Function(forward, weight=floats(6, 6)).eval(), floats(3, 6, seed=2)
    lowered = lower(capture_export(net, (x,)).gm, strict=False)
    assert len(lowered.models) == 2, "the turned weight goes from the first to the second"
    (found,) = lowered(x)
    same(found, net(x).detach())


def test_strict_refuses_with_the_node_and_the_next_step(strange: Any) -> None:
    gm = traced(lambda x: strange.roll2(x + 1), x2(3))
    message = (
        r"cannot run 1 node\(s\).*'roll2': no ONNX form for strange.roll2(?s:.*)next step: lower with strict=False"
    )
    with pytest.raises(UnsupportedError, match=message):
        lower(gm, strict=True)


def test_supports_says_why_not(strange: Any) -> None:
    gm = traced(lambda x: strange.roll2(x + 1), x2(3))
    add, unknown = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert supports(add) is None
    assert supports(next(iter(gm.graph.nodes))) is None
    assert supports(unknown) == "no ONNX form for strange.roll2.default"


def test_what_a_session_refuses_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that ONNX Runtime turns out not to have, though the table says so."""
    monkeypatch.setitem(onnx.table.EMIT, "aten.cosh.default", lambda b, x: b.op("Cosinus", x))
    lowered = check(lambda x: (x + 1).cosh() * 2, x2, strict=False)
    assert ["cosh" in note.node and "ONNX Runtime refuses it" in note.reason for note in lowered.notes] == [True]
    assert lowered.kernels["cosh"] == "torch aten.cosh.default"
    with pytest.raises(UnsupportedError, match="ONNX Runtime refuses it"):
        lower(traced(lambda x: x.cosh(), x2(3)), strict=True)


def test_random_operators_run_in_torch() -> None:
    lowered = lower(traced(lambda x: (torch.rand_like(x) * 0 + x + 1,), x2(3)))
    (found,) = lowered(*x2(3))
    same(found, x2(3)[0] + 1)
    assert [note.reason for note in lowered.notes] == ["runs in torch: no ONNX form for aten.rand_like.default"]


def test_what_depends_on_no_input_is_computed_once_by_torch() -> None:
    lowered = check(lambda x: x * torch.erfinv(torch.full((6,), 0.5) + torch.arange(6) / 20), x2, strict=True)
    assert not lowered.notes
    assert "erfinv" not in lowered.kernels


def test_chance_and_unknown_sizes_are_not_constants() -> None:
    gm = traced(lambda x: (x + torch.erfinv(torch.rand(6)), torch.erfinv(torch.zeros(x.shape[0]))), x2(3), x2(4))
    lowered = lower(gm)
    assert sorted(note.reason.split()[-1] for note in lowered.notes) == [
        "aten.erfinv.default",
        "aten.erfinv.default",
        "aten.rand.default",
    ]
    assert not torch.equal(lowered(floats(3, 6))[0], lowered(floats(3, 6))[0])


def test_outputs_that_are_inputs_constants_numbers_or_the_same() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", floats(3))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
            total = x + y
            return x, self.table, 7, x.shape[0], total, total, total.clone(), x.view(x.shape)

    captured = capture_export(Odd(), (floats(4, 3), floats(4, 3)))
    lowered = lower(captured.gm, strict=True)
    inputs = captured.flatten((floats(5, 3), floats(5, 3, seed=2)), {})
    for found, expected in zip(lowered(*inputs), reference.lower(captured.gm)(*inputs), strict=True):
        same(found, expected)
    assert lowered(*inputs)[0] is inputs[0]


class _Namesakes(nn.Module):
    """Parameters that are called like an input, and like constants of the ONNX graph."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(floats(3, 6, seed=1))
        self.constant_0, self.constant_1 = nn.Parameter(floats(6, seed=2)), nn.Parameter(floats(6, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.x + self.constant_0 * 2).unsqueeze(0) + self.constant_1


def test_parameters_that_are_called_like_an_input_or_a_constant() -> None:
    model, x = _Namesakes(), floats(3, 6)
    (found,) = lower(capture_export(model, (x,), dynamic=False).gm, strict=True)(x)
    same(found, model(x).detach())


def test_a_graph_without_any_computation() -> None:
    lowered = lower(traced(lambda x: (x,), x2(3)))
    inputs = floats(3, 6)
    assert lowered(inputs)[0] is inputs
    assert lowered.kernels == {}
    assert lowered.models == []


def test_bool_and_integer_inputs_and_strided_ones() -> None:
    def function(x: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return x.masked_fill(mask, 0.0), mask | (ids > 3), ids + 1

    inputs = floats(6, 4).t(), (floats(6, 4) > 0).t(), integers(6, 4).t()
    lowered = lower(traced(function, inputs), strict=True)
    for found, expected in zip(lowered(*inputs), function(*inputs), strict=True):
        same(found, expected)


def test_results_do_not_change_when_the_next_call_runs() -> None:
    lowered = lower(traced(lambda x: (x * 2,), x2(3)))
    first = lowered(floats(3, 6))[0]
    kept = first.clone()
    lowered(floats(3, 6, seed=9))
    assert torch.equal(first, kept)


def test_results_outlive_the_lowered_graph() -> None:
    lowered = lower(traced(lambda x: (x * 2,), x2(3)))
    (found,) = lowered(floats(3, 6))
    del lowered
    found += 1
    same(found, floats(3, 6) * 2 + 1)


def test_calls_from_several_threads() -> None:
    weight = floats(6, 64)
    lowered = lower(traced(lambda x, w: (x @ w,), [floats(3, 6), weight], [floats(4, 6), weight]))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(20):
            x = floats(2 + (seed + i) % 5, 6, seed=seed * 100 + i)
            if not torch.allclose(lowered(x, weight)[0], x @ weight, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_wrong_number_of_inputs_is_refused() -> None:
    lowered = lower(traced(lambda x: (x * 2,), x2(3)))
    with pytest.raises(ValueError, match="expected 1 inputs in placeholder order, found 2"):
        lowered(floats(3, 6), floats(3, 6))


def test_a_size_that_the_graph_fixed_is_refused_at_the_call() -> None:
    lowered = lower(traced(lambda x: (x * 2,), x2(3)))
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        lowered(floats(4, 6))


class _TwoLayers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def test_large_weights_are_not_copied() -> None:
    model = _TwoLayers().eval()
    captured = capture_export(model, (floats(2, 64),))
    (built,) = lower(captured.gm, strict=True).models
    assert {name: t.data_ptr() for name, t in built.weights.items()} == {
        "first.weight": model.first.weight.data_ptr(),
        "second.weight": model.second.weight.data_ptr(),
    }
    assert built.model.ByteSize() < 2000


def test_the_model_is_deterministic() -> None:
    captured = capture_export(_TwoLayers().eval(), (floats(2, 64),))
    texts = {lower(captured.gm).models[0].model.SerializeToString() for _ in range(2)}
    assert len(texts) == 1


def test_half_precision_is_computed_in_f32_with_one_note() -> None:
    model = _TwoLayers(torch.bfloat16).eval()
    x = floats(3, 64, dtype=torch.bfloat16)
    lowered = lower(capture_export(model, (x,)).gm, strict=True)
    (found,) = lowered(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), model(x).float(), atol=0.02)
    (note,) = lowered.notes
    assert (note.node, note.minor) == ("graph", True)
    assert "torch.bfloat16 values are computed in float32" in note.reason


def test_tensors_on_another_device_are_refused() -> None:
    gm = traced(lambda x: (x * 2,), x2(3))
    next(iter(gm.graph.nodes)).meta["val"] = torch.empty(3, 6, device="meta").to("meta")
    lower(gm)
    fake = next(iter(gm.graph.nodes)).meta

    class Elsewhere(Tensor):
        device = torch.device("cuda", 0)

    fake["val"] = floats(3, 6).as_subclass(Elsewhere)
    with pytest.raises(UnsupportedError, match="expected: tensors on the CPU(?s:.*)found: cuda:0"):
        lower(gm)


def test_the_caller_graph_is_left_as_it_was() -> None:
    gm = traced(lambda x, y: torch.addr(x, x[:, 0], y[0]), [floats(3, 6), floats(3, 6)])
    before = [n.format_node() for n in gm.graph.nodes]
    lowered = lower(gm, strict=True)
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert "addr" not in lowered.kernels  # decomposed


def test_kernels_are_those_of_the_optimized_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32)).eval()
    lowered = lower(capture_export(model, (floats(2, 64),)).gm, strict=True)
    assert lowered.kernels["linear"] == "FusedMatMul f32"
    assert lowered.kernels["layer_norm"] == "LayerNormalization"
    (built,) = lowered.models
    assert "SkipLayerNormalization" not in {n.op_type for n in optimized_graph(built).node}


def test_skip_layer_norm_is_never_fused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.norm(x + y)
            return z

    lowered = lower(capture_export(Residual().eval(), (floats(2, 3, 64), floats(2, 3, 64))).gm)
    assert lowered.kernels == {"add": "Add", "layer_norm": "LayerNormalization"}


def test_every_node_of_the_graph_has_a_kernel_entry() -> None:
    captured = capture_export(_TwoLayers().eval(), (floats(2, 64),))
    names = {n.name for n in captured.gm.graph.nodes if n.op == "call_function"}
    assert set(lower(captured.gm).kernels) == names


def test_scalar_inputs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.placeholder("n")
    gm = traced(lambda t: (t * t.shape[0],), [floats(3, 6)], [floats(4, 6)])
    symbol = next(n.meta["val"].shape[0] for n in gm.graph.nodes if n.op == "placeholder")
    x.meta["val"] = next(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder")
    size.meta["val"] = symbol
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, size))
    product.meta["val"] = x.meta["val"] * 1
    graph.output((product, size))
    lowered = lower(fx.GraphModule(nn.Module(), graph), strict=True)
    found = lowered(floats(5, 6), 5)
    same(found[0], floats(5, 6) * 5)
    assert found[1] == 5
