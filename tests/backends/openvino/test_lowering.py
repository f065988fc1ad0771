"""The OpenVINO backend: the same annotated graph, close to the reference, told kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qfx
from qfx.errors import QfxWarning
from qfx.measuring.measure import sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:graph. what is not quantized is computed in:qfx.errors.QfxWarning"),
    pytest.mark.filterwarnings("ignore:.*OpenVINO multiplies its x=i8/tok in float:qfx.errors.QfxWarning"),
]


class Block(nn.Module):
    """Attention and a gated MLP after norms."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


def block() -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    return Block().eval(), [torch.randn(2, 16, 64) for _ in range(4)]


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="qfx", options={"backend": "openvino", **options})


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("w8a8-static", 25), ("w8a8-smooth", 25), ("w8a16", 35), ("w4a16", 15), ("w8a8", 25)],
)
@torch.no_grad()
def test_as_near_to_the_model_as_the_reference(recipe: str, least: float) -> None:
    model, xs = block()
    x = torch.randn(2, 16, 64)
    wanted = model(x)
    data = xs if qfx.Recipe.parse(recipe).needs_data else None
    qfx.quantize(model, recipe, data or [xs[0]])
    live = model(x)
    found = compiled(model)(x)
    assert sqnr_db(wanted, found) > min(least, sqnr_db(wanted, live) - 1.5)
    assert sqnr_db(live, found) > least, "bfloat16 between the layers"
    assert found.dtype == torch.float32


@torch.no_grad()
def test_integer_kernels_are_told_for_each_linear() -> None:
    model, xs = block()
    qfx.quantize(model, "w8a8-static", xs)
    fast = compiled(model)
    fast(xs[0])
    rows = {row.node: row for row in qfx.report(fast).rows}
    for name in ("qkv", "o", "up", "down"):
        assert "OpenVINO" in rows[name].kernel and "FullyConnected" in rows[name].kernel, rows[name]
        assert "I8" in rows[name].kernel or "i8" in rows[name].kernel, rows[name]


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
@torch.no_grad()
def test_products_behind_a_norm_are_told(recipe: str) -> None:
    """OpenVINO gives them the name of the norm, whose weights are not ones."""
    model, (x, *_) = block()
    for norm in (model.norm, model.norm2):
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    fast = compiled(model, recipe=recipe)
    fast(x)
    kernels = {row.node: row.kernel for row in qfx.report(fast).rows if row.op == "linear"}
    assert set(kernels) == {"qkv", "o", "up", "down"}
    assert all(kernel.startswith("OpenVINO FullyConnected") for kernel in kernels.values()), kernels


class Gated(nn.Module):
    """A gated MLP without biases, and a projection behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((32, 64), (32, 64), (64, 32)))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.down(F.silu(self.gate(x)) * self.up(x)))
        return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", [{"w": "i8/ch"}, {"w": "u4/g32"}, {"w": "i8/ch", "x": "f32"}])
@torch.no_grad()
def test_float_activations_before_packed_weights_are_not_rounded(rule: dict[str, Any]) -> None:
    """A float gate on one thread is computed in f32 on every processor, and so is what stands beside it."""
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(4, 7, 32)
    qfx.quantize(model, qfx.Recipe(name="float", rules=(qfx.Rule(target="*out", **rule),)), [x])
    fast = compiled(model, strict=True)
    assert sqnr_db(model(x), fast(x)) > 100
    assert not qfx.report(fast).notes


@pytest.mark.parametrize("rule", [{"w": "u4/g32"}, {"w": "i8/ch"}, {"w": "i8/ch", "x": "f32"}])
@torch.no_grad()
def test_products_that_openvino_names_after_others_are_told(rule: dict[str, Any]) -> None:
    """The product behind a gate gets the name of the gate, constants and all; the last one that of the output."""
    model, x = Gated().eval(), torch.randn(4, 7, 32)
    fast = compiled(model, recipe=qfx.Recipe(name="all", rules=(qfx.Rule(target="linear", **rule),)))
    fast(x)
    kernels = {row.node: row.kernel for row in qfx.report(fast).rows}
    assert set(kernels) == {"gate", "up", "down", "out"}
    assert all(kernel.startswith("OpenVINO FullyConnected") for kernel in kernels.values()), kernels


@torch.no_grad()
def test_other_shapes() -> None:
    model, xs = block()
    qfx.quantize(model, "w8a8-static", xs)
    fast = compiled(model)
    for shape in ((2, 16, 64), (3, 7, 64), (1, 33, 64), (5, 2, 64)):
        x = torch.randn(shape)
        assert sqnr_db(model(x), fast(x)) > 25


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    torch.manual_seed(0)
    last, x = nn.Linear(32, 8), torch.randn(4, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), last).eval()
    fast = compiled(model, recipe="w8a16")
    before = fast(x)
    last.weight.neg_()
    assert sqnr_db(model(x), fast(x)) > 25 and sqnr_db(model(x), before) < 10


class Sorting(nn.Module):
    """The inverse of a matrix has no ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.linalg.inv(self.fc(x) + 20 * torch.eye(8))
        return found


