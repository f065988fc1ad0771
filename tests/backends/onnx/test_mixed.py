"""Linears of several formats on ONNX Runtime: against the reference, which kernels run, and in files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx import Recipe, Rule
from qfx.backends import reference
from qfx.backends.onnx import lower
from qfx.backends.onnx.branch import every_node
from qfx.backends.onnx.kernels import optimized_graph
from qfx.backends.onnx.quant import is_integer_product
from qfx.backends.onnx.slow_forms import slow_forms
from qfx.capture import capture_export
from qfx.errors import QfxWarning
from qfx.pipeline import apply_plan, prepare
from tests.backends.onnx.checks import sqnr
from tests.zoo import ZOO

EXACT = 110.0  # dB: the same codes, sums in f32
ROUNDED = 35.0  # dB: MatMulNBits rounds its activations to 8 bits per block
FOUR, EIGHT = "MatMulNBits 4-bit, blocks of 32, 8-bit activations", "MatMulNBits 8-bit, blocks of 32, 8-bit activations"
INTEGER = "MatMulIntegerToFloat u8 x s8"
ACTIVATIONS = pytest.mark.filterwarnings("ignore:.*float activations were asked:qfx.QfxWarning")


class Layer(nn.Module):
    """One linear."""

    def __init__(self, n: int = 64, k: int = 128, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(k, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def recipe(w: list[str], along: Any = "rows", x: str = "none") -> Recipe:
    return Recipe(name="r", rules=(Rule(target="linear", x=x, w=w, along=along),))


def graph_of(model: nn.Module, x: Tensor, asked: Recipe) -> Any:
    captured = capture_export(model.eval(), (x,), {})
    prepare(captured.gm)
    assert apply_plan(captured.gm, None, asked) == []
    return captured.gm


def lowered(model: nn.Module, x: Tensor, asked: Recipe) -> tuple[float, Any]:
    """SQNR to the reference backend, and what was lowered, none of which is slow."""
    gm = graph_of(model, x, asked)
    (wanted,) = reference.lower(graph_of(model, x, asked))(x)
    made = lower(gm, strict=True)
    integers = [n.name for n in gm.graph.nodes if is_integer_product(n)]
    for built in made.models:
        assert slow_forms(optimized_graph(built), integers) == []
    assert not made.slow
    (found,) = made(x)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return sqnr(wanted, found), made


def kernels(made: Any) -> list[str]:
    return [k for k in made.kernels.values() if "MatMul" in k]


CASES = [
    (["i4/g32", "i8/g32"], "rows", "none", ROUNDED, [FOUR, EIGHT]),
    (["i8/g32", "i4/g32", "i8/g32", "i4/g32"], "rows", "none", ROUNDED, [EIGHT, FOUR]),
    (["i4/g32", "i8/g32"], "columns", "none", ROUNDED, [FOUR, EIGHT]),
    (["i8/g32", "i4/g32", "i8/g32", "i4/g32"], "columns", "none", ROUNDED, [EIGHT, FOUR]),
    (["i8/g64", "i4/g64", "i8/g64", "i4/g64"], "columns", "none", ROUNDED, None),
    (["i4/ch", "i8/ch"], "rows", "i8/tok", EXACT, [INTEGER, INTEGER]),
    (["i4/ch", "i8/ch"], "columns", "i8/tok", EXACT, [INTEGER, INTEGER]),
    (["i4/g32", "i8/ch"], "rows", "i8/tok", ROUNDED, [FOUR, INTEGER]),
    (["u4/ch", "i8/ch", "u8/ch"], "rows", "u8/dyn", EXACT, None),
]


@pytest.mark.parametrize(("w", "along", "x_format", "quality", "wanted"), CASES)
@torch.no_grad()
def test_parity(w: list[str], along: str, x_format: str, quality: float, wanted: list[str] | None) -> None:
    n = 64 if len(w) != 3 else 66
    for bias in (True, False):
        found, made = lowered(Layer(n, bias=bias), torch.randn(2, 5, 128), recipe(w, along, x_format))
        assert found > quality
        assert wanted is None or kernels(made) == wanted


@torch.no_grad()
def test_two_kernels_and_a_concat_whatever_the_order() -> None:
    """Of 16 heads that alternate, one kernel for each format; their results are cut and put in order."""
    _, made = lowered(Layer(bias=False), torch.randn(3, 128), recipe(["i8/g32", "i4/g32"] * 8))
    (built,) = made.models
    ops = Counter(node.op_type for node in optimized_graph(built).node)
    assert ops["MatMulNBits"] == 2 and ops["Concat"] == 1 and ops["Gather"] == 0 and ops["MatMul"] == 0
    assert ops["Slice"] + ops["Split"] <= 16
    _, made = lowered(Layer(bias=False), torch.randn(3, 128), recipe(["i8/g32"] * 4 + ["i4/g32"] * 12))
    (built,) = made.models
    assert Counter(node.op_type for node in optimized_graph(built).node) == {"MatMulNBits": 2, "Concat": 1}


@torch.no_grad()
def test_rows_share_one_quantized_input() -> None:
    for along, count in (("rows", 1), ("columns", 2)):
        _, made = lowered(Layer(), torch.randn(3, 128), recipe(["i8/ch", "i5/ch"], along, "i8/tok"))
        (built,) = made.models
        ops = Counter(node.op_type for node in optimized_graph(built).node)
        assert ops["MatMulIntegerToFloat"] == 2 and ops["QuantizeLinear"] == count


@settings(deadline=None, max_examples=12)
@given(
    w=st.lists(st.sampled_from(["i4/g32", "i8/ch", "u4/g64", "i2/g32", "i8/g16"]), min_size=1, max_size=4),
    width=st.integers(1, 45),
    columns=st.booleans(),
)
@torch.no_grad()
def test_any_width(w: list[str], width: int, columns: bool) -> None:
    """Groups that do not divide the columns of a part are padded."""
    size = width * len(w)
    model = Layer(6, size) if columns else Layer(size, 70)
    x = torch.randn(4, size if columns else 70, generator=torch.Generator().manual_seed(width))
    assert lowered(model, x, recipe(w, "columns" if columns else "rows"))[0] > 25


@ACTIVATIONS
@torch.no_grad()
def test_the_report_has_one_row() -> None:
    for along, mark in (("rows", ""), ("columns", "columns")):
        torch._dynamo.reset()
        size = 64 if along == "rows" else 128
        model, x = Layer().eval(), torch.randn(3, 128)
        options: Any = {"recipe": recipe(["i4/g32", "i8/g32"], along)}
        compiled = torch.compile(model, backend="qfx", options=options)
        compiled(x)
        (row,) = qfx.report(compiled)
        assert (row.node, row.op, row.elements, row.macs) == ("fc", "linear", 64 * 128, 3 * 64 * 128)
        assert row.asked == f"w={mark}[i4/g32:{size // 2},i8/g32:{size // 2}]"
        assert row.kernel == f"{FOUR} + {EIGHT}" and row.quantized
        assert row.bytes_after == 64 * 128 // 4 + 64 * 128 // 2 + 64 * 4 * 4
        measured = qfx.report(compiled, (x,)).rows[0].sqnr_db
        assert measured is not None and measured > 15


# Files


RULES = (
    Rule(target="linear", x="i8/tok", w="i8/ch"),
    Rule(target="*.query", w=["i8/ch", "i4/ch"]),
    Rule(target="*.attention.output.dense", w=["i8/ch", "i4/ch"], along="columns"),
)


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
@torch.no_grad()
def test_export(tmp_path: Path, runtime: str) -> None:
    from tests.qfx.test_export import run

    model: Any
    model, inputs = ZOO["bert"]()
    asked = Recipe(name="heads", rules=RULES)
    written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe=asked, runtime=runtime)
    captured = capture_export(model, (), inputs, dynamic=False)
    prepare(captured.gm)
    apply_plan(captured.gm, None, asked)
    wanted = reference.lower(captured.gm)(*captured.flatten((), inputs))[0]
    assert sqnr(wanted, run(written.path, inputs)[0]) > 38
    query = next(roles for fqn, roles in written.formats.items() if fqn.endswith("query"))
    output = next(roles for fqn, roles in written.formats.items() if fqn.endswith("attention.output.dense"))
    size = model.config.hidden_size // 2
    assert query == {"x": "i8/tok", "w": f"[i8/ch:{size},i4/ch:{size}]"}
    assert output["w"] == f"columns[i8/ch:{size},i4/ch:{size}]"
    proto = onnx.load(str(written.path)).graph
    if runtime == "standard":
        assert {node.domain for node in every_node(proto.node)} == {""}
    big = [t.name for t in proto.initializer if t.data_type == 1 and "query" in t.name and len(t.dims) == 2]
    assert big == []  # no weight lies in the file as floats


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("standard", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_quantized_live_model_exports_the_same(tmp_path: Path, runtime: str) -> None:
    model, inputs = ZOO["bert"]()
    asked = Recipe(name="heads", rules=RULES)
    one = qfx.export_onnx(model, inputs, tmp_path / "a.onnx", recipe=asked, runtime=runtime)
    two = qfx.export_onnx(qfx.quantize(model, asked, [inputs]), inputs, tmp_path / "b.onnx", runtime=runtime)
    from tests.qfx.test_export import run

    assert one.formats == two.formats
    assert sqnr(run(one.path, inputs)[0], run(two.path, inputs)[0]) > 100


@ACTIVATIONS
@torch.no_grad()
def test_rows_of_q_k_and_v_are_one_kernel_for_each_format(tmp_path: Path) -> None:
    """In a file the parts of equal format of all three lie one below the other."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(128, 64, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x)
            return out

    model, x = Attention().eval(), torch.randn(3, 128)
    asked = recipe(["i8/g32", "i4/g32", "i4/g32", "i8/g32"])
    written = qfx.export_onnx(model, (x,), tmp_path / "m.onnx", recipe=asked)
    proto = onnx.load(str(written.path)).graph
    assert Counter(node.op_type for node in proto.node)["MatMulNBits"] == 2
    from tests.qfx.test_export import run

    names = [i.name for i in proto.input]
    (wanted,) = reference.lower(graph_of(model, x, asked))(x)
    assert sqnr(wanted, run(written.path, {names[0]: x})[0]) > 30


def test_a_format_without_a_kernel_is_told_of_its_linear() -> None:
    model = Layer().eval()
    options: Any = {"recipe": recipe(["nf4/g32", "i8/ch"], x="i8/tok")}
    compiled = torch.compile(model, backend="qfx", options=options)
    with torch.no_grad(), pytest.warns(QfxWarning, match="fc: the weight is stored as nf4/g32, computed in f32"):
        compiled(torch.randn(3, 128))
    (row,) = qfx.report(compiled)
    assert row.reason
