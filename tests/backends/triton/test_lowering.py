"""Lowering: what is written in place, what is told, and where the backend is not to be had."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import qfx
from qfx.backends.triton import device, lower, lowering, tuning
from qfx.backends.triton.device import Device
from qfx.errors import QfxWarning, UnsupportedError
from qfx.options import Options
from qfx.passes._match import known
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture


class Cache(nn.Module):
    """Writes new rows into a cache and reads it; also gives a view of what was there before."""

    def forward(self, cache: Tensor, at: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        before = cache.clone()[0]
        cache.index_copy_(1, at, new)
        return cache.sum(-1), before


def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 8, 4, device=DEVICE),
        torch.tensor([3, 5], device=DEVICE),
        torch.randn(2, 2, 4, device=DEVICE),
    )


@pytest.mark.parametrize("mode", [None, pytest.param("default", marks=pytest.mark.slow)])
def test_changed_inputs_are_written_where_they_lie(mode: str | None) -> None:
    lowered = lower(capture(Cache(), *given()), mode=mode)
    for _ in range(2):
        cache, at, new = given()
        changed = cache.index_copy(1, at, new)
        out, total, before = lowered(cache, at, new)
        assert out is cache
        assert torch.equal(cache, changed)
        torch.testing.assert_close(total, changed.sum(-1))
        assert torch.equal(before, given()[0][0])


@pytest.mark.parametrize("mode", [None, pytest.param("default", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "copied",
    [lambda x: x * 1, lambda x: (x * 1).chunk(2)[1], lambda x: torch.einsum("ij->ji", x * 1), lambda x: x.clone()],
    ids=["whole", "part", "turned", "clone"],
)
def test_what_was_in_an_input_before_it_changed(copied: Callable[[Tensor], Tensor], mode: str | None) -> None:
    class Delayed(nn.Module):
        def forward(self, held: Tensor, x: Tensor) -> Tensor:
            before = copied(held)
            held.add_(x)
            return before

    held, x = (torch.randn(4, 6, device=DEVICE) for _ in range(2))
    gm = capture(Delayed(), held, x)
    prepare(gm)  # what copies without changing a value goes
    lowered = lower(gm, mode=mode)
    for _ in range(2):
        expected = copied(held.clone())
        _, before = lowered(held, x)
        assert torch.equal(before, expected)


def quantized(model: nn.Module, recipe: str, *inputs: Any, dynamic: bool = False) -> Any:
    gm = capture(model, *inputs, dynamic=dynamic)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse(recipe))
    return gm


def test_what_the_graph_holds_is_left_as_it_was() -> None:
    x = torch.randn(3, 40, device=DEVICE)
    gm = quantized(nn.Linear(40, 24, device=DEVICE), "w8a8", x)
    before = str(gm.graph)
    lowered = lower(gm)
    assert str(gm.graph) == before
    (expected,), (found,) = gm(x), lowered(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert lowered.kernels["linear"] == "gemm8 i8/tok x i8/ch (Triton)"
    assert lowered.first_call is not None and lowered.first_call >= 0


def test_a_node_without_a_kernel_is_told_and_refused_when_strict() -> None:
    model = nn.Linear(40, 24, device=DEVICE).eval()
    recipe = Recipe.parse("w8a8").override(rules=({"target": "*", "w": "i4/g10"},))
    options: dict[str, Any] = {"recipe": recipe, "backend": "triton"}
    x = torch.randn(3, 40, device=DEVICE)
    with torch.no_grad():
        with pytest.warns(QfxWarning, match=r"torch's reference arithmetic, which is slow: .*i4/g10"):
            found = torch.compile(model, backend="qfx", options={**options, "cache": False})(x)
        torch._dynamo.reset()
        assert found.shape == (3, 24)
        with pytest.raises(Exception, match=r"strict=True and not everything") as caught:
            torch.compile(model, backend="qfx", options={**options, "strict": True, "cache": False})(x)
    assert isinstance(caught.value.__cause__ or caught.value, UnsupportedError | RuntimeError)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("x_format", "w_format", "why"),
    [
        ("i8/tok", "u4/g16", "groups are whole multiples of 32 columns"),
        ("i8/tok", "nf4/g32", "both are integers, or both f8e4m3"),
        ("f8e5m2/tok", "i8/ch", "neither integers nor f8e4m3"),
    ],
)
def test_a_pair_without_a_product_of_8_bits_is_told(x_format: str, w_format: str, why: str) -> None:
    x = torch.randn(3, 64, device=DEVICE)
    gm = capture(nn.Linear(64, 24, device=DEVICE), x)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse("w8a8").override(rules=({"target": "*", "x": x_format, "w": w_format},)))
    lowered = lower(gm)
    assert lowered.kernels["linear"].endswith(f" (Triton) of an input rounded to {x_format} (torch)")
    (note,) = lowered.notes
    assert note.minor and "torch rounds the input" in note.reason and why in note.reason
    torch.testing.assert_close(lowered(x), gm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["i8/ch", ["i8/ch", "i4/ch"]], ids=str)
@pytest.mark.parametrize("x_format", ["i8/tok", "none"])
def test_a_dtype_without_kernels_runs_in_the_reference_and_is_told(x_format: str, weight: Any) -> None:
    x = torch.randn(3, 64, device=DEVICE, dtype=torch.float64)
    gm = capture(nn.Linear(64, 24, device=DEVICE, dtype=torch.float64), x)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse("w8a8").override(rules=({"target": "*", "x": x_format, "w": weight},)))
    lowered = lower(gm)
    assert {note.reason.partition(": ")[2] for note in lowered.notes} == {"its input is torch.float64"}
    assert not any(note.minor for note in lowered.notes)
    torch.testing.assert_close(lowered(x), gm(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_onnx_runtime_runs_it_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    model, x = nn.Linear(40, 24).eval(), torch.randn(3, 40)
    compiled = torch.compile(model, backend="qfx", options={"backend": "triton", "cache": False})
    with (
        torch.no_grad(),
        pytest.warns(QfxWarning, match=r"runs in ONNX Runtime, since Triton does not take it.*no GPU"),
    ):
        assert compiled(x).shape == (3, 24)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("capability", "hip", "reason"), [((7, 5), None, "capability is 7.5"), ((9, 0), "6.0", "no NVIDIA")]
)
def test_gpus_that_have_no_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        device.find(torch.device("cuda"))


def test_triton_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install triton"):
        lower(capture(Cache(), *given()))
    with pytest.raises(ValueError, match="'triton' is not installed"):
        Options.parse({"backend": "triton"})


def test_the_mode_is_for_graphs_on_a_gpu() -> None:
    with pytest.raises(Exception, match="mode 'reduce-overhead' is Inductor's"):
        torch.compile(nn.Linear(4, 4).eval(), backend="qfx", mode="reduce-overhead")(torch.ones(1, 4))
    torch._dynamo.reset()


def test_a_device_knows_whether_it_multiplies_8_bit_floats() -> None:
    assert not device.A100.has_fp8 and device.H200.has_fp8
    assert not Device("", (8, 6), 1, 1).has_fp8


def test_nothing_is_said_where_all_runs_as_asked() -> None:
    model, x = nn.Sequential(nn.Linear(40, 24, device=DEVICE)).eval(), torch.randn(3, 40, device=DEVICE)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", QfxWarning)  # those of an old interpreter are not ours
        compiled = torch.compile(model, backend="qfx", options={"backend": "triton", "cache": False, "strict": True})
        compiled(x)
    report = qfx.report(compiled)
    assert [row.kernel for row in report] == ["gemm8 i8/tok x i8/ch (Triton)"]
    assert report.first_calls is not None and not [note for note in report.notes if not note.minor]
    torch._dynamo.reset()


def test_a_gpu_that_nobody_tuned_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QFX_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(device, "find", lambda _: device.H100)
    gm = quantized(nn.Linear(40, 24, device=DEVICE), "w8a8", torch.randn(3, 40, device=DEVICE))
    (note,) = lower(gm, mode="eager").notes
    assert note.minor and "no measured configurations for NVIDIA H100" in note.reason and "qfx tune" in note.next_step
    tuning.write(tmp_path, device.H100, {("gemm8", "a problem", "1"): {}})
    assert not lower(gm, mode="eager").notes


def test_a_lack_of_memory_says_what_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 40, device=DEVICE)
    lowered = lower(quantized(nn.Linear(40, 24, device=DEVICE), "w8a8", x))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lowered, "_run", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        lowered(x)
    assert any("fewer tokens a call" in note for note in caught.value.__notes__)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Graphs that are compiled from now on: they run as they are."""
    compiled: list[fx.GraphModule] = []
    original = torch.compile

    def keep(gm: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    def plain(run: Callable[..., Any], *, fullgraph: bool, dynamic: bool | None, options: object) -> Callable[..., Any]:
        return original(run, fullgraph=fullgraph, dynamic=dynamic, backend=keep)

    monkeypatch.setattr(torch, "compile", plain)
    return compiled


def test_a_number_that_changes_at_each_call_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the length of a cache with a window, a number in Python; the sizes of tensors stay numbers of the code."""
    compiled = counting(monkeypatch)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    symbol = mode.from_tensor(torch.empty(7), symbolic_context=context).shape[0]
    made = fx.Graph()
    x, n = made.placeholder("x"), made.placeholder("n")
    x.meta["val"], n.meta["val"] = mode.from_tensor(torch.empty(20), static_shapes=True), symbol
    least = made.call_function(torch.sym_min, (made.call_function(torch.sym_max, (n, 3)), 11))
    made.output((made.call_function(torch.ops.aten.add.Tensor, (x, least)),))
    run = lowering._compiled(fx.GraphModule({}, made), {})
    for value in (2, 9, 10, 11, 12, 1):
        assert torch.equal(run(torch.zeros(20), value)[0], torch.full((20,), float(min(max(value, 3), 11))))
    assert len(compiled) == 2
    sizes = [n.meta["example_value"].shape for n in compiled[1].graph.nodes if n.op == "placeholder" and "x" in n.name]
    assert all(isinstance(size, int) for shape in sizes for size in shape)


@pytest.mark.parametrize("rows", [3, None])
def test_sizes_that_change_are_compiled_once(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = counting(monkeypatch)
    context: Any = StatelessSymbolicContext([DimDynamic.STATIC if rows else DimDynamic.DYNAMIC])
    made = fx.Graph()
    x = made.placeholder("x")
    x.meta["val"] = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(7), symbolic_context=context)
    made.output((made.call_function(torch.ops.aten.neg.default, (x,)),))
    run = lowering._compiled(fx.GraphModule({}, made), {})
    for size in (rows,) if rows else (4, 5, 6, 7):
        assert run(torch.ones(size or 0))[0].tolist() == [-1.0] * (size or 0)
    assert len(compiled) == 1


@pytest.mark.parametrize(("rows", "together"), [(1, True), (16, True), (17, False)])
def test_small_kernels_of_a_step_are_one(rows: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def keep(run: Callable[..., Any], *, fullgraph: bool, dynamic: bool | None, options: dict[str, Any]) -> Any:
        asked.append(options)
        return run

    monkeypatch.setattr(torch, "compile", keep)
    x = torch.randn(rows, 64, device=DEVICE)
    lower(quantized(nn.Sequential(nn.Linear(64, 32), nn.ReLU()).to(DEVICE), "w4a16", x), mode="default")
    lower(capture(nn.ReLU(), x), mode="default")
    assert [options.get("combo_kernels", False) for options in asked] == [together, False]
    assert {"combo_kernels", "combo_kernels_pointwise_only", "combo_kernels_autotune"} <= set(
        inductor.get_config_copy()
    )


@pytest.mark.parametrize(
    ("recipe", "kernel_of_it"),
    [("w4a16", "linear_weight_only u4/g64/f16 (Triton)"), ("w8a8", "gemm8 i8/tok x i8/ch (Triton)")],
)
def test_whether_it_is_a_step_fixes_no_size_that_varies(
    recipe: str, kernel_of_it: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each length of a prompt would be compiled anew, up to Dynamo's limit."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda run, *, fullgraph, dynamic, options: asked.append(options))
    x = torch.randn(2, 5, 64, device=DEVICE)
    lowered = lower(gm := quantized(nn.Linear(64, 32, device=DEVICE), recipe, x, dynamic=True), mode="default")
    assert [kernel for name, kernel in lowered.kernels.items() if "linear" in name] == [kernel_of_it]
    sizes = [known(size) for node in gm.graph.nodes if node.op == "placeholder" for size in node.meta["val"].shape]
    assert [isinstance(size, int) for size in sizes] == [False, False, True]
    assert "combo_kernels" not in asked[0]