@torch.no_grad()
def test_what_it_cannot_have_runs_in_onnx_runtime_and_is_told() -> None:
    model, x = Sorting().eval(), torch.randn(8, 8)
    fast = compiled(model, recipe="w8a16")
    with pytest.warns(QfxWarning) as told:
        found = fast(x)
    said = [str(warning.message) for warning in told]
    assert any("runs in ONNX Runtime, since OpenVINO does not take it" in text for text in said)
    assert any("linalg_inv: runs in torch" in text for text in said)
    assert sqnr_db(model(x), found) > 25
    rows = {row.node: row.kernel for row in qfx.report(fast).rows}
    assert "OpenVINO" not in rows["fc"]


@torch.no_grad()
def test_strict_refuses_that() -> None:
    fast = compiled(Sorting().eval(), recipe="w8a16", strict=True)
    with pytest.raises(Exception, match="UnsupportedError"):
        fast(torch.randn(8, 8))


@torch.no_grad()
def test_bfloat16_between_the_layers_is_told() -> None:
    model, xs = block()
    qfx.quantize(model, "w8a8-static", xs)
    fast = compiled(model)
    fast(xs[0])
    notes = [str(note) for note in qfx.report(fast).notes]
    from openvino import Core

    chosen = Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    assert any(f"computed in {chosen}" in note for note in notes) == (chosen != "f32")


@torch.no_grad()
def test_products_in_float_are_told_and_no_error() -> None:
    """Scales that are found at run time: OpenVINO has no integer kernel for them."""
    model, xs = block()
    qfx.quantize(model, "w8a8", xs[:1])
    fast = compiled(model, strict=True)
    fast(xs[0])
    found = [note for note in qfx.report(fast).notes if "in float" in note.reason]
    assert {note.node for note in found} == {"qkv", "o", "up", "down"}
    assert all(note.minor and "FullyConnected" in note.reason and "w8a8-static" in note.next_step for note in found)
    fixed, xs = block()
    qfx.quantize(fixed, "w8a8-static", xs)
    fast = compiled(fixed)
    fast(xs[0])
    assert not [note for note in qfx.report(fast).notes if "in float" in note.reason], "negative control"


@pytest.mark.parametrize("formats", ["q=i8/tok k=i8/tok v=i8/head/dyn p=u8/tok", "q=i8 k=i8/head v=i8 p=u8"])
def test_attention_of_rounded_operands(formats: str) -> None:
    from qfx.backends import openvino
    from tests.backends.onnx.checks import sqnr, traced
    from tests.backends.onnx.test_quantized_attention import call
    from tests.qfx.ops.test_attention import qkv

    function, given = call(formats, causal=True), qkv(9, 12)
    lowered = openvino.lower(traced(function, given))
    assert sqnr(function(*given), lowered(*given)[0]) > 30  # what is not quantized may be in bf16
    told = [note for note in lowered.notes if "OpenVINO multiplies its" in note.reason]
    assert all(note.minor and "its q=i8" in note.reason and " p=u8" in note.reason for note in told)
    assert bool(told) == any("MatMul" in k and "f32" in k for k in lowered.kernels.values())
